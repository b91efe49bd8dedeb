"""What the parts that measure share: rounds for a given time, host waits, results that are saved as they come."""

import json
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
from detectron2.config import CfgNode

from mgd_det.benchmark import Spread, interleaved, ratio
from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.errors import first_line
from mgd_det.files.atomic_files import write_atomically

FULL_SIZE, DRY_SIZE = (800, 1344), (64, 96)
BATCHES = (16, 2)
# A quarter of the widths, with which building and matching take no time.
_NARROW = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "16"]
_NARROW_FPN = ["MODEL.FPN.OUT_CHANNELS", "32"]
_NARROW_HEADS = [*_NARROW_FPN, "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "16"]


class Records:
    """Results in a json, which is written again with each of them: a part that is cut keeps those that it had."""

    def __init__(self, path: str) -> None:
        self._path, self.rows = path, []  # type: ignore[var-annotated]

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        save_json(self._path, self.rows)

    def measure(self, function: Callable[[], Dict[str, Any]], **about: Any) -> None:
        """Add what a function returns, or why it failed; the next one runs all the same."""
        try:
            self.add(**about, **function())
        except Exception as e:  # a full memory, a missing compiler, an option that a card lacks
            self.add(**about, error=f"{type(e).__name__}: {first_line(e)}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def save_json(path: str, content: Any) -> None:
    """Write a json that is whole at any moment."""
    Path(path).resolve().parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1).encode("utf-8")
    write_atomically(os.path.abspath(path), lambda file: file.write(text))


def config_of(name: str, opts: List[str], dry_run: bool) -> CfgNode:
    """Read a config; for a dry run teacher, FPN and heads are narrow."""
    narrow = [*_NARROW_HEADS, "MODEL.MGD.TEACHER.OPTS", str([*_NARROW, *_NARROW_FPN])]
    cfg = read_config(name, [*opts, *(narrow if dry_run else [])])
    use_available_device(cfg)
    return cfg


def rounds(
    functions: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, at_most: int = 20
) -> Dict[str, List[float]]:
    """Time functions in turn, in as many rounds as fit into some seconds, two at least; 0 seconds: one round."""
    trial = interleaved(functions, repeats=1, warmup=int(seconds > 0), device=device)
    if seconds == 0:
        return trial
    one = sum(times[0] for times in trial.values())
    repeats = min(max(int(seconds / one), 2), at_most)
    return interleaved(functions, repeats=repeats, warmup=0, device=device)


def spreads(times: Mapping[str, List[float]]) -> Dict[str, Dict[str, float]]:
    """Return median and quartiles of each function's times, in seconds."""
    return {name: asdict(Spread.of(of)) for name, of in times.items()}


def ratio_of(times: Mapping[str, List[float]], over: str, *under: str) -> Optional[Dict[str, float]]:
    """Return median and quartiles of a ratio; None if a function is not there."""
    if over not in times or not set(under) <= set(times):
        return None
    spread = ratio(times[over], *(times[name] for name in under))
    return spread and asdict(spread)


def host_waits(function: Callable[[], Any], device: torch.device) -> Optional[int]:
    """Count how often the host waits for the GPU while a function runs; None without a GPU."""
    if device.type != "cuda":
        return None
    function()  # what waits only the first time
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
