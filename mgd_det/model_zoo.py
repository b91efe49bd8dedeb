"""The configs that come with this project, found by name as Detectron2's are."""

import difflib
from pathlib import Path
from typing import List

import detectron2.model_zoo
from detectron2.utils.file_io import PathManager

from mgd_det.errors import UserError

# Beside the package in a checkout, inside it where it was installed.
_CONFIG_ROOTS = [Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs"]


def get_config_file(name: str) -> str:
    """Path of one of this project's configs, such as "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml".

    Raises UserError for a name that there is not.
    """
    for root in _CONFIG_ROOTS:
        if (root / name).is_file():
            return str(root / name)
    raise UserError(f"mgd_det has no config {name!r}{_suggestion(name, config_names())}")


def config_names() -> List[str]:
    """Names of all configs that come with this project."""
    names = (p.relative_to(root).as_posix() for root in _CONFIG_ROOTS for p in root.rglob("*.yaml"))
    return sorted(set(names))


def find_config_file(name: str, key: str = "--config-file") -> str:
    """Path of a config: ``name`` is a path, or a name in this project's or in Detectron2's model zoo.

    Args:
        key: what the user gave the name by, for the error.

    Raises UserError where it is none of them.
    """
    if PathManager.isfile(name):
        return name
    if name in config_names():
        return get_config_file(name)
    if is_detectron2_zoo_config(name):
        return detectron2.model_zoo.get_config_file(name)
    candidates = config_names() + _detectron2_zoo_names()
    raise UserError(
        f"{key} {name!r} is neither a file nor a config of Detectron2's model zoo or of mgd_det"
        + _suggestion(name, candidates)
    )


def is_detectron2_zoo_config(name: str) -> bool:
    try:
        detectron2.model_zoo.get_config_file(name)
    except RuntimeError:
        return False
    return True


def _detectron2_zoo_names() -> List[str]:
    root = Path(detectron2.model_zoo.__file__).parent / "configs"
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*.yaml"))


def _suggestion(name: str, candidates: List[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    return f". Did you mean {' or '.join(near)}?" if near else "."
