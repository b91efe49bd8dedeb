"""This project's configs by name: yaml files and LazyConfigs (.py)."""

from pathlib import Path
from typing import List, Union

import detectron2.model_zoo
import yaml
from detectron2.config import CfgNode, LazyConfig
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from mgd_det.config import merge_config
from mgd_det.errors import UserError, did_you_mean

# In a checkout beside the package, in an installation inside it.
_CONFIG_ROOTS = [Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs"]
_SUFFIXES = (".yaml", ".py")


def get_config_file(name: str) -> str:
    """Return the path of one of this project's configs, such as "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml".

    Raises:
        UserError: there is no config of this name.
    """
    for root in _CONFIG_ROOTS:
        if (root / name).is_file():
            return str(root / name)
    raise UserError(f"mgd_det has no config {name!r}.{did_you_mean(name, config_names())}")


def get_config(name: str) -> Union[CfgNode, DictConfig]:
    """Read one of this project's configs by its name.

    Returns:
        For a yaml file a CfgNode with this project's keys, for a .py file a LazyConfig.

    Raises:
        UserError: there is no config of this name.
    """
    path = get_config_file(name)
    return LazyConfig.load(path) if path.endswith(".py") else merge_config(path, [], name)


def config_names() -> List[str]:
    """Return the names of this project's configs, and of the parts that they share ("Base-...", "common/...")."""
    return sorted({name for root in _CONFIG_ROOTS for name in _names_below(root)})


def find_config_file(name: str, key: str = "--config-file", lazy: bool = False) -> str:
    """Return the path of a config.

    Args:
        name: a path, or a name in this project's or in Detectron2's model zoo.
        key: the flag or key that the user set to ``name``, for the error.
        lazy: whether to find a LazyConfig instead of a yaml config.

    Raises:
        UserError: there is no such config, or it is a LazyConfig and ``lazy`` is false.
    """
    if not lazy and name.endswith(".py"):
        raise UserError(
            f"{key} {name!r} is a LazyConfig: use it with tools/lazyconfig_train_net.py, or give a yaml config"
        )
    if PathManager.isfile(name):
        return name
    if name in config_names():
        return get_config_file(name)
    if is_detectron2_zoo_config(name):
        return detectron2.model_zoo.get_config_file(name)
    detectron2_names = _names_below(Path(detectron2.model_zoo.__file__).parent / "configs")
    candidates = [n for n in config_names() + detectron2_names if n.endswith(".py") == lazy]
    raise UserError(
        f"{key} {name!r} is neither a file nor a config of Detectron2's model zoo or of mgd_det."
        + did_you_mean(name, candidates)
    )


def is_lazy_config(path: str) -> bool:
    """Return whether a config file is a LazyConfig: Python, or yaml with "model" where Detectron2's has "MODEL".

    It calls nothing that the file names. A file that cannot be read is left to the reader of yaml configs.
    """
    if path.endswith(".py"):
        return True
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, Loader=yaml.BaseLoader)  # makes strings, lists and dicts only
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(content, dict) and "model" in content


def is_detectron2_zoo_config(name: str) -> bool:
    """Return whether ``name`` is a config of Detectron2's model zoo and not of this project."""
    if name in config_names():
        return False
    try:
        detectron2.model_zoo.get_config_file(name)
    except RuntimeError:
        return False
    return True


def _names_below(root: Path) -> List[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix in _SUFFIXES)
