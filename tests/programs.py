"""Programs of this repository in the tests' own process."""

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Callable

import coco_data
from detectron2.utils.logger import setup_logger

ROOT = Path(__file__).parents[1]


def load(path: str) -> ModuleType:
    """The module of a file, whose path is relative to the repository's root."""
    spec = importlib.util.spec_from_file_location(Path(path).stem + "_program", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def exit_status(main: Callable, *argv) -> int:
    """Runs a program's main function, and takes out what a new process would not find.

    That is: data sets of its flags, and loggers' handlers on streams that pytest has captured.
    """
    try:
        return main([str(x) for x in argv]) or 0
    except SystemExit as e:
        return e.code
    finally:
        coco_data.forget("coco_folder_")
        for name in ("detectron2", "fvcore", "mgd_det"):
            logging.getLogger(name).handlers.clear()
        setup_logger.cache_clear()
