"""The hook that averages the weights over the training (EMA), and the evaluation of both."""

import logging
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional

import torch
from detectron2.engine import HookBase
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mgd_det.checkpoint.training_checkpointer import TrainingCheckpointer
from mgd_det.errors import ArgumentError

logger = logging.getLogger(__name__)

EMA_CHECKPOINT = "model_ema"  # its name without ".pth"
EMA_PREFIX = "ema"  # of the scores: "ema/bbox/AP"


class EMAHook(HookBase):
    """Keeps an exponential moving average of the detector's weights, and saves it at the end as a plain checkpoint.

    The average starts as the weights after iteration ``start``. The n-th step after that makes it
    ``d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``: the warm-up of TensorFlow's
    ExponentialMovingAverage, by which the first weights are soon forgotten. (Averages of weights: Polyak and Juditsky,
    SIAM J. Control Optim. 1992; as a better model than the last one: Tarvainen and Valpola, NeurIPS 2017.)

    All floating-point tensors of the state dict are averaged, the running statistics of batch norm too: those of the
    last step belong to the last weights, their average fits averaged weights better. Whole numbers (batch norm's count
    of batches) are copied. What training does not change, such as FrozenBatchNorm2d, is equal to its average.

    A checkpoint of the training holds the average and n, so that a resumed training continues with both. Each rank
    averages its own model: DistributedDataParallel makes their parameters equal, and a checkpoint has the statistics
    of rank 0, as it has those of the model. The average takes as much memory as the weights, and an evaluation of it
    as much again.

    Register it on every rank, after the hooks that change the model and before those that save it.
    """

    def __init__(
        self, checkpointer: TrainingCheckpointer, iterations: int, *, decay: float = 0.999, start: int = 0
    ) -> None:
        """
        Args:
            checkpointer: the training's; the weights are those of its model.
            iterations: length of the training.
            decay: weight of the average in an update, in (0, 1). The average is over about 1 / (1 - decay) steps.
            start: the first iteration to average, in [0, iterations).

        Raises:
            ArgumentError: ``decay`` or ``start`` is not as above.
        """
        if isinstance(decay, bool) or not (isinstance(decay, (int, float)) and 0 < decay < 1):
            raise ArgumentError("decay", f"is {decay!r}; give a number between 0 and 1, such as 0.999")
        if type(start) is not int or not 0 <= start < iterations:
            raise ArgumentError("start", f"is {start!r}; the training has the iterations 0 to {iterations - 1}")
        self._checkpointer = checkpointer
        self._decay, self._start = decay, start
        self._updates = 0
        self._average: Dict[str, torch.Tensor] = {}

    @property
    def weights(self) -> Mapping[str, torch.Tensor]:
        """The averaged state dict; empty before the first iteration to average."""
        return self._average

    def before_train(self) -> None:
        if self.trainer.start_iter > self._start and not self._average:
            logger.warning(
                "The checkpoint has no averaged weights (SOLVER.EMA, train.ema): the average starts at iteration "
                f"{self.trainer.start_iter}"
            )

    def after_step(self) -> None:
        if self.trainer.iter < self._start:
            return
        model = self._model_tensors()
        if not self._average:
            self._average = {name: tensor.clone() for name, tensor in model.items()}
            return
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        averages: List[Any] = []
        weights: List[Any] = []
        for name, average in self._average.items():
            if average.is_floating_point():
                averages.append(average)
                weights.append(model[name])
            else:
                average.copy_(model[name])
        get_ema_multi_avg_fn(decay)(averages, weights, self._updates)

    def after_train(self) -> None:
        if self.trainer.iter == self.trainer.max_iter and self._average:
            self._checkpointer.save_weights(EMA_CHECKPOINT, self._average, iteration=self.trainer.iter - 1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights for the ``with`` block, and its own again at the end."""
        own = {name: tensor.clone() for name, tensor in self._model_tensors().items()}
        try:
            self._set(self._average)
            yield
        finally:
            self._set(own)

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self._model_tensors().items():
                tensor.copy_(tensors[name])

    def _model_tensors(self) -> Mapping[str, torch.Tensor]:
        # They share the model's memory. Asked for each time, because a hook may give the model other tensors:
        # PreciseBN replaces the running statistics instead of filling them.
        return self._checkpointer.model.state_dict()

    def state_dict(self) -> Dict[str, Any]:
        return {"updates": self._updates, "average": self._average} if self._average else {}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore a saved average.

        Raises:
            ValueError: it is that of another network.
        """
        saved, model = state_dict["average"], self._model_tensors()
        shapes = [{name: tensor.shape for name, tensor in tensors.items()} for tensors in (saved, model)]
        if shapes[0] != shapes[1]:
            raise ValueError("its averaged weights (EMA) are those of another network")
        self._average = {name: saved[name].to(tensor.device, copy=True) for name, tensor in model.items()}
        self._updates = state_dict["updates"]


def evaluate_both(evaluate: Callable[[], Any], ema: Optional[EMAHook]) -> Any:
    """Evaluate the model and its averaged weights. Collective.

    Args:
        evaluate: returns the nested dict of scores on rank 0.
        ema: None for the model alone.

    Returns:
        The model's scores, with those of the averaged weights, if there are any yet, in an entry "ema".
    """
    if ema is None or not ema.weights:
        return evaluate()
    logger.info("Evaluating the averaged weights (EMA) ...")
    with ema.applied():
        averaged = evaluate()
    logger.info("Evaluating the weights of the last iteration ...")
    scores = evaluate()  # last, so that its predictions stay in the output folder
    return {**scores, EMA_PREFIX: averaged} if scores else scores
