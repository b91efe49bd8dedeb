"""Studies of detectors that another project brings along."""

import importlib
import sys
from pathlib import Path

from mgd_det.errors import UserError


def import_project(folder: str) -> None:
    """Import the package of a project, which registers its detectors and config keys.

    Args:
        folder: the project's, such as "projects/EmbedMask". Its package has the folder's name in small letters.

    Raises:
        UserError: there is no such package.
    """
    path = Path(folder).resolve()
    name = path.name.lower()
    if not (path / name / "__init__.py").is_file():
        raise UserError(
            f"project {folder!r} has no package {name}: give a folder such as projects/EmbedMask, and run the program "
            "in the folder of the checkout"
        )
    if str(path) not in sys.path:
        sys.path.append(str(path))
    importlib.import_module(name)
