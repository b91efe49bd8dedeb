"""The hook that evaluates the model during training and shares the scores with all ranks."""

from typing import Any, Callable

from detectron2.engine import hooks
from detectron2.utils import comm


class EvaluationHook(hooks.EvalHook):
    """Detectron2's hook with two differences.

    - Every rank's storage gets rank 0's scores, so that ``BestCheckpointer``, whose save is collective, decides the
      same on every rank.
    - It does not evaluate after an error in the last iteration. Detectron2's does, on the ranks that had the error:
      they would wait in the evaluation while the others wait for them in the step.
    """

    def __init__(self, period: int, evaluate: Callable[[], Any]) -> None:
        """
        Args:
            period: iterations between evaluations; 0 to evaluate only at the end.
            evaluate: collective; returns a nested dict of scores on rank 0.
        """
        super().__init__(period, lambda: comm.all_gather(evaluate())[0])

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:
            super().after_train()
