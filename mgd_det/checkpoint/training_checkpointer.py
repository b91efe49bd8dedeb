"""Checkpoints of a training that survive a kill, a full disk and a damaged file."""

import logging
import os
import shutil
from datetime import timedelta
from typing import Any, Callable, Dict, Iterator, Mapping, Optional

import torch
import torch.distributed as dist
from detectron2.utils import comm

from mgd_det.checkpoint.finite import non_finite_tensors
from mgd_det.checkpoint.resumable import LAST_CHECKPOINT, Resumable, find_resumable
from mgd_det.checkpoint.weights import WeightsCheckpointer
from mgd_det.distributed.ranks import on_main_process
from mgd_det.errors import UserError, first_line
from mgd_det.files.atomic_files import remove_partial_files, write_atomically

logger = logging.getLogger(__name__)

# How long a save waits until the other ranks call it.
RANKS_TIMEOUT = timedelta(minutes=10)

# What completes the states that a save is collecting, by name; None outside of a save.
_completions: Optional[Dict[str, Callable[[], None]]] = None


def complete_over_ranks(name: str, complete: Callable[[], None]) -> bool:
    """Add what other ranks have to a ``state_dict()`` that a checkpoint is collecting.

    ``complete`` may be collective. It runs when every rank has collected all its states, in the order of the names, so
    the ranks may collect in different orders.

    Args:
        name: the same on every rank, and unique in a training.
        complete: changes the state that ``state_dict()`` returned.

    Returns:
        Whether ``complete`` will run. It runs only in :meth:`TrainingCheckpointer.save`; Detectron2's own checkpointer
        saves on rank 0 alone.
    """
    if _completions is None:
        return False
    assert name not in _completions, name
    _completions[name] = complete
    return True


class CheckpointWriteError(UserError):
    """A checkpoint cannot be written, for example because the disk is full. Earlier ones are unchanged."""


class TrainingCheckpointer(WeightsCheckpointer):
    """Write a training's checkpoints whole or not at all, and resume from the newest that can be read.

    A checkpoint gets its name when all of it is on the disk, and only then does "last_checkpoint" name it. If a write
    fails or is killed, the previous checkpoint stays the last. This holds for folders of the file system; "s3://" and
    the like are left to Detectron2's path manager.

    Saving and resuming are collective: call them on every rank.

    Attributes:
        resumed_from: the checkpoint that :meth:`resume_or_load` resumed from; "" for none. Every rank has the same.
    """

    resumed_from: str = ""

    # ------------------------------------------------------------------ save
    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` on rank 0 and make it the last checkpoint. Collective.

        Every rank collects the state of the training (see :func:`complete_over_ranks`) and waits until rank 0 has
        written it.

        Args:
            name: a file name without its extension.
            kwargs: further entries: plain containers of tensors, numbers and strings.

        Raises:
            CheckpointWriteError: the disk is full or fails. Every rank raises it.
            UserError: a tensor is not finite, or a rank did not call this method. Nothing is written.
        """
        if not self.save_dir:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        _wait_for_all_ranks(path)
        state = {**self._collect(), **kwargs}
        on_main_process(lambda: self._write(path, state, is_last=True) if self.save_to_disk else None)

    def save_weights(self, name: str, weights: Optional[Mapping[str, torch.Tensor]] = None, **kwargs: Any) -> None:
        """Write weights alone as ``<name>.pth`` on rank 0. Collective.

        No training resumes from that file, and the last checkpoint stays the last.

        Args:
            name: a file name without its extension, other than those of checkpoints to resume from.
            weights: the state dict; None for the model's. Only rank 0's counts.
            kwargs: as of :meth:`save`.

        Raises:
            CheckpointWriteError: as :meth:`save` does.
            UserError: as :meth:`save` does.
        """
        if not self.save_dir:
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        _wait_for_all_ranks(path)
        state = {"model": dict(self.model.state_dict() if weights is None else weights), **kwargs}
        on_main_process(lambda: self._write(path, state, is_last=False) if self.save_to_disk else None)

    def saved_entries(self, name: str) -> Dict[str, Any]:
        """Return what a file of :meth:`save_weights` holds besides the weights, as rank 0 reads it. Collective.

        The dict is empty if there is no such file, or it cannot be read.
        """

        def read() -> Dict[str, Any]:
            path = os.path.join(self.save_dir, f"{name}.pth")
            if not self.save_dir or not self.path_manager.isfile(path):
                return {}
            try:
                content = self._torch_load(self.path_manager.get_local_path(path))
                return {key: value for key, value in content.items() if key != "model"}
            except Exception as e:  # pickle, zip and torch raise many kinds
                logger.warning(f"{path} cannot be read, and counts as missing: {type(e).__name__}: {first_line(e)}")
                return {}

        return on_main_process(read)

    def _collect(self) -> Dict[str, Any]:
        global _completions
        completions: Dict[str, Callable[[], None]] = {}
        _completions = completions
        try:
            state = {"model": self.model.state_dict()}
            state.update({key: value.state_dict() for key, value in self.checkpointables.items()})
        finally:
            _completions = None
        for name in sorted(completions):
            completions[name]()
        return state

    def _write(self, path: str, state: Dict[str, Any], is_last: bool) -> None:
        names = non_finite_tensors(state)
        if names:
            more = f" (and {len(names) - 1} more tensors)" if len(names) > 1 else ""
            raise UserError(
                f"checkpoint {path} is not written: {names[0]}{more} has infinite or NaN values. "
                f"{self.last_saved()} Lower the learning rate and resume from the last good checkpoint."
            )
        logger.info(f"Saving checkpoint to {path}")
        if self._is_remote:
            with self.path_manager.open(path, "wb") as f:
                torch.save(state, f)
            if is_last:
                self.tag_last_checkpoint(os.path.basename(path))
            return
        try:
            write_atomically(path, lambda f: torch.save(state, f))
            if is_last:
                self.tag_last_checkpoint(os.path.basename(path))
        except (OSError, RuntimeError) as e:
            # torch's writer raises a RuntimeError from the OSError.
            reason = next((cause for cause in _chain(e) if isinstance(cause, OSError)), e)
            raise CheckpointWriteError(
                f"checkpoint {path} cannot be written: {reason}. {self._free_space()} {self.last_saved()} Free some "
                "space and use --resume; SOLVER.CHECKPOINTS_KEPT (train.checkpointer.max_to_keep) limits their number."
            ) from e

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        if self._is_remote:
            super().tag_last_checkpoint(last_filename_basename)
            return
        write_atomically(
            os.path.join(self.save_dir, LAST_CHECKPOINT), lambda f: f.write(last_filename_basename.encode())
        )

    def last_saved(self) -> str:
        """Return a sentence for messages that names the last checkpoint."""
        saved = self.get_checkpoint_file() if self.has_checkpoint() else ""
        return f"The last checkpoint is {saved}." if saved else "There is no checkpoint yet."

    def _free_space(self) -> str:
        try:
            return f"{self.save_dir} has {shutil.disk_usage(self.save_dir).free / 2**20:.0f} MiB of free space."
        except OSError as e:
            return f"{self.save_dir} cannot be read either: {e}."

    # ------------------------------------------------------------------ resume
    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Resume from the last checkpoint of the folder, or load the weights ``path``. Collective.

        If the last checkpoint is damaged or missing, the newest older one that can be read takes its place, with a
        warning (:func:`find_resumable`). "last_checkpoint" then names that one. No checkpoint is deleted.

        Args:
            path: weights to start from if ``resume`` is false or the folder has no checkpoint.

        Returns:
            What the file holds besides the model and the checkpointables.

        Raises:
            UserError: there are checkpoints but none can be read, or the checkpoint is of another network or config.
        """
        self.resumed_from = ""
        if self._is_remote:
            self.resumed_from = self.get_checkpoint_file() if resume and self.has_checkpoint() else ""
            return super().resume_or_load(path, resume=resume)
        if self.save_dir and self.save_to_disk:
            for name in remove_partial_files(self.save_dir):
                logger.warning(f"Removed {os.path.join(self.save_dir, name)}: a write that did not finish.")
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
        """Return what rank 0 finds: the others may see another state of a shared folder."""

        def find() -> Resumable:
            try:
                return find_resumable(self.save_dir, self._torch_load, ["model", *self.checkpointables])
            except OSError as e:
                raise UserError(str(e)) from e

        found = on_main_process(find)
        path = os.path.join(self.save_dir, found.name)
        blind = [rank for rank, sees in enumerate(comm.all_gather(os.path.isfile(path))) if not sees]
        if found.name and blind:
            raise UserError(
                f"--resume: rank 0 resumes from {path}, which rank {', '.join(map(str, blind))} cannot see: give "
                "an OUTPUT_DIR (train.output_dir) on a file system that all machines share"
            )
        return found

    def _resume(self, path: str) -> Dict[str, Any]:
        advice = "Resume with the config of that training, or train without --resume in another OUTPUT_DIR."
        try:
            rest = self.load(path)
        except (ValueError, KeyError, TypeError) as e:  # from an optimizer, a scheduler or a hook
            raise UserError(f"checkpoint {path} does not fit this training: {type(e).__name__}: {e}. {advice}") from e
        if self.unset_keys:
            raise UserError(
                f"checkpoint {path} belongs to another network: it does not fit {len(self.unset_keys)} of the model's "
                f"tensors, such as {self.unset_keys[0]}. {advice}"
            )
        return rest

    @property
    def _is_remote(self) -> bool:
        return "://" in self.save_dir


def _wait_for_all_ranks(path: str) -> None:
    # Not by a collective: it would pair with any other collective of a rank that does not save.
    if comm.get_world_size() == 1:
        return
    try:
        dist.monitored_barrier(comm._get_global_gloo_group(), timeout=RANKS_TIMEOUT, wait_all_ranks=True)
    except RuntimeError as e:
        raise UserError(
            f"checkpoint {path} is not written: saving is collective, and not all ranks called save() within "
            f"{RANKS_TIMEOUT.total_seconds():g} s ({first_line(e)}). Register a hook that saves, such as "
            "BestCheckpointer, on every rank."
        ) from e


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """Yield an error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
