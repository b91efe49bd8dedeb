"""The number of the iteration at the end of a training that has no step left to do."""

from detectron2.engine import TrainerBase


class EndsAtMaxIter(TrainerBase):
    """A trainer whose hooks see ``iter == max_iter`` in after_train whenever all steps are done.

    That is how a hook tells the end of a training from an error. Detectron2's loop adds one to the number of the last
    step even where there is no step: a training that was stopped before its last evaluation and is resumed would end
    with ``max_iter + 1``, and without that evaluation.

    Put it before the other base classes.
    """

    iter: int
    max_iter: int

    def after_train(self) -> None:
        self.iter = min(self.iter, self.max_iter)
        super().after_train()
