"""The hook that gives a resumed training the images and random draws of an uninterrupted one."""

import logging
from typing import Any, Callable, Dict, Iterable, List

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from mgd_det.seeding import Purpose, seed_generators

logger = logging.getLogger(__name__)


class RandomState(HookBase):
    """Makes random choices depend only on the iteration, the rank and one seed, which is saved with the trainer.

    Before training, the hook tells the data loader at which batch to start. If the batch size, or the number of batches
    in a step, has changed, the data continue after the last image seen. Before every step it seeds the global
    generators, differently on each rank. A model that draws at random (sampled proposals, dropout) then draws the same
    with and without a resume.
    """

    def __init__(self, seed: int = -1, batches_per_iteration: int = 1) -> None:
        """
        Args:
            seed: the same on all ranks; < 0 to draw one (collective).
            batches_per_iteration: how many batches a step takes from the data loader.
        """
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self._batches_per_iteration = batches_per_iteration
        self._is_loaded = False
        # [first iteration, batches of a step, images of a batch] of each run that changed the last two.
        self._runs: List[List[int]] = []

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start > 0 and not self._is_loaded:
            logger.warning(
                "The checkpoint has no seed for images and augmentation, as it was written by Detectron2 or an earlier "
                f"version: training continues with seed {self.seed}"
            )
        trainer: Any = getattr(
            self.trainer, "_trainer", self.trainer
        )  # a DefaultTrainer keeps its loader in an inner trainer
        self._note_run(start, getattr(trainer.data_loader, "total_batch_size", 0))
        self._start_loader(trainer.data_loader, lambda first, end, batches: (end - first) * batches)
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PreciseBN) and not hook._disabled:
                self._start_loader(hook._data_loader, self._batches_of(hook))

    def _batches_of(self, hook: hooks.PreciseBN) -> Callable[[int, int, int], int]:
        period = hook._period if hook._period > 0 else self.trainer.max_iter + 1  # 0: only at the end
        return lambda first, end, _: (end // period - first // period) * hook._num_iter

    def _note_run(self, start: int, size: int) -> None:
        """Note the size of this run's steps if it differs from that of the run before."""
        now = [self._batches_per_iteration, size]
        self._runs = [run for run in self._runs if run[0] < start]
        if not self._runs:
            if start > 0 and self._is_loaded:
                logger.warning(
                    "The checkpoint does not tell the batch size of its training: the images continue as if it were "
                    f"this one's, SOLVER.ACCUMULATE {now[0]} and SOLVER.IMS_PER_BATCH {size}"
                )
            self._runs = [[0, *now]]
        elif self._runs[-1][1:] != now:
            before = self._runs[-1]
            self._runs.append([start, *now])
            seen = sum((end[0] - run[0]) * run[1] * run[2] for run, end in zip(self._runs, self._runs[1:]))
            logger.warning(
                f"SOLVER.ACCUMULATE (train.accumulate) is {now[0]} and SOLVER.IMS_PER_BATCH "
                f"(dataloader.train.total_batch_size) is {size}; the checkpoint's were {before[1]} and {before[2]}. "
                f"The data continues after {seen} images; the iterations and learning rates stay the config's."
            )

    def _start_loader(self, loader: Iterable[Any], count: Callable[[int, int, int], int]) -> None:
        """Start a loader after the batches that each run took from it: ``count(first, end, batches of a step)``."""
        ends = [*(first for first, *_ in self._runs[1:]), self.trainer.start_iter]
        taken = [(count(first, end, batches), size) for (first, batches, size), end in zip(self._runs, ends)]
        batch = sum(number for number, _ in taken)
        if hasattr(loader, "start_at"):
            if len({size for _, size in taken}) == 1:
                loader.start_at(batch, self.seed)
            else:
                loader.start_at(taken[-1][0], self.seed, earlier=taken[:-1])
            if batch > 0:
                logger.info(f"The data continues at batch {batch} of seed {self.seed}")
        elif batch > 0:
            logger.warning(f"A {type(loader).__name__} cannot start in the middle: its images start from the beginning")

    def before_step(self) -> None:
        seed_generators(Purpose.STEP, self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> Dict[str, Any]:
        return {"seed": self.seed, "batches": [list(run) for run in self._runs]}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if state_dict["seed"] != self.seed:
            logger.info(f"Random choices continue with seed {state_dict['seed']}, with which the training began")
        self.seed = state_dict["seed"]
        self._runs = [list(run) for run in state_dict.get("batches", [])]  # version 0.1 has none
        self._is_loaded = True
