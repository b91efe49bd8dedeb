"""The ordered list of a training's hooks, the same for yaml configs and LazyConfigs."""

from typing import Any, Callable, List, Optional, Sequence

from detectron2.engine import HookBase
from detectron2.engine.hooks import IterationTimer, LRScheduler, PeriodicWriter, PreciseBN
from detectron2.utils import comm
from detectron2.utils.events import EventWriter

from mgd_det.engine.hooks.best_checkpoint import BestCheckpoint
from mgd_det.engine.hooks.checkpointing import CheckpointHook
from mgd_det.engine.hooks.ema import EMAHook
from mgd_det.engine.hooks.evaluation import EvaluationHook
from mgd_det.engine.hooks.interruption import Interruption
from mgd_det.engine.hooks.loss_normalizer import LossNormalizer
from mgd_det.engine.hooks.matching_update import MatchingUpdate
from mgd_det.engine.hooks.random_state import RandomState
from mgd_det.engine.hooks.report import ReportHook
from mgd_det.engine.training_step import TrainStep


def training_hooks(
    step: TrainStep,
    *,
    random_state: RandomState,
    checkpoints: CheckpointHook,
    evaluation: EvaluationHook,
    build_writers: Callable[[], Sequence[EventWriter]],
    log_period: int = 20,
    scheduler: Any = None,
    matching: Optional[MatchingUpdate] = None,
    precise_bn: Optional[PreciseBN] = None,
    ema: Optional[EMAHook] = None,
    best: Optional[BestCheckpoint] = None,
    report: Optional[ReportHook] = None,
) -> List[HookBase]:
    """Return the hooks to register on each rank.

    The order is Detectron2's: hooks that change the model, then checkpoints, then evaluation, because a checkpoint
    helps to debug an evaluation that fails. The writers come last, to write the scores.

    Args:
        step: the training step.
        build_writers: called on rank 0 only.
        log_period: iterations between two writes, > 0.
        scheduler: the learning rate's, as Detectron2's ``LRScheduler`` takes it; None for the trainer's.
        matching: None to train without distillation.
        precise_bn: None to leave it out.
        ema: None to average no weights.
        best: None not to keep the weights of the best evaluation.
        report: None to write none.
    """
    hooks = [
        random_state,
        matching,  # before the timer, which then leaves out its updates
        IterationTimer(),
        LRScheduler(scheduler=scheduler),
        precise_bn,
        ema,
        LossNormalizer(step.model),
        Interruption(checkpoints.checkpointer, step),
        checkpoints,
        evaluation,
        best,
    ]
    if comm.is_main_process():
        # The report reads what the writers have written.
        hooks += [PeriodicWriter(build_writers(), period=log_period), report]
    return [hook for hook in hooks if hook is not None]
