"""Top-1 and top-5 accuracy of a classifier."""

from typing import Any, Dict, List, Optional

import torch
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm


class AccuracyEvaluator(DatasetEvaluator):
    """Counts the images whose label is among the 1 and the 5 largest logits; all in percent, over all ranks.

    Of fewer than five classes, top-5 is 100.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._images, self._hits = 0, torch.zeros(5, dtype=torch.int64)

    def process(self, inputs: List[Dict[str, Any]], outputs: List[Dict[str, torch.Tensor]]) -> None:
        """Count a batch: "label" of the inputs, "logits" (K,) of the outputs."""
        logits = torch.stack([output["logits"] for output in outputs]).float()
        labels = torch.tensor([x["label"] for x in inputs], device=logits.device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (best == labels.unsqueeze(1)).cumsum(dim=1).sum(dim=0).cpu()
        self._hits += torch.cat([hits, hits[-1:].expand(5 - len(hits))])
        self._images += len(labels)

    def evaluate(self) -> Optional[Dict[str, Dict[str, float]]]:
        """Return {"accuracy": top1, top5, error1 and error5, in percent} on rank 0, None on other ranks."""
        counts = comm.gather((self._images, self._hits))
        if not comm.is_main_process():
            return None
        images = sum(number for number, _ in counts)
        hits = sum(number for _, number in counts)
        top1, top5 = (100.0 * int(hits[i]) / max(images, 1) for i in (0, 4))
        return {"accuracy": {"top1": top1, "top5": top5, "error1": 100.0 - top1, "error5": 100.0 - top5}}
