"""The hook that saves what RetinaNet and FCOS divide their losses by."""

from typing import Any, Dict

from detectron2.engine import HookBase
from torch import nn

from mgd_det.modeling.backbone import unwrapped


class LossNormalizer(HookBase):
    """Saves the running mean ``loss_normalizer`` of Detectron2's dense detectors with the trainer.

    It is no buffer of the model: without it, a resumed training would begin with losses of another scale. With other
    detectors the hook does nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the detector, maybe in DistributedDataParallel.
        """
        self._detector = unwrapped(model)

    def state_dict(self) -> Dict[str, Any]:
        """Empty before the first forward, and for a detector without one."""
        normalizer = getattr(self._detector, "loss_normalizer", None)
        return {} if normalizer is None else {"loss_normalizer": float(normalizer)}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; where that was empty, the detector begins anew."""
        if "loss_normalizer" in state_dict:
            self._detector.loss_normalizer = state_dict["loss_normalizer"]
        elif hasattr(self._detector, "loss_normalizer"):
            del self._detector.loss_normalizer
