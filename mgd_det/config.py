"""Configs with the keys of this project: from a yaml file and overrides, and back to the plain student's."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, Sequence

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from mgd_det.config_keys import add_mgd_config
from mgd_det.config_keys.distillation import add_distillation_keys
from mgd_det.errors import UserError
from mgd_det.files.safe_yaml import merge_yaml_file
from mgd_det.files.student_files import weights_beside

# MODEL.BACKBONE.NAME of a config with distillation.
MGD_BACKBONE = "build_mgd_backbone"
# Losses for which the teacher's heads run: nodes of MODEL.MGD in lower case, and arguments of distilled_backbone().
HEAD_LOSSES = ("logits", "boxes", "masks", "cross_kd")


@dataclass(frozen=True)
class _Extension:
    """A detector of a project: see :func:`register_detector`."""

    kind: str
    node: str
    add_keys: Callable[[CN], None]


_extensions: Dict[str, _Extension] = {}  # by MODEL.META_ARCHITECTURE


def register_detector(architecture: str, *, kind: str, node: str, add_keys: Callable[[CN], None]) -> None:
    """Make a project's detector known to every yaml config that is read from now on, of teachers too.

    Args:
        architecture: its name in Detectron2's META_ARCH_REGISTRY.
        kind: the detector of Detectron2 that it extends, whose keys it reads: "RetinaNet", "FCOS" or "GeneralizedRCNN".
        node: the child of cfg.MODEL with its own keys.
        add_keys: adds these keys to a config.
    """
    _extensions[architecture] = _Extension(kind, node, add_keys)


def merge_config(path: str, opts: Sequence[Any], name: str = "") -> CN:
    """Merge a yaml file and overrides into the defaults of Detectron2 and this project.

    Args:
        path: the yaml file, read by :mod:`mgd_det.files.safe_yaml`; "" for none.
        opts: KEY, VALUE, KEY, VALUE...
        name: what the user calls the file, for the error.

    Raises:
        UserError: the file or an override does not fit the config.
    """
    cfg = get_cfg()
    add_mgd_config(cfg)
    for extension in _extensions.values():
        extension.add_keys(cfg)
    overrides = f" with {list(opts)}" if opts else ""
    with _user_errors(f"config {name or path or '(defaults)'}{overrides}"):
        if path:
            cfg = merge_yaml_file(cfg, path)
            cfg.MODEL.WEIGHTS = weights_beside(path, cfg.MODEL.WEIGHTS)
        _merge_overrides(cfg, opts)
    return cfg


def override(cfg: CN, opts: Sequence[Any]) -> None:
    """Merge overrides KEY, VALUE, KEY, VALUE... into a config, which must not be frozen.

    Raises:
        UserError: one does not fit the config.
    """
    with _user_errors(f"overrides {list(opts)}"):
        _merge_overrides(cfg, opts)


def _merge_overrides(cfg: CN, opts: Sequence[Any]) -> None:
    if any(not isinstance(key, str) for key in opts[::2]):
        raise UserError("overrides are a list KEY, VALUE, KEY, VALUE...")
    cfg.merge_from_list(list(opts))
    defaults = CN({"MODEL": CN()})
    add_distillation_keys(defaults)
    _check_types(cfg.MODEL.MGD, defaults.MODEL.MGD, "MODEL.MGD")


@contextmanager
def _user_errors(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, AssertionError, OSError, yaml.YAMLError, UserError) as e:
        raise UserError(f"{what}: {e}") from e


def _check_types(node: CN, defaults: CN, path: str) -> None:
    """Check values that Detectron2 merges without a check: None, and the parts of lists.

    A list that is empty by default holds strings, except for overrides (OPTS), which hold anything.

    Raises:
        UserError: a value has another type than its default.
    """
    for key, default in defaults.items():
        name, value = f"{path}.{key}", node[key]
        if isinstance(default, CN) and isinstance(value, CN):
            _check_types(value, default, name)
        elif value is None or isinstance(default, CN):
            raise UserError(f"{name} is {value!r}; its default is {default!r}: give a value of that type")
        elif isinstance(default, list) and key != "OPTS":
            kinds = {float: (int, float), int: (int,), str: (str,)}[type(default[0]) if default else str]
            for part in value:
                if type(part) not in kinds:
                    raise UserError(f"{name} is {value!r}; {part!r} is not of type {kinds[-1].__name__}")


def without_distillation(cfg: CN) -> CN:
    """Return a copy of ``cfg`` that builds the plain student."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.BACKBONE.NAME == MGD_BACKBONE:
        cfg.MODEL.BACKBONE.NAME = cfg.MODEL.MGD.STUDENT_BACKBONE
    return cfg


def head_loss_keys(cfg: CN) -> List[str]:
    """Return the keys of the weights that are not 0 of the losses for which the teacher's heads run."""
    weights = {f"MODEL.MGD.{name.upper()}.WEIGHT": cfg.MODEL.MGD[name.upper()].WEIGHT for name in HEAD_LOSSES}
    return [key for key, weight in weights.items() if weight != 0]


def plain_student_config(cfg: CN) -> CN:
    """Return a copy of ``cfg`` that builds the plain student, without this project's keys that the student ignores.

    If the student is one of Detectron2's own detectors, only keys of Detectron2 are left.
    """
    plain = without_distillation(cfg)
    backbone = plain.MODEL.BACKBONE.NAME
    for node, is_read in (
        ("MGD", False),
        ("MOBILENETS", "mobilenet" in backbone),
        ("SHUFFLENETS", "shufflenet" in backbone),
        ("TIMM", "timm" in backbone),
        ("FCOS", detector_kind(plain) == "FCOS"),
        *((other.node, name == plain.MODEL.META_ARCHITECTURE) for name, other in _extensions.items()),
    ):
        if not is_read:
            plain.MODEL.pop(node, None)  # a config that was read before a detector was registered lacks its node
    for key in ("COCO_FOLDER", "BROKEN_INPUT", "KEYPOINT_NAMES", "KEYPOINT_FLIP_PAIRS"):
        plain.DATASETS.pop(key)
    for key in ("CHECKPOINTS_KEPT", "ACCUMULATE", "NON_FINITE", "EMA"):
        plain.SOLVER.pop(key)
    for key in ("FAST_EVAL", "BEST"):
        plain.TEST.pop(key)
    for key in ("REPORT", "WANDB"):
        plain.pop(key)
    return plain


def detector_kind(cfg: CN) -> str:
    """Return the detector of Detectron2 that MODEL.META_ARCHITECTURE is or extends.

    That is "RetinaNet" of a "SeparableRetinaNet" (docs/light.md), and what a project registered.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    return _extensions[name].kind if name in _extensions else name.removeprefix("Separable")


def class_head(cfg: CN) -> CN:
    """Return the node whose NUM_CLASSES the detector of ``cfg`` reads."""
    nodes = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    return cfg.MODEL[nodes.get(detector_kind(cfg), "ROI_HEADS")]
