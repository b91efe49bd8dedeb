"""The hook that keeps the channel matching up to date."""

import logging
import random
import time
from contextlib import contextmanager
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from mgd_det.distillation import MatchingReport, MatchingStatistics
from mgd_det.distributed.ranks import share_buffers
from mgd_det.engine.matching_schedule import MatchingSchedule
from mgd_det.errors import UserError
from mgd_det.modeling import attach_losses, evaluating, find_distillation, unwrapped

logger = logging.getLogger(__name__)

SOURCES = ("online", "measured")


class MatchingUpdate(HookBase):
    """Solves the channel matching at first and every so many iterations (MGD, section 3.4); in between it is constant.

    The costs come from one of two sources:

    - "online": they are of the features that training itself computes in the steps just before an update (its window),
      the student's in training mode. It takes no forward and no data of its own. The first matching is solved within
      the first step, from the batches of that step's first forward, and again at the end of a first window.
    - "measured", as the authors do: an update measures them on some batches with both nets in eval mode, without
      gradient, on a data loader of its own. The first one does so before training. It leaves the state of all random
      generators as it was, so that a run with distillation sees the data of a run without.

    It is collective: put it at the same place of the hook list on every rank, before the
    checkpointer. Its state (the matching, the distiller's norm layers and what an open window has seen) is saved with
    the hooks of the trainer, so that a resumed training goes on with the same matching, without measuring anew.
    """

    def __init__(
        self,
        model: nn.Module,
        build_data_loader: Optional[Callable[[], Iterable[List[Dict[str, Any]]]]] = None,
        *,
        num_batches: int,
        periods: Sequence[int],
        milestones: Sequence[int] = (),
        source: str = "online",
        seed: int = 0,
        checkpoint_period: int = 0,
    ) -> None:
        """
        Args:
            model: a detector whose backbone is distilled, maybe in DistributedDataParallel. Its losses
                are attached to its loss dict here.
            build_data_loader: makes a loader of training batches; called once a "measured" update, with the random
                generators seeded for that update. "online" needs none.
            num_batches: batches to measure on, > 0; fewer where the loader ends earlier. Of "online", the steps of a
                window; fewer where the update before is nearer. All forwards of such a step count.
            periods, milestones: see :class:`MatchingSchedule`.
            source: "online" or "measured".
            seed: of the batches; each update, and each rank, draws its own.
            checkpoint_period: iterations between two checkpoints; 0 where there are none. Of several ranks only rank
                0 saves its window: there all ranks' windows are summed for it.

        Raises UserError for other values.
        """
        if num_batches <= 0:
            raise UserError(f"MODEL.MGD.MATCHING.NUM_BATCHES is {num_batches}; give a number > 0")
        if source not in SOURCES:
            raise UserError(f"MODEL.MGD.MATCHING.SOURCE is {source!r}; use one of {', '.join(SOURCES)}")
        if source == "measured" and build_data_loader is None:
            raise UserError("a matching update whose source is 'measured' needs build_data_loader; 'online' needs none")
        self._schedule = MatchingSchedule(periods, milestones)
        backbone = find_distillation(model)
        attach_losses(model)
        assert backbone is not None
        self._backbone = backbone
        self._detector = unwrapped(model)
        self._build_data_loader = build_data_loader
        self._num_batches = num_batches
        self._is_online = source == "online"
        self._seed = seed
        self._checkpoint_period = checkpoint_period
        self._first_window_end: Optional[int] = None  # iterations finished by then; None once it was
        self._window: Optional[MatchingStatistics] = None  # the open one
        self._sums_of_all_ranks: Optional[torch.Tensor] = None  # of the open window, until the next step

    # ------------------------------------------------------------------ when
    def before_train(self) -> None:
        if self._backbone.distiller.is_matched:
            return
        if self._is_online:
            self._first_window_end = self.trainer.start_iter + self._num_batches
        else:
            self._measure(self.trainer.start_iter)

    def before_step(self) -> None:
        self._sums_of_all_ranks = None
        if not self._is_online:
            return
        update = self._next_update(self.trainer.iter)
        if self._window is None and update is not None and update - self.trainer.iter <= self._num_batches:
            self._window = self._backbone.start_matching(of_training=True)
        if self._window is not None or not self._backbone.distiller.is_matched:
            self._backbone.observer = self._observe

    def after_step(self) -> None:
        # What runs the model next (precise batch norm, say) is not training.
        self._backbone.observer = None
        finished = self.trainer.iter + 1
        if self._next_update(self.trainer.iter) == finished:
            if self._is_online:
                assert self._window is not None
                window, self._window, self._first_window_end = self._window, None, None
                self._solve(window, finished, time.perf_counter())
            else:
                self._measure(finished)
        elif self._window is not None and comm.get_world_size() > 1 and self._is_saved(finished):
            self._sums_of_all_ranks = self._window.all_reduced_sums()

    def after_train(self) -> None:
        self._backbone.observer = None

    def _next_update(self, finished: int) -> Optional[int]:
        """The next update's iteration, > ``finished``; None where training ends before it is of use."""
        if not self._backbone.distiller.matched_positions:
            return None
        update = self._schedule.next_due(finished)
        if self._first_window_end is not None:
            update = min(update, self._first_window_end)
        return update if update < self.trainer.max_iter else None

    def _is_saved(self, finished: int) -> bool:
        """Whether a checkpoint follows, as far as all ranks know: a periodic one, or because of a signal."""
        step = getattr(self.trainer, "_trainer", self.trainer)
        is_periodic = self._checkpoint_period > 0 and finished % self._checkpoint_period == 0
        return is_periodic or getattr(step, "stop_agreed", False)

    # ------------------------------------------------------------------ what
    def _observe(self, student: Dict[str, torch.Tensor], teacher: Dict[str, torch.Tensor]) -> None:
        """Takes the features of a training forward."""
        if not self._backbone.distiller.is_matched:
            # Within the forward, for its losses need a matching. All ranks are in their first forward.
            start = time.perf_counter()
            measurement = self._backbone.start_matching()
            measurement.update(student, teacher)
            self._solve(measurement, self.trainer.iter, start)
        if self._window is not None:
            self._window.update(student, teacher)

    def _measure(self, iteration: int) -> None:
        start = time.perf_counter()
        measurement = self._backbone.start_matching()
        logger.info(f"Matching update at iteration {iteration}: measuring on {self._num_batches} batches")
        # All ranks measure one net, whatever batches their batch norms have seen.
        share_buffers(self._detector.get_submodule("backbone"))
        # Events that a model logs in its forward are not those of training.
        with self._seeded(iteration), EventStorage(), evaluating(self._detector):
            for batch in self._batches():
                self._backbone.measure(self._detector, batch, measurement)
        self._solve(measurement, iteration, start)

    @torch.no_grad()
    def _solve(self, measurement: MatchingStatistics, iteration: int, start: float) -> None:
        with self._seeded(iteration):  # "rd" draws for the scale of its target
            reports = measurement.solve()
        seconds = time.perf_counter() - start
        logger.info(
            f"Matching update at iteration {iteration} took {seconds:.1f} s, {measurement.num_images} images:\n"
            + _table(reports)
        )
        for report in reports:
            self.trainer.storage.put_scalar(f"mgd/cost_{report.position.name}", report.cost_after, smoothing_hint=False)

    def _seeded(self, iteration: int) -> ContextManager[None]:
        device = next(self._backbone.distiller.buffers()).device
        return _seeded(self._seed, iteration, comm.get_rank(), device=device)

    def _batches(self) -> Iterator[List[Dict[str, Any]]]:
        start = logged = time.perf_counter()
        done = 0
        assert self._build_data_loader is not None
        for batch in self._build_data_loader():
            yield batch
            done += 1
            if done == self._num_batches:
                return
            if time.perf_counter() - logged > 10:
                logged = time.perf_counter()
                left = (logged - start) / done * (self._num_batches - done)
                logger.info(f"Measured {done}/{self._num_batches} batches, about {left:.0f} s left")
        if done == 0:
            raise UserError("the training set gave no batch to measure the matching on: is it smaller than a batch?")

    # ------------------------------------------------------------------ saved with the trainer
    def state_dict(self) -> Dict[str, Any]:
        state = self._backbone.distiller.distillation_state()
        if self._is_online:
            sums = self._sums_of_all_ranks
            if sums is None and self._window is not None:
                sums = self._window.sums
            state["online"] = {
                "first_window_end": self._first_window_end,
                "sums": None if sums is None else sums.cpu().clone(),
            }
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._backbone.distiller.load_distillation_state(state_dict)
        # A window that another source did not open has seen nothing yet.
        online = state_dict.get("online")
        if not self._is_online or online is None:
            return
        self._first_window_end = online["first_window_end"]
        if online["sums"] is not None:
            self._window = self._backbone.start_matching(of_training=True)
            if comm.is_main_process():  # whose sums are those of all ranks
                self._window.load_sums(online["sums"])


@contextmanager
def _seeded(*seeds: int, device: torch.device) -> Iterator[None]:
    """Seeds python's, numpy's and torch's generators (of the CPU and ``device``), and puts back their states."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        seed_all_rng(int(np.random.SeedSequence([abs(seed) for seed in seeds]).generate_state(1)[0]))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _table(reports: List[MatchingReport]) -> str:
    def shown(value: Optional[float], form: str) -> str:
        return "-" if value is None else format(value, form)

    rows = [
        [
            report.position.name,
            report.position.student_channels,
            report.position.teacher_channels,
            report.group_size,
            shown(report.cost_before, ".4f"),
            shown(report.cost_after, ".4f"),
            shown(report.moved, "d"),
        ]
        for report in reports
    ]
    headers = ["position", "student channels", "teacher channels", "group size", "cost before", "cost after", "moved"]
    return tabulate(rows, headers=headers, disable_numparse=True)
