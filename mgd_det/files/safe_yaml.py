"""A reader of Detectron2's yaml configs that runs no code; Detectron2's own reader can."""

import logging
import os
from pathlib import Path
from typing import Any, Dict

import detectron2.model_zoo
import yaml
from detectron2.config import CfgNode

from mgd_det.files.downloads import check_url
from mgd_det.files.unsafe_files import refuse_unsafe

# These may run code: Detectron2 writes anchor sizes as Python expressions.
_INSTALLED_CONFIGS = Path(detectron2.model_zoo.__file__).parent / "configs"


def merge_yaml_file(cfg: CfgNode, path: str) -> CfgNode:
    """Merge a yaml file and the files below it (``_BASE_``) into a copy of ``cfg``, as ``cfg.merge_from_file`` does.

    Only the configs that are installed with Detectron2 may have tags that run code.

    Returns:
        The merged copy.

    Raises:
        UserError: another file has such a tag, and unsafe files are not allowed.
        Exception: raised by ``merge_from_file``.
    """
    reader = _SafeReader(cfg)
    reader.__dict__.update(cfg.__dict__)  # its deprecated keys
    reader.merge_from_file(path)
    merged = CfgNode(reader)
    merged.__dict__.update(cfg.__dict__)
    return merged


class _SafeReader(CfgNode):
    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Dict[str, Any]:
        """Read one file of a ``_BASE_`` chain. Each file is checked on its own."""
        check_url(filename)
        if not _is_installed(filename):
            try:
                return super().load_yaml_with_base(filename, allow_unsafe=False)
            except yaml.constructor.ConstructorError as e:
                if "could not determine a constructor for the tag" not in (e.problem or ""):
                    raise
                tag = (e.problem or "").rpartition("tag:yaml.org,2002:")[2].rstrip("'")
                line = e.problem_mark.line + 1 if e.problem_mark else "?"
                refuse_unsafe(filename, f"{filename}, line {line}, has the yaml tag {tag!r}")
        fvcore = logging.getLogger("fvcore.common.config")
        fvcore.disabled = True  # it warns about each of these files, even Detectron2's own
        try:
            return super().load_yaml_with_base(filename, allow_unsafe=True)
        finally:
            fvcore.disabled = False


def _is_installed(filename: str) -> bool:
    if "://" in filename:
        return False
    root = os.path.realpath(_INSTALLED_CONFIGS)
    return os.path.commonpath([root, os.path.realpath(filename)]) == root
