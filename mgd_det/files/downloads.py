"""Downloads of Detectron2's PathManager: they stay in their cache, and are verified where their name carries a hash."""

import hashlib
import os
import re
from typing import Optional

from detectron2.utils.file_io import PathManager

from mgd_det.errors import UserError

# torch.hub's convention: resnet18-f37072fd.pth begins its SHA-256 with these digits.
_HASH = re.compile(r"-([0-9a-f]{8,64})\.[^.]+$")


def local_copy(path: str) -> str:
    """The file on this machine that a path or URL of Detectron2's PathManager stands for, downloaded if need be.

    Args:
        path: without a query ("?...").

    Raises:
        UserError: there is no such file, the URL leads out of the cache, or the file is not the one that its name says.
        OSError: the download failed.
    """
    if "://" not in path:
        return path
    check_url(path)
    try:
        local = PathManager.get_local_path(path)
    except (KeyError, RuntimeError) as e:  # of "catalog://"
        raise UserError(f"Detectron2's catalogue has no such entry ({e})") from e
    if not os.path.isfile(local):
        raise UserError("there is no such file")
    verify_hash(local)
    return local


def check_url(path: str) -> None:
    """Raises UserError for a URL that leads upwards: the cache is laid out as URLs are, and would be left."""
    scheme, is_url, rest = path.partition("://")
    if not is_url:
        return
    if scheme in ("http", "https", "ftp"):
        rest = rest.partition("/")[2]  # without the host
    if os.path.normpath(rest.lstrip("/")).split(os.sep)[0] == "..":
        raise UserError(f'{path} has more ".." than folders: its download would leave the cache')


def hash_prefix(name: str) -> Optional[str]:
    """The first digits of the SHA-256 that a file's name carries, None where it carries none."""
    match = _HASH.search(os.path.basename(name))
    return match.group(1) if match else None


def verify_hash(path: str) -> None:
    """Raises UserError where the name of the downloaded file carries a hash, and the file has another one."""
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
            f"its name says: the file is damaged or another one. Delete {path} to download it anew"
        )
