"""The choice of the checkpoint that a training resumes from."""

import os
import re
import zipfile
from dataclasses import dataclass, field
from typing import Any, Callable, List, Mapping, Optional, Sequence

from mgd_det.errors import UserError, first_line

LAST_CHECKPOINT = "last_checkpoint"  # the file that names the checkpoint to resume from
FINAL_CHECKPOINT = "model_final.pth"
_PERIODIC = re.compile(r"model_(\d{7,})\.pth")


@dataclass(frozen=True)
class Resumable:
    """What :func:`find_resumable` found.

    Attributes:
        name: file name of the checkpoint to resume from; "" if the folder has none.
        problems: "<file>: <reason>" for each checkpoint that was skipped.
    """

    name: str
    problems: List[str] = field(default_factory=list)


def find_resumable(folder: str, read: Callable[[str], Any], required: Sequence[str]) -> Resumable:
    """Return the checkpoint that "last_checkpoint" names or, if that one is damaged, the newest older one.

    The newest has the most iterations, by its file name or, for "model_final.pth", by its entry "iteration". Files
    with other names are not considered. Checkpoints newer than the damaged one are not considered either: they may
    belong to another training.

    Args:
        folder: a local folder.
        read: reads a file. It raises UserError for a file that must not be skipped, and any other error for a damaged
            one.
        required: entries that a checkpoint needs.

    Raises:
        UserError: there are checkpoints but none to resume from, or "last_checkpoint" holds a path.
    """
    problems: List[str] = []

    def content_of(name: str, remark: str = "") -> Optional[Mapping[str, Any]]:
        try:
            return _read_whole(os.path.join(folder, name), read, required)
        except _DamagedError as e:
            problems.append(f"{name}: {e}{remark}")
            return None

    names = os.listdir(folder) if os.path.isdir(folder) else []
    iterations = {name: periodic_iteration(name) for name in names}
    named = named_checkpoint(folder)
    if named is None and FINAL_CHECKPOINT not in names and not any(i is not None for i in iterations.values()):
        return Resumable("")
    if not named:
        problems.append(f"{LAST_CHECKPOINT}: {'there is no such file' if named is None else 'it names no checkpoint'}")
    elif content_of(named, f" (it is what {LAST_CHECKPOINT} names)"):
        return Resumable(named)
    if FINAL_CHECKPOINT in names and named != FINAL_CHECKPOINT:
        iterations[FINAL_CHECKPOINT] = (content_of(FINAL_CHECKPOINT) or {}).get("iteration")
    limit = periodic_iteration(named or "")
    older = [(i, name) for name, i in iterations.items() if i is not None and (limit is None or i < limit)]
    for _, name in sorted(older, reverse=True):
        if content_of(name):
            return Resumable(name, problems)
    raise UserError(
        f"--resume: no checkpoint in {folder} can be resumed from. {'; '.join(problems)}. Nothing was changed. Write "
        f"the name of a good checkpoint to {os.path.join(folder, LAST_CHECKPOINT)}, or train without --resume."
    )


def named_checkpoint(folder: str) -> Optional[str]:
    """Return the file name in "last_checkpoint" of a local folder; "" if it is empty, None if there is no such file.

    Raises:
        UserError: "last_checkpoint" holds a path. A checkpoint is never read from another folder.
    """
    path = os.path.join(folder, LAST_CHECKPOINT)
    try:
        with open(path, "rb") as f:
            # A power cut may leave zeros in place of the text.
            name = f.read().decode(errors="replace").replace("\0", "").strip()
    except FileNotFoundError:
        return None
    if name != os.path.basename(name) or name in (os.curdir, os.pardir):
        raise UserError(
            f"{path} holds {name!r}; it must be the name of a file in the same folder, such as {FINAL_CHECKPOINT}"
        )
    return name


def periodic_iteration(name: str) -> Optional[int]:
    """Return the last iteration of a periodic checkpoint: 4999 for "model_0004999.pth"; None for other names."""
    match = _PERIODIC.fullmatch(name)
    return int(match.group(1)) if match else None


class _DamagedError(Exception):
    """The reason why a training cannot resume from a file."""


def _read_whole(path: str, read: Callable[[str], Any], required: Sequence[str]) -> Mapping[str, Any]:
    if not os.path.isfile(path):
        raise _DamagedError("there is no such file")
    if not zipfile.is_zipfile(path):
        raise _DamagedError("cannot be read: it is empty, cut short or not a file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()  # torch writes checksums, but does not check them
        if torn is not None:
            raise _DamagedError(f"cannot be read: the checksum of its part {torn} is wrong")
        content = read(path)
    except _DamagedError:
        raise
    except UserError as e:
        raise UserError(f"checkpoint {path}: {e}") from e
    except Exception as e:  # zip, pickle and torch raise many kinds
        raise _DamagedError(f"cannot be read: {type(e).__name__}: {first_line(e)}") from e
    missing = [key for key in required if not isinstance(content, Mapping) or key not in content]
    if missing:
        raise _DamagedError(f"it was not saved by a training: it has no entry {', '.join(missing)}")
    return content
