"""The hook that saves the number by which RetinaNet and FCOS divide their losses."""

from typing import Any, Dict

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from mgd_det.checkpoint.training_checkpointer import complete_over_ranks
from mgd_det.modeling import unwrapped


class LossNormalizer(HookBase):
    """Saves the running mean ``loss_normalizer`` of Detectron2's dense detectors with the trainer.

    It is not a buffer of the model, so without the hook a resumed training would begin with losses of another scale.
    Each rank has its own mean, over its own images, and a checkpoint holds them all. For other detectors the hook does
    nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the detector; may be in DistributedDataParallel.
        """
        self._detector: Any = unwrapped(model)

    def state_dict(self) -> Dict[str, Any]:
        """Return this rank's mean or, in a checkpoint of several ranks, the list of all ranks' means.

        The dict is empty before the first step and for a detector without the mean.
        """
        own = getattr(self._detector, "loss_normalizer", None)
        if own is None:
            return {}
        state: Dict[str, Any] = {"loss_normalizer": float(own)}
        if comm.get_world_size() > 1:
            complete_over_ranks("LossNormalizer", lambda: state.update(loss_normalizer=comm.all_gather(float(own))))
        return state

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Restore a saved state: each rank its own mean, or their average if the number of ranks has changed."""
        if "loss_normalizer" in state_dict:
            saved = state_dict["loss_normalizer"]
            of_ranks = saved if isinstance(saved, list) else [saved]
            is_same = len(of_ranks) == comm.get_world_size()
            self._detector.loss_normalizer = of_ranks[comm.get_rank()] if is_same else sum(of_ranks) / len(of_ranks)
        elif hasattr(self._detector, "loss_normalizer"):
            del self._detector.loss_normalizer
