"""The hook by which a resumed training has the images and draws of an uninterrupted one."""

import logging
from typing import Any, Dict, Iterable

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from mgd_det.seeding import Purpose, seed_generators

logger = logging.getLogger(__name__)


class RandomState(HookBase):
    """Makes the random choices of a training depend only on the iteration and on one seed, saved with the trainer.

    Before training it tells the data loader which batch to start at. Before every step it seeds the global generators,
    differently on each rank: a model that draws (proposals to train on, dropout) then draws the same with and without
    a resume.
    """

    def __init__(self, seed: int = -1, batches_per_iteration: int = 1) -> None:
        """
        Args:
            seed: the same on all ranks; < 0 to draw one, which is collective.
            batches_per_iteration: what a step takes from the data loader.
        """
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self._batches_per_iteration = batches_per_iteration
        self._is_loaded = False

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start > 0 and not self._is_loaded:
            logger.warning(
                "The checkpoint has no seed for images and augmentation, as it was written by Detectron2 or an earlier "
                f"version: training continues with seed {self.seed}"
            )
        trainer: Any = getattr(self.trainer, "_trainer", self.trainer)  # a DefaultTrainer keeps its loader in another
        self._start_loader(trainer.data_loader, start * self._batches_per_iteration)
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PreciseBN) and not hook._disabled:
                finished = start // hook._period if hook._period > 0 else 0
                self._start_loader(hook._data_loader, finished * hook._num_iter)

    def _start_loader(self, loader: Iterable[Any], batch: int) -> None:
        if hasattr(loader, "start_at"):
            loader.start_at(batch, self.seed)
            if batch > 0:
                logger.info(f"The data continues at batch {batch} of seed {self.seed}")
        elif batch > 0:
            logger.warning(f"A {type(loader).__name__} cannot start in the middle: its images start from the beginning")

    def before_step(self) -> None:
        seed_generators(Purpose.STEP, self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> Dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if state_dict["seed"] != self.seed:
            logger.info(f"Random choices continue with seed {state_dict['seed']}, with which the training began")
        self.seed = state_dict["seed"]
        self._is_loaded = True
