"""The hook that keeps the channel matching up to date."""

import logging
import random
import time
from bisect import bisect_right
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence

import numpy as np
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn

from mgd_det.distillation import MatchingReport
from mgd_det.errors import UserError
from mgd_det.modeling.backbone import attach_losses, evaluating, find_mgd_backbone, unwrapped

logger = logging.getLogger(__name__)


class MatchingUpdate(HookBase):
    """Solves the channel matching before training and every so many iterations (MGD, section 3.4).

    An update measures the cost on some batches with both nets in eval mode, without gradient, on a
    data loader of its own; then the matching is constant until the next. It leaves the state of all
    random generators as it was, so that a run with distillation sees the data of a run without.

    It is collective: put it at the same place of the hook list on every rank, before the
    checkpointer. Its state (the matching and the distiller's norm layers) is saved with the hooks of
    the trainer, so that a resumed training goes on with the same matching, without measuring anew.
    """

    def __init__(
        self,
        model: nn.Module,
        build_data_loader: Callable[[], Iterable[List[Dict[str, Any]]]],
        *,
        num_batches: int,
        periods: Sequence[int],
        milestones: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            model: a detector with an :class:`MGDBackbone`, maybe in DistributedDataParallel. Its losses
                are attached to its loss dict here.
            build_data_loader: makes a loader of training batches; called once an update, with the random
                generators seeded for that update.
            num_batches: batches to measure on, > 0; fewer where the loader ends earlier.
            periods: iterations between updates, > 0; ``periods[i]`` from iteration ``milestones[i - 1]`` on.
                An iteration is due when its number is a multiple of the period then in force.
            milestones: ascending iterations, one less than periods.
            seed: of the batches; each update, and each rank, draws its own.
        """
        _check_schedule(num_batches, periods, milestones)
        backbone = find_mgd_backbone(model)
        attach_losses(model)
        assert backbone is not None
        self._backbone = backbone
        self._detector = unwrapped(model)
        self._build_data_loader = build_data_loader
        self._num_batches = num_batches
        self._periods, self._milestones = list(periods), list(milestones)
        self._seed = seed

    # ------------------------------------------------------------------ when
    def before_train(self) -> None:
        if not self._backbone.distiller.is_matched:
            self._update(self.trainer.start_iter)

    def after_step(self) -> None:
        finished = self.trainer.iter + 1
        is_used = bool(self._backbone.distiller.matched_positions)
        if is_used and finished < self.trainer.max_iter and self.is_due(finished):
            self._update(finished)

    def is_due(self, iteration: int) -> bool:
        """Whether an update falls between iteration ``iteration - 1`` and ``iteration`` (> 0)."""
        return iteration % self._periods[bisect_right(self._milestones, iteration)] == 0

    # ------------------------------------------------------------------ what
    def _update(self, iteration: int) -> None:
        start = time.perf_counter()
        measurement = self._backbone.start_measurement()
        logger.info(f"Matching update at iteration {iteration}: measuring on {self._num_batches} batches")
        # Events that a model logs in its forward are not those of training.
        with _seeded(self._seed, iteration, comm.get_rank()), EventStorage(), evaluating(self._detector):
            for batch in self._batches():
                self._backbone.measure(self._detector, batch, measurement)
            reports = measurement.solve()
        seconds = time.perf_counter() - start
        logger.info(
            f"Matching update at iteration {iteration} took {seconds:.1f} s, {measurement.num_images} images:\n"
            + _table(reports)
        )
        for report in reports:
            self.trainer.storage.put_scalar(f"mgd/cost_{report.position.name}", report.cost_after, smoothing_hint=False)

    def _batches(self) -> Iterator[List[Dict[str, Any]]]:
        start = logged = time.perf_counter()
        done = 0
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
        return self._backbone.distiller.distillation_state()

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self._backbone.distiller.load_distillation_state(state_dict)


@contextmanager
def _seeded(*seeds: int) -> Iterator[None]:
    """Seeds python's, numpy's and torch's generators, and puts back their states at the end."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        seed_all_rng(int(np.random.SeedSequence([abs(seed) for seed in seeds]).generate_state(1)[0]))
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _check_schedule(num_batches: int, periods: Sequence[int], milestones: Sequence[int]) -> None:
    if num_batches <= 0:
        raise UserError(f"MODEL.MGD.MATCHING.NUM_BATCHES is {num_batches}; give a number > 0")
    if len(periods) != len(milestones) + 1 or any(period <= 0 for period in periods):
        raise UserError(
            f"MODEL.MGD.MATCHING.PERIODS is {list(periods)} with MILESTONES {list(milestones)}: give periods > 0, "
            "one more than milestones"
        )
    if list(milestones) != sorted(milestones):
        raise UserError(f"MODEL.MGD.MATCHING.MILESTONES is {list(milestones)}; give them in ascending order")


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
