"""A training step: forward, backward, and weights that change only where all of it is finite."""

import logging
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, ContextManager, Dict, Iterable, List, Optional

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mgd_det.engine.last_iteration import EndsAtMaxIter
from mgd_det.engine.non_finite import ForwardState, NonFiniteError, NonFinitePolicy, StepReport, describe
from mgd_det.errors import check_count
from mgd_det.modeling import unwrapped

logger = logging.getLogger(__name__)


class TrainStep(EndsAtMaxIter, SimpleTrainer):
    """Detectron2's SimpleTrainer and AMPTrainer in one, with a check of each step before the weights change.

    - If a step's loss, gradient or running statistics (of batch norm) are infinite or NaN, all ranks stop or skip that
      step: see :class:`NonFinitePolicy`. A skipped step counts as an iteration, so learning rate and matching keep
      their schedule.
    - The gradients of several batches may be averaged for one step.
    - A request to stop on one rank is known to all ranks at the end of the step.

    The losses are read from the device once a step, after backward. Several ranks need one all-reduce of four numbers.

    With mixed precision, GradScaler handles scaled gradients that overflow: it skips the step and lowers the scale. The
    policy applies only if the loss itself is not finite, or the scale is at most 1.

    Attributes:
        batches_per_iteration: how many batches a step takes from the data loader.
        skipped_steps: how many steps the policy has skipped in this training, including those before a resume.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable[List[Dict[str, Any]]],
        optimizer: torch.optim.Optimizer,
        *,
        accumulate: int = 1,
        non_finite: Optional[NonFinitePolicy] = None,
        amp: bool = False,
    ) -> None:
        """
        Args:
            model: returns a scalar loss, or a dict of them, for a batch; may be in DistributedDataParallel.
            data_loader: endless.
            accumulate: batches of a step, > 0. Losses and gradients are the mean over them.
            non_finite: None to stop.
            amp: mixed precision in float16.

        Raises:
            ArgumentError: ``accumulate`` is not a whole number > 0.
        """
        super().__init__(model, data_loader, optimizer)
        self.batches_per_iteration = check_count("accumulate", accumulate)
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._policy = non_finite or NonFinitePolicy()
        self._forward_state = ForwardState(model)
        self._device = next(model.parameters()).device
        self.grad_scaler = torch.amp.GradScaler(self._device.type, enabled=amp)
        self._stop_requested = False
        self._stop_agreed = False

    # ------------------------------------------------------------------ a stop that all ranks know of
    def request_stop(self) -> None:
        """Request, for example from a signal handler, that a hook ends the training after a step."""
        self._stop_requested = True

    def forget_stop(self) -> None:
        """Withdraw a request, for example one meant for an earlier training."""
        self._stop_requested = self._stop_agreed = False

    @property
    def stop_agreed(self) -> bool:
        """Whether any rank had asked for a stop by the end of the last step: the same on every rank."""
        return self._stop_requested if comm.get_world_size() == 1 else self._stop_agreed

    # ------------------------------------------------------------------ the step
    def run_step(self) -> None:
        """Train on the next batches.

        Raises:
            NonFiniteError: the policy stops the training.
        """
        assert self.model.training, "the model was left in eval mode"
        if self._policy.policy == "skip":
            self._forward_state.remember()
        self.optimizer.zero_grad()
        step = _Batches()
        try:
            for number in range(self.batches_per_iteration):
                self._add_batch(step, is_last=number + 1 == self.batches_per_iteration)
        except (FloatingPointError, AssertionError) as e:
            # Detectron2 raises either of them in a forward whose boxes are not finite. Other ranks then wait for this
            # one in backward, so it can continue only if it is alone.
            if isinstance(e, AssertionError) and "infinite or NaN" not in str(e):
                raise
            self._not_finite([StepReport({}, step.files, cause=str(e))], agreed=comm.get_world_size() == 1)
            for _ in range(self.batches_per_iteration - step.taken):
                next(self._data_loader_iter)  # a skipped step uses up its batches: --resume counts on it
            return
        self.after_backward()
        losses = self._checked_losses(step)
        if losses is None:
            return
        self._skipped_in_a_row = 0
        self._write_metrics(losses, step.data_time)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()

    def _add_batch(self, step: "_Batches", is_last: bool) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        step.taken += 1
        step.data_time += time.perf_counter() - start
        step.files += _file_names(batch)
        with self._without_reduction(not is_last), self._same_kernels():
            is_mixed = self.grad_scaler.is_enabled()
            with torch.autocast(self._device.type, torch.float16) if is_mixed else nullcontext():
                losses = self.model(batch)
                if isinstance(losses, torch.Tensor):
                    losses = {"total_loss": losses}
                total = sum(losses.values()) / self.batches_per_iteration
            self.grad_scaler.scale(total).backward()
        for name, loss in losses.items():
            loss = loss.detach().reshape(())
            step.losses[name] = step.losses[name] + loss if name in step.losses else loss

    def _without_reduction(self, wanted: bool) -> ContextManager[None]:
        # The ranks' gradients are averaged once, with the last batch's.
        return self.model.no_sync() if wanted and isinstance(self.model, DistributedDataParallel) else nullcontext()

    def _same_kernels(self) -> ContextManager[None]:
        # Scripted functions (RetinaNet's focal loss) are compiled again after their first calls, which changes the last
        # bit of their gradients: a resumed training would not equal an uninterrupted one. On GPUs other kernels differ
        # in the same way, and speed matters more.
        return torch.jit.optimized_execution(False) if self._device.type == "cpu" else nullcontext()

    def _checked_losses(self, step: "_Batches") -> Optional[Dict[str, torch.Tensor]]:
        """Return the mean losses on the CPU, or None if the step is skipped."""
        losses = torch.stack([loss.to(self._device) for loss in step.losses.values()])
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [_total_norm(tensors) for tensors in (gradients, list(self._forward_state.statistics().values()))]
        bad = [~losses.isfinite().all(), *(~norm.to(self._device).isfinite() for norm in norms)]
        flags = torch.stack([*bad, torch.full_like(bad[0], self._stop_requested)]).float()
        if comm.get_world_size() > 1:
            # DistributedDataParallel has made the gradients equal on all ranks, but each rank has its own losses.
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        # The only wait for the device.
        bad_loss, bad_gradient, bad_statistics, stop, *sums = torch.cat([flags, losses]).tolist()
        self._stop_agreed = stop > 0
        means = {name: total / self.batches_per_iteration for name, total in zip(step.losses, sums)}
        # A scaled gradient may overflow; at a scale of 1 (also without mixed precision) it is the gradient itself.
        if bad_loss or bad_statistics or (bad_gradient and self.grad_scaler.get_scale() <= 1):
            self._not_finite(comm.all_gather(self._report(means, step.files)), agreed=True)
            return None
        return {name: torch.tensor(mean, dtype=torch.float64) for name, mean in means.items()}

    # ------------------------------------------------------------------ a step that is not finite
    def _report(self, losses: Dict[str, float], files: List[str]) -> StepReport:
        named = unwrapped(self.model).named_parameters()
        gradients = [f"gradient of {name}" for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
        statistics = [name for name, x in self._forward_state.statistics().items() if not x.isfinite().all()]
        return StepReport(losses, files, gradients, statistics)

    def _not_finite(self, reports: List[StepReport], agreed: bool) -> None:
        """Skip the step, or raise NonFiniteError.

        Args:
            reports: one of each rank; only this rank's if not ``agreed``.
            agreed: whether all ranks do the same.
        """
        self._skipped_in_a_row += 1
        text = describe(self.iter, reports)
        in_a_row, limit = self._skipped_in_a_row, self._policy.max_in_a_row
        if self._policy.policy != "skip" or not agreed or in_a_row >= limit:
            if in_a_row > 1:
                text += f"\nThe {in_a_row - 1} steps before were skipped for the same reason."
            raise NonFiniteError(text)
        self._forward_state.restore()
        self.optimizer.zero_grad()
        self.skipped_steps += 1
        get_event_storage().put_scalar("skipped_steps", self.skipped_steps, smoothing_hint=False)
        logger.warning(f"Step skipped, {in_a_row} in a row (limit {limit}), {self.skipped_steps} in all. {text}")

    # ------------------------------------------------------------------ saved with the training
    def state_dict(self) -> Dict[str, Any]:
        state = super().state_dict()
        state["skipped_steps"], state["skipped_in_a_row"] = self.skipped_steps, self._skipped_in_a_row
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, or the state of Detectron2's trainers."""
        super().load_state_dict(state_dict)
        self.skipped_steps = state_dict.get("skipped_steps", 0)
        self._skipped_in_a_row = state_dict.get("skipped_in_a_row", 0)
        if "grad_scaler" in state_dict:
            self.grad_scaler.load_state_dict(state_dict["grad_scaler"])


@dataclass
class _Batches:
    """The number of a step's batches so far, the sum of their losses, their image files and the seconds of waiting."""

    taken: int = 0
    losses: Dict[str, torch.Tensor] = field(default_factory=dict)
    files: List[str] = field(default_factory=list)
    data_time: float = 0.0


def _file_names(batch: Any) -> List[str]:
    """Return the image files of a batch in Detectron2's format, a list of dicts; an empty list for other formats."""
    images = [image for image in batch if isinstance(image, dict)] if isinstance(batch, (list, tuple)) else []
    return [str(image["file_name"]) for image in images if "file_name" in image]


def _total_norm(tensors: List[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of all tensors together; it is not finite if a value is not, or if the sum overflows."""
    if not tensors:
        return torch.zeros(())
    if hasattr(nn.utils, "get_total_norm"):  # torch >= 2.6
        return nn.utils.get_total_norm(tensors)
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in tensors]))
