"""The hook by which a resumed training goes on with the images and draws of an uninterrupted one."""

import logging
from typing import Any, Dict, Iterable

from detectron2.engine import HookBase, hooks
from detectron2.utils import comm

from mgd_det.seeding import Purpose, seed_generators

logger = logging.getLogger(__name__)


class RandomState(HookBase):
    """Makes the random choices of a training functions of one seed, which is saved with the trainer, and the iteration.

    Before training it tells the data loader which batch to start at. Before every step it seeds the global generators,
    each rank's otherwise: a model that draws (proposals to train on, dropout) draws after a resume what it would have
    drawn without. To save the generators' states instead would not do, for only rank 0's would be in the checkpoint.
    """

    def __init__(self, seed: int = -1, batches_per_iteration: int = 1) -> None:
        """
        Args:
            seed: equal on all ranks; < 0 for a random one, in which case it is collective.
            batches_per_iteration: what a step takes from the data loader.
        """
        self.seed = seed if seed >= 0 else comm.shared_random_seed()
        self._batches_per_iteration = batches_per_iteration
        self._is_loaded = False

    def before_train(self) -> None:
        start = self.trainer.start_iter
        if start > 0 and not self._is_loaded:
            logger.warning(
                "The checkpoint has no seed of images and augmentation, for it was written by Detectron2 or an earlier "
                f"version: training goes on with those of seed {self.seed}"
            )
        trainer: Any = getattr(self.trainer, "_trainer", self.trainer)  # a DefaultTrainer has its loader in another
        self._start_loader(trainer.data_loader, start * self._batches_per_iteration)
        for hook in self.trainer._hooks:
            if isinstance(hook, hooks.PreciseBN) and not hook._disabled:
                finished = start // hook._period if hook._period > 0 else 0
                self._start_loader(hook._data_loader, finished * hook._num_iter)

    def _start_loader(self, loader: Iterable[Any], batch: int) -> None:
        if hasattr(loader, "start_at"):
            loader.start_at(batch, self.seed)
            if batch > 0:
                logger.info(f"The data goes on at batch {batch} of seed {self.seed}")
        elif batch > 0:
            logger.warning(f"A {type(loader).__name__} cannot go on where it stopped: its images start anew")

    def before_step(self) -> None:
        seed_generators(Purpose.STEP, self.seed, self.trainer.iter, comm.get_rank())

    def state_dict(self) -> Dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        if state_dict["seed"] != self.seed:
            logger.info(f"Random choices go on by seed {state_dict['seed']}, with which the training began")
        self.seed = state_dict["seed"]
        self._is_loaded = True
