"""LazyConfigs that were saved as yaml, which name what is to be called."""

import re
from typing import Any, Iterator, Tuple

import yaml
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from mgd_det.errors import UserError
from mgd_det.files.downloads import check_url
from mgd_det.files.unsafe_files import refuse_unsafe

# Packages whose classes and functions a yaml file may name: what detectors, data and optimizers are built of.
_PARTS = tuple(f"detectron2.{name}" for name in ("data", "evaluation", "layers", "modeling", "solver"))
_PARTS += tuple(f"mgd_det.{name}" for name in ("data", "distillation", "modeling"))
_PARTS += ("fvcore.common.param_scheduler", "torch.nn", "torch.optim")

# "${a.b[0]}" or "${..a}". What else OmegaConf reads, as "${oc.create:...}", makes nodes later, which nothing checks.
_NODE_REFERENCE = re.compile(r"\$\{[\w.\-\[\]]+\}")


def load_lazy_yaml(path: str) -> DictConfig:
    """What ``LazyConfig.save`` wrote, as ``LazyConfig.load`` reads it, but from a file that need not be trusted.

    Every ``_target_`` must be a class or function of the packages that detectors are built of, and every interpolation
    a plain reference to another node.

    Raises:
        UserError: it has another ``_target_``, tag or interpolation, or files of proposals, and unsafe files are not
            allowed.
        yaml.YAMLError, OSError: it cannot be read.
    """
    check_url(path)
    with PathManager.open(path) as file:
        try:
            content = yaml.load(file, _Loader)
        except yaml.constructor.ConstructorError as e:
            refuse_unsafe(path, f"{path}: {e.problem}")
            return LazyConfig.load(path)
    if not isinstance(content, dict):
        raise UserError("it holds no keys")
    for key, value in _entries(content):
        if key == "_target_" and not _is_part(value):
            refuse_unsafe(path, f"its _target_ {value!r} is no class or function of {', '.join(_PARTS)}")
        if key in ("proposal_file", "proposal_files") and value:
            refuse_unsafe(path, f"it names proposals {value!r}, which Detectron2 reads as pickles")
    for text in _strings(content):
        if "${" in text and not _NODE_REFERENCE.fullmatch(text):
            refuse_unsafe(path, f"its interpolation {text!r} is no plain reference to a node, as ${{a.b}} is")
    return OmegaConf.create(content, flags={"allow_objects": True})


class _Loader(yaml.SafeLoader):
    """The safe loader, for the two kinds of objects that saved LazyConfigs have."""


def _shape_spec(loader: _Loader, node: yaml.MappingNode) -> ShapeSpec:
    fields = {str(key): value for key, value in loader.construct_mapping(node).items()}
    for key, value in fields.items():
        if not isinstance(value, (int, str, type(None))):  # _entries and _strings look at nothing deeper
            raise yaml.constructor.ConstructorError(problem=f"a ShapeSpec has no number as {key}")
    return ShapeSpec(**fields)


def _tuple(loader: _Loader, node: yaml.SequenceNode) -> Tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:python/object:detectron2.layers.shape_spec.ShapeSpec", _shape_spec)
_Loader.add_constructor("tag:yaml.org,2002:python/tuple", _tuple)


def _entries(node: Any) -> Iterator[Tuple[Any, Any]]:
    """Keys and values of nested mappings."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield key, value
            yield from _entries(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _entries(value)


def _strings(node: Any) -> Iterator[str]:
    """All texts in nested containers, the names of keys also."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, ShapeSpec):  # a dataclass, in which OmegaConf interpolates also
        yield from _strings(list(vars(node).values()))
    elif isinstance(node, dict):
        for item in node.items():
            yield from _strings(item)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from _strings(value)


def _is_part(target: Any) -> bool:
    # Where the object itself comes from counts: a module's name leads to all that it imports.
    if not isinstance(target, str) or not target.startswith(_PARTS):
        return False
    try:
        found = locate(target)
    except Exception:  # of the import
        return False
    return callable(found) and f"{getattr(found, '__module__', '')}.".startswith(tuple(f"{part}." for part in _PARTS))
