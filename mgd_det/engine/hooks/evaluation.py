"""The hook that evaluates, where the training has come to its end and not to an error."""

from detectron2.engine import hooks


class EvaluationHook(hooks.EvalHook):
    """Detectron2's hook, which does not evaluate after an error in the last iteration.

    There Detectron2's does, on the ranks that had the error: they would wait in the evaluation for the others, which
    wait in the step for them.
    """

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter:
            super().after_train()
