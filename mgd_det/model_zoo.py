"""The configs that come with this project, found by name as Detectron2's are: yaml files and LazyConfigs (.py)."""

import difflib
from pathlib import Path
from typing import List, Union

import detectron2.model_zoo
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from mgd_det.config import merge_config
from mgd_det.errors import UserError

# Beside the package in a checkout, inside it where it was installed.
_CONFIG_ROOTS = [Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs"]
_SUFFIXES = (".yaml", ".py")


def get_config_file(name: str) -> str:
    """Path of one of this project's configs, such as "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml".

    Raises UserError for a name that there is not.
    """
    for root in _CONFIG_ROOTS:
        if (root / name).is_file():
            return str(root / name)
    raise UserError(f"mgd_det has no config {name!r}{_suggestion(name, config_names())}")


def get_config(name: str) -> Union[CfgNode, DictConfig]:
    """One of this project's configs: a CfgNode with this project's keys of a yaml file, a LazyConfig of a .py file.

    Raises UserError for a name that there is not.
    """
    path = get_config_file(name)
    return LazyConfig.load(path) if path.endswith(".py") else merge_config(path, [], name)


def config_names() -> List[str]:
    """Names of all configs that come with this project, with the parts that they share ("Base-...", "common/...")."""
    return sorted({name for root in _CONFIG_ROOTS for name in _names_below(root)})


def find_config_file(name: str, key: str = "--config-file", lazy: bool = False) -> str:
    """Path of a config: ``name`` is a path, or a name in this project's or in Detectron2's model zoo.

    Args:
        key: what the user gave the name by, for the error.
        lazy: a LazyConfig is wanted; otherwise a yaml config.

    Raises UserError where it is none of them, or a LazyConfig that is not wanted.
    """
    if not lazy and name.endswith(".py"):
        raise UserError(
            f"{key} {name!r} is a LazyConfig: tools/lazyconfig_train_net.py takes it, here it must be a yaml config"
        )
    if PathManager.isfile(name):
        return name
    if name in config_names():
        return get_config_file(name)
    if is_detectron2_zoo_config(name):
        return detectron2.model_zoo.get_config_file(name)
    candidates = [n for n in config_names() + _detectron2_names() if n.endswith(".py") == lazy]
    raise UserError(
        f"{key} {name!r} is neither a file nor a config of Detectron2's model zoo or of mgd_det"
        + _suggestion(name, candidates)
    )


def is_detectron2_zoo_config(name: str) -> bool:
    """Whether ``name`` stands for a config of Detectron2's model zoo; one of this project's hides it."""
    if name in config_names():
        return False
    try:
        detectron2.model_zoo.get_config_file(name)
    except RuntimeError:
        return False
    return True


def _detectron2_names() -> List[str]:
    return _names_below(Path(detectron2.model_zoo.__file__).parent / "configs")


def _names_below(root: Path) -> List[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in _SUFFIXES)


def _suggestion(name: str, candidates: List[str]) -> str:
    near = difflib.get_close_matches(name, candidates, n=3, cutoff=0.5)
    return f". Did you mean {' or '.join(near)}?" if near else "."
