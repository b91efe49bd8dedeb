"""Downloads by Detectron2's PathManager: kept in its cache, and verified if their name contains a hash."""

import hashlib
import os
import re
from typing import Optional

from detectron2.utils.file_io import PathManager

from mgd_det.errors import UserError

# torch.hub's convention: the SHA-256 of resnet18-f37072fd.pth begins with these digits.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")


def local_copy(path: str) -> str:
    """Return the local file for a path or URL of Detectron2's PathManager. Download it if necessary.

    Args:
        path: without a query ("?..."). A path that is not a URL is returned as it is.

    Raises:
        UserError: there is no file at the URL, the URL leads out of the cache, or the download does not have the hash
            in its name.
        OSError: the download failed.
    """
    if "://" not in path:
        return path
    check_url(path)
    try:
        local = PathManager.get_local_path(path)
    except (KeyError, RuntimeError) as e:  # of "catalog://"
        raise UserError(f"Detectron2's catalog has no such entry ({e})") from e
    if not os.path.isfile(local):
        raise UserError("there is no such file")
    verify_hash(local)
    return local


def check_url(path: str) -> None:
    """Refuse a URL that leads out of the cache, which has the folders of the URL. Other paths pass.

    Raises:
        UserError: the URL has more ".." than folders.
    """
    scheme, _, rest = path.partition("://")
    if scheme in ("http", "https", "ftp"):
        rest = rest.partition("/")[2]  # without the host
    if os.path.normpath(rest.lstrip("/")).split(os.sep)[0] == "..":
        raise UserError(f'{path} has more ".." than folders: its download would be written outside the cache')


def hash_prefix(name: str) -> Optional[str]:
    """Return the first digits of the SHA-256 in a file's name, or None if there are none."""
    match = _HASH.search(os.path.basename(name))
    return match.group(1) if match else None


def verify_hash(path: str) -> None:
    """Check a downloaded file against the hash in its name, if there is one.

    Raises:
        UserError: the file does not have that hash.
    """
    expected = hash_prefix(path)
    if expected is None:
        return
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        raise UserError(
            f"the SHA-256 of its download begins with {digest.hexdigest()[: len(expected)]}, not with {expected} as "
            f"its name says: the file is damaged or another one. Delete {path} to download it again"
        )
