"""The hook that keeps the channel matching up to date."""

import logging
import time
from itertools import islice
from typing import Any, Callable, ContextManager, Dict, Iterable, Iterator, List, Optional, Sequence

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from mgd_det.checkpoint.training_checkpointer import complete_over_ranks
from mgd_det.distillation import MatchingReport, MatchingStatistics
from mgd_det.distributed.ranks import share_buffers
from mgd_det.engine.matching_schedule import MatchingSchedule
from mgd_det.errors import ArgumentError, UserError, check_choice, check_count
from mgd_det.modeling import attach_losses, evaluating, find_distillation, unwrapped
from mgd_det.progress import ProgressLog
from mgd_det.seeding import Purpose, seeded
from mgd_det.visualization.matching_record import record_matching

logger = logging.getLogger(__name__)

SOURCES = ("online", "measured")


class MatchingUpdate(HookBase):
    """Solves the channel matching at the start and then periodically (MGD, section 3.4); in between it is constant.

    The costs come from one of two sources:

    - "online": the features that training itself computes in the steps just before an update (its window), with the
      student in training mode. No extra forward or data is needed. The first matching is solved within the first step,
      from the batch of its first forward, and again at the end of a first window, which also measures the scale of the
      targets.
    - "measured", as the authors do: before the first step, and when one is due, an update measures the costs on some
      batches of its own data loader, with both nets in eval mode and without gradient. The random generators are
      restored, so a run with distillation sees the same data as a run without.

    An update runs between two steps, after all hooks have handled the first. The hook may therefore stand anywhere in
    the list, even at different places on different ranks. Before ``IterationTimer``, updates do not count as a step's
    time.

    Its state (the matching, the distiller's norm layers and the sums of an open window) is saved with the trainer's
    hooks, so a resumed training continues with the same matching and window. With several ranks, only
    :class:`mgd_det.checkpoint.TrainingCheckpointer` saves the window of all of them.
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
        record_folder: str = "",
    ) -> None:
        """
        Args:
            model: a detector whose backbone is distilled; may be in DistributedDataParallel. Its loss dict gets the
                distillation losses here.
            build_data_loader: returns a loader of training batches; called once for each "measured" update, with the
                random generators seeded for that update. "online" needs none.
            num_batches: batches to measure on, > 0; fewer if the loader ends earlier. For "online", the distilled steps
                of a window; fewer if the last update was more recent. All forwards of such a step count. A first
                window that would not end before the distillation does has a tenth of the training's steps, or one.
            periods: see :class:`MatchingSchedule`.
            milestones: see :class:`MatchingSchedule`.
            source: "online" or "measured".
            seed: seed of the batches, >= 0; each update and each rank draws different ones.
            record_folder: where the first and the last matching are kept for the report; "" to keep none.

        Raises:
            ArgumentError: a value is not as above.
            ValueError: the backbone is not distilled.
            UserError: an option of the teacher, or of its heads, does not suit device or detector.
        """
        check_count("num_batches", num_batches)
        check_choice("source", source, SOURCES)
        if source == "measured" and build_data_loader is None:
            raise ArgumentError("build_data_loader", "is None; give one for the source 'measured', or use 'online'")
        self._schedule = MatchingSchedule(periods, milestones)
        attach_losses(model)
        distillation = find_distillation(model)
        assert distillation is not None
        self._distillation = distillation
        self._distiller = distillation.distiller
        self._detector = unwrapped(model)
        self._build_data_loader = build_data_loader
        self._num_batches = num_batches
        self._is_online = source == "online"
        self._seed = seed
        self._record_folder = record_folder
        self._first_window_end: Optional[int] = None  # the iteration before which it is solved; None after that
        self._window: Optional[MatchingStatistics] = None  # the open one
        self._is_provisional = False  # "measured": the matching in force is of another source's first batch

    # ------------------------------------------------------------------ when
    def before_train(self) -> None:
        if not self._is_online:
            return
        if not self._distiller.is_matched:
            self._first_window_end = self.trainer.start_iter + self._window_steps
        schedule, max_iter = self._distillation.schedule, self.trainer.max_iter
        if self._first_window_end is not None and self._first_window_end >= schedule.end_iteration(max_iter):
            # The student would keep the matching of one batch of its untrained self.
            steps = max(schedule.end_iteration(max_iter) // 10, schedule.interval)
            self._first_window_end = self.trainer.start_iter + steps
            logger.info(
                f"The first window of the matching has {steps} steps: MODEL.MGD.MATCHING.NUM_BATCHES "
                f"{self._num_batches} does not fit into the distillation, which ends at iteration "
                f"{schedule.end_iteration(max_iter)}."
            )

    def before_step(self) -> None:
        # Not in after_step, where this step's checkpoint may be written before or after this hook's turn.
        now = self.trainer.iter
        schedule = self._distillation.schedule
        schedule.set_iteration(now, self.trainer.max_iter)
        is_due = self._next_update(now - 1) == now
        if not self._is_online:
            if is_due or (schedule.distils and (self._is_provisional or not self._distiller.is_matched)):
                self._measure()
            return
        # A checkpoint of version 0.1 has no window; it was saved after the update that was due.
        if is_due and self._window is not None:
            window, self._window, self._first_window_end = self._window, None, None
            self._solve(window, time.perf_counter())
        update = self._next_update(now)
        if self._window is None and update is not None and update - now <= self._window_steps:
            self._window = self._open_window()
        if self._window is not None or not self._distiller.is_matched:
            self._distillation.observer = self._observe

    def after_step(self) -> None:
        self._distillation.observer = None

    def after_train(self) -> None:
        self._distillation.observer = None

    def _next_update(self, iteration: int) -> Optional[int]:
        """Return the first iteration after this one before which an update is due; None if none is left."""
        if not self._distiller.matched_positions:
            return None
        update = self._schedule.next_due(iteration)
        if self._first_window_end is not None:
            update = min(update, self._first_window_end)
        return update if update < self._distillation.schedule.end_iteration(self.trainer.max_iter) else None

    @property
    def _window_steps(self) -> int:
        return self._num_batches * self._distillation.schedule.interval

    # ------------------------------------------------------------------ what
    def _observe(self, student: Dict[str, torch.Tensor], teacher: Dict[str, torch.Tensor]) -> None:
        """Take the features of a training forward."""
        if not self._distiller.is_matched:
            # Within the forward, because its losses need a matching. All ranks are in their first forward.
            start = time.perf_counter()
            first = self._distillation.start_matching()
            first.update(student, teacher, self._distillation.padding)
            self._solve(first, start)
        if self._window is not None:
            self._window.update(student, teacher, self._distillation.padding)

    def _open_window(self) -> MatchingStatistics:
        is_first = self._first_window_end is not None
        return self._distillation.start_matching(of_training=True, first_window=is_first)

    def _measure(self) -> None:
        start = time.perf_counter()
        statistics = self._distillation.start_matching(first_window=self._is_provisional)
        logger.info(f"Matching update at iteration {self.trainer.iter}: measuring on {self._num_batches} batches")
        # All ranks must measure the same net, but their batch norms have seen different batches.
        share_buffers(self._detector.get_submodule("backbone"))
        # Events that the model logs in these forwards do not belong to the training.
        with self._seeded(), EventStorage(), evaluating(self._detector):
            for batch in self._batches():
                self._distillation.measure(self._detector, batch, statistics)
        self._solve(statistics, start)
        self._is_provisional = False

    @torch.no_grad()
    def _solve(self, statistics: MatchingStatistics, start: float) -> None:
        iteration, is_first = self.trainer.iter, not self._distiller.is_matched
        with self._seeded():  # "rd" draws for the scale of its target
            reports = statistics.solve()
        seconds = time.perf_counter() - start
        logger.info(
            f"Matching update at iteration {iteration} took {seconds:.1f} s, {statistics.num_images} images:\n"
            + _table(reports)
        )
        for report in reports:
            self.trainer.storage.put_scalar(f"mgd/cost_{report.position.name}", report.cost_after, smoothing_hint=False)
        if self._record_folder and comm.is_main_process():
            self._record(statistics, is_first)

    def _record(self, statistics: MatchingStatistics, is_first: bool) -> None:
        matched = {
            p.name: (statistics.cost(p), self._distiller.groups(p).cpu())
            for p in self._distiller.matched_positions
            if p.matching == "assignment"
        }
        try:
            record_matching(self._record_folder, matched, is_first)
        except (OSError, ValueError) as e:
            logger.warning(f"The matching could not be kept for the report: {e}")

    def _seeded(self) -> ContextManager[None]:
        device = next(self._distiller.buffers()).device
        return seeded(Purpose.MATCHING, self._seed, self.trainer.iter, comm.get_rank(), device=device)

    def _batches(self) -> Iterator[List[Dict[str, Any]]]:
        assert self._build_data_loader is not None
        progress = ProgressLog(logger, "Measuring batches for the matching")
        done = 0
        for done, batch in enumerate(islice(self._build_data_loader(), self._num_batches), start=1):
            yield batch
            progress(done, self._num_batches)
        if done == 0:
            raise UserError("the training set gave no batch to measure the matching on: is it smaller than a batch?")

    # ------------------------------------------------------------------ saved with the trainer
    def state_dict(self) -> Dict[str, Any]:
        state = self._distiller.distillation_state()
        if not self._is_online:
            return state
        window = self._window
        online = {"first_window_end": self._first_window_end, "sums": None if window is None else window.sums.cpu()}
        state["online"] = online
        if window is not None and comm.get_world_size() > 1:
            of_all = complete_over_ranks("MatchingUpdate", lambda: online.update(sums=window.all_reduced_sums().cpu()))
            if not of_all:
                logger.warning(
                    "The checkpoint gets only this rank's part of the matching's open window: a resumed training "
                    "updates the matching from fewer images. Save with mgd_det.checkpoint.TrainingCheckpointer on "
                    "every rank to keep all of it."
                )
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._distiller.load_distillation_state(state_dict)
        online = state_dict.get("online")
        if online is None:  # saved by the other source: no window was open
            return
        if not self._is_online:
            self._is_provisional = online["first_window_end"] is not None
            return
        self._first_window_end = online["first_window_end"]
        if online["sums"] is not None:
            self._window = self._open_window()
            if comm.is_main_process():  # whose sums are those of all ranks
                self._window.load_sums(online["sums"])


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
            shown(report.mean_square, ".4g"),
        ]
        for report in reports
    ]
    headers = ["position", "student channels", "teacher channels", "group size", "cost before", "cost after", "moved"]
    headers.append("mean square of target")
    return tabulate(rows, headers=headers, disable_numparse=True)
