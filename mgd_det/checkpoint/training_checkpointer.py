"""Checkpoints of a training that outlive a kill, a full disk and a damaged file."""

import logging
import os
import shutil
from typing import Any, Dict, Iterator, Optional

import torch
from detectron2.utils import comm

from mgd_det.checkpoint.finite import non_finite_tensors
from mgd_det.checkpoint.resumable import LAST_CHECKPOINT, Resumable, find_resumable
from mgd_det.checkpoint.weights import WeightsCheckpointer
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import remove_partial_files, write_atomically

logger = logging.getLogger(__name__)


class CheckpointWriteError(UserError):
    """A checkpoint that could not be written, for want of disk space say; those before it are as they were."""


class TrainingCheckpointer(WeightsCheckpointer):
    """Writes a training's checkpoints whole or not at all, and resumes from the newest that reads.

    A checkpoint gets its name when all of it is on the disk, and "last_checkpoint" names it after that, so that a
    write which fails or is killed leaves the one before in force. This holds for folders of the file system;
    "s3://" and the like are left to Detectron2's path manager.

    Attributes:
        resumed_from: the checkpoint that :meth:`resume_or_load` resumed from, the same on every rank; "" for none.
    """

    resumed_from: str = ""

    # ------------------------------------------------------------------ save
    def save(self, name: str, **kwargs: Any) -> None:
        """Writes ``<name>.pth``, on rank 0, and makes it the last checkpoint.

        Args:
            name: a file name without its end.
            kwargs: further entries: plain containers of tensors, numbers and strings.

        Raises:
            CheckpointWriteError: the disk is full or fails.
            UserError: a tensor of the model, the optimizer or another entry is not finite; nothing is written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        state = {"model": self.model.state_dict()}
        state.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        state.update(kwargs)
        self._check_finite(path, state)
        if self._is_remote:
            super().save(name, **kwargs)
            return
        logger.info(f"Saving checkpoint to {path}")
        try:
            write_atomically(path, lambda f: torch.save(state, f))
            self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as e:  # torch's writer may hide the one in the other
            reason = next((cause for cause in _chain(e) if isinstance(cause, OSError)), e)
            raise CheckpointWriteError(
                f"checkpoint {path} cannot be written: {reason}. {self._free_space()} {self.last_saved()} Make room "
                "and go on with --resume; SOLVER.CHECKPOINTS_KEPT (train.checkpointer.max_to_keep) limits their number."
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._is_remote:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_atomically(
            os.path.join(self.save_dir, LAST_CHECKPOINT), lambda f: f.write(last_filename_basename.encode())
        )

    def last_saved(self) -> str:
        """Which checkpoint is the last, a sentence for messages."""
        saved = self.get_checkpoint_file() if self.has_checkpoint() else ""
        return f"The last checkpoint is {saved}." if saved else "There is no checkpoint yet."

    def _check_finite(self, path: str, state: Dict[str, Any]) -> None:
        names = non_finite_tensors(state)
        if names:
            more = f" ({len(names) - 1} more tensors have, too)" if len(names) > 1 else ""
            raise UserError(
                f"checkpoint {path} is not written, for {names[0]} has infinite or NaN values{more}. "
                f"{self.last_saved()} Lower the learning rate and go on from the last checkpoint that is good."
            )

    def _free_space(self) -> str:
        try:
            return f"{self.save_dir} has {shutil.disk_usage(self.save_dir).free / 2**20:.0f} MiB of free space."
        except OSError as e:
            return f"{self.save_dir} cannot be read either: {e}."

    # ------------------------------------------------------------------ resume
    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Goes on from the last checkpoint of the folder, on every rank, or loads the weights ``path``.

        Where the last checkpoint is damaged or not there, the newest older one that reads takes its place
        (:func:`find_resumable`), with a warning; nothing is deleted, and "last_checkpoint" names it from then on.

        Args:
            path: weights to begin with where ``resume`` is false or the folder has no checkpoint.

        Returns:
            What the file holds besides the model and the checkpointables.

        Raises:
            UserError: there are checkpoints, but none reads; or the one that does is of another network or config.
        """
        self.resumed_from = ""
        if self._is_remote:
            self.resumed_from = self.get_checkpoint_file() if resume and self.has_checkpoint() else ""
            return super().resume_or_load(path, resume=resume)
        if self.save_dir and self.save_to_disk:
            for name in remove_partial_files(self.save_dir):
                logger.warning(f"Removed {os.path.join(self.save_dir, name)}: a write that was cut short.")
        found = self._agreed_resumable() if resume and self.save_dir else Resumable("")
        if not found.name:
            return self.load(path, checkpointables=[])
        checkpoint = os.path.join(self.save_dir, found.name)
        if found.problems:
            logger.warning(f"{'; '.join(found.problems)}. Falling back on {checkpoint}; nothing was deleted.")
        rest = self._resume(checkpoint)
        if found.problems and self.save_to_disk:
            self.tag_last_checkpoint(found.name)
        self.resumed_from = checkpoint
        return rest

    def _agreed_resumable(self) -> Resumable:
        """What rank 0 found: the others may see another state of a shared folder."""
        found, error = Resumable(""), ""
        if comm.is_main_process():
            try:
                found = find_resumable(self.save_dir, self._torch_load, ["model", *self.checkpointables])
            except (UserError, OSError) as e:
                error = str(e)
        found, error = comm.all_gather((found, error))[0]
        if error:
            raise UserError(error)
        if found.name:
            path = os.path.join(self.save_dir, found.name)
            blind = [rank for rank, sees in enumerate(comm.all_gather(os.path.isfile(path))) if not sees]
            if blind:
                raise UserError(
                    f"--resume: rank 0 resumes from {path}, which rank {', '.join(map(str, blind))} cannot see: give "
                    "an OUTPUT_DIR (train.output_dir) on a file system that all machines share"
                )
        return found

    def _resume(self, path: str) -> Dict[str, Any]:
        advice = "Resume with the config of that training, or train without --resume in another OUTPUT_DIR."
        try:
            rest = self.load(path)
        except (ValueError, KeyError, TypeError) as e:  # of an optimizer, a scheduler or a hook
            raise UserError(f"checkpoint {path} does not fit this training: {type(e).__name__}: {e}. {advice}") from e
        if self.unset_keys:
            raise UserError(
                f"checkpoint {path} is of another network: it does not fit {len(self.unset_keys)} of the model's "
                f"tensors, such as {self.unset_keys[0]}. {advice}"
            )
        return rest

    @property
    def _is_remote(self) -> bool:
        return "://" in self.save_dir


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
