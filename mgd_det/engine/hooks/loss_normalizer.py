"""The hook that saves what RetinaNet and FCOS divide their losses by."""

from typing import Any, Dict, Optional

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from mgd_det.modeling import unwrapped


class LossNormalizer(HookBase):
    """Saves the running mean ``loss_normalizer`` of Detectron2's dense detectors with the trainer.

    It is no buffer of the model: without it, a resumed training would begin with losses of another scale. Each rank
    has one of its own images, so that of all ranks is saved. With other detectors the hook does nothing.

    It is collective: put it at the same place of the hook list on every rank, before the checkpointer.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: the detector, maybe in DistributedDataParallel.
        """
        self._detector: Any = unwrapped(model)
        self._of_ranks: Optional[torch.Tensor] = None  # (ranks,), on the device: read when it is saved

    def after_step(self) -> None:
        own = getattr(self._detector, "loss_normalizer", None)
        if own is None or comm.get_world_size() == 1:
            return
        # Filled on the device: a copy would wait for the step that it has still to do.
        device = next(self._detector.parameters()).device
        value = torch.full((1,), float(own), dtype=torch.float64, device=device)
        of_ranks = [torch.empty_like(value) for _ in range(comm.get_world_size())]
        dist.all_gather(of_ranks, value)
        self._of_ranks = torch.cat(of_ranks)

    def state_dict(self) -> Dict[str, Any]:
        """One number, or one of each rank; empty before the first step, and for a detector without one."""
        if self._of_ranks is not None:
            return {"loss_normalizer": self._of_ranks.tolist()}
        own = getattr(self._detector, "loss_normalizer", None)
        return {} if own is None else {"loss_normalizer": float(own)}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; where that was empty, the detector begins anew.

        Of another number of ranks it takes the mean.
        """
        if "loss_normalizer" in state_dict:
            saved = state_dict["loss_normalizer"]
            of_ranks = saved if isinstance(saved, list) else [saved] * comm.get_world_size()
            is_same = len(of_ranks) == comm.get_world_size()
            own = of_ranks[comm.get_rank()] if is_same else sum(of_ranks) / len(of_ranks)
            self._detector.loss_normalizer = own
        elif hasattr(self._detector, "loss_normalizer"):
            del self._detector.loss_normalizer
        self._of_ranks = None
