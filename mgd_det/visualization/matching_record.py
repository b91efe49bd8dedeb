"""The first and the last matching of a training, in a file of its OUTPUT_DIR, from which the report draws them."""

import os
from typing import List, Mapping, Tuple

import numpy as np
import torch

from mgd_det.files.atomic_files import write_atomically
from mgd_det.visualization.matching import MatchedPosition

MATCHING_FILE = "matching.npz"

_PARTS = ("first_groups", "cost", "groups")


def record_matching(folder: str, matched: Mapping[str, Tuple[torch.Tensor, torch.Tensor]], is_first: bool) -> None:
    """Keep a matching as the last one. A later call replaces all of it but the first groups.

    Args:
        folder: OUTPUT_DIR.
        matched: (cost, groups) by the position's name; shapes (Cs, Ct) and (Cs, K).
        is_first: whether a new training begins with this matching, so that a file in the folder is of another one.
    """
    path = os.path.join(folder, MATCHING_FILE)
    first = {} if is_first else {m.name: m.former for m in read_matchings(folder)}
    arrays = {}
    for name, (cost, groups) in matched.items():
        former = first.get(name)
        arrays[f"{name}/cost"] = cost.numpy().astype(np.float16)  # 2 MB for 512 and 2048 channels
        arrays[f"{name}/groups"] = groups.numpy().astype(np.int16)
        arrays[f"{name}/first_groups"] = (groups if former is None else former).numpy().astype(np.int16)
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))  # type: ignore[arg-type]


def read_matchings(folder: str) -> List[MatchedPosition]:
    """Return the recorded positions: the last cost and groups, and the first groups as ``former``; [] without a file.

    Raises:
        ValueError: the file is not one of :func:`record_matching`.
    """
    path = os.path.join(folder, MATCHING_FILE)
    if not os.path.exists(path):
        return []
    with np.load(path) as file:
        names = dict.fromkeys(key.rpartition("/")[0] for key in file.files)
        if any(f"{name}/{part}" not in file.files for name in names for part in _PARTS):
            raise ValueError(f"{path} is not a record of a matching")
        return [
            MatchedPosition(
                name,
                torch.from_numpy(file[f"{name}/cost"].astype(np.float32)),
                torch.from_numpy(file[f"{name}/groups"].astype(np.int64)),
                torch.from_numpy(file[f"{name}/first_groups"].astype(np.int64)),
            )
            for name in names
        ]
