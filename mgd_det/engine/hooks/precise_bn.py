"""The hook that computes a student's batch norm statistics on many batches before an evaluation."""

from contextlib import contextmanager
from typing import Any, Iterable, Iterator, List

from detectron2.engine import hooks
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn

from mgd_det.distillation import Distiller
from mgd_det.modeling.modes import evaluating, unwrapped


class StudentPreciseBN(hooks.PreciseBN):
    """Detectron2's hook with two differences, since its forwards do not distil and are no steps of the training:

    - The norm layers of a distiller, which no such forward reaches, keep their statistics.
    - So does RetinaNet's loss normalizer, which every forward in training mode moves.
    """

    def __init__(self, period: int, model: nn.Module, data_loader: Iterable[Any], num_iter: int) -> None:
        """
        Args:
            period: steps between updates; 0 for one update at the end.
            model: the detector in training mode, maybe within DistributedDataParallel.
            data_loader: of training images.
            num_iter: batches of an update, > 0.
        """
        with _distiller_in_eval_mode(model):
            super().__init__(period, model, data_loader, num_iter)
        self._student = model

    def update_stats(self) -> None:
        detector: Any = unwrapped(self._student)
        normalizer = getattr(detector, "loss_normalizer", None)
        with _distiller_in_eval_mode(self._student):
            super().update_stats()
        if normalizer is not None:
            detector.loss_normalizer = normalizer


def student_batch_norms(model: nn.Module) -> List[nn.Module]:
    """Return the batch norms in training mode, without those of a distiller."""
    with _distiller_in_eval_mode(model):
        return list(get_bn_modules(model))


@contextmanager
def _distiller_in_eval_mode(model: nn.Module) -> Iterator[None]:
    distiller = next((module for module in model.modules() if isinstance(module, Distiller)), nn.Identity())
    with evaluating(distiller):
        yield
