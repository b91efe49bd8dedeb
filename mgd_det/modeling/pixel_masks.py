"""The masks of a training forward: from its ground truth, or from the scores of the teacher's heads."""

from typing import Any, Dict, List, Mapping, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.meta_arch.fcos import FCOSHead
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator import RPN

from mgd_det.distillation import Padding, Teacher, box_mask, score_mask
from mgd_det.errors import ArgumentError, UserError, check_choice, check_not_negative
from mgd_det.modeling.head_distillation.compatibility import kind_of

Features = Dict[str, torch.Tensor]


class PixelMask:
    """Makes the masks that multiply the losses of positions: ``MODEL.MGD.LOSS.MASK``.

    Attributes:
        needs_scores: whether it reads the outputs of the teacher's backbone.
    """

    def __init__(self, teacher: Teacher, *, name: str, foreground: float = 1.0, background: float = 0.5) -> None:
        """
        Args:
            teacher: its whole detector, for "scores".
            name: "boxes" (:func:`box_mask`) or "scores" (:func:`score_mask`).
            foreground: of "boxes", see :func:`box_mask`.
            background: of "boxes", see :func:`box_mask`.

        Raises:
            ArgumentError: a wrong value, or a teacher without scores.
        """
        check_choice("pixel_mask.name", name, ("boxes", "scores"))
        self._foreground = check_not_negative("pixel_mask.foreground", foreground)
        self._background = check_not_negative("pixel_mask.background", background)
        if self._foreground == self._background == 0:
            raise ArgumentError(
                "pixel_mask.foreground", "is 0 and so is the weight of the background: give one of them > 0"
            )
        self.needs_scores = name == "scores"
        self._teacher = teacher
        if self.needs_scores:
            detector: Any = teacher.detector
            if not isinstance(detector, DenseDetector) and not isinstance(_proposal_generator(detector), RPN):
                raise ArgumentError(
                    "pixel_mask.name",
                    f"is 'scores', but the teacher, a {kind_of(detector)}, is no RetinaNet, FCOS or R-CNN with an RPN: "
                    "use 'boxes', or give such a detector (in a LazyConfig: named_teacher(whole_detector=True))",
                )

    @torch.no_grad()
    def __call__(
        self,
        maps: Mapping[str, torch.Tensor],
        padding: Padding,
        inputs: Sequence[Mapping[str, Any]],
        teacher_outputs: Features,
    ) -> Features:
        """Return the mask of each map, (B, 1, H, W) float32. Maps of one size share theirs.

        Args:
            maps: features by name of position, (B, C, H, W).
            padding: of the images.
            inputs: Detectron2's training inputs.
            teacher_outputs: the outputs of the teacher's backbone for the same images; read for "scores".

        Raises:
            UserError: an input has no boxes that are parallel to the image, for "boxes".
        """
        sizes = {name: (x.shape[2], x.shape[3]) for name, x in maps.items()}
        masks: Dict[Tuple[int, int], torch.Tensor] = {}
        if self.needs_scores:
            scores = self._scores(teacher_outputs)
            for size in set(sizes.values()):
                masks[size] = score_mask(_of_size(scores, size), padding)
        else:
            boxes, device = _ground_truth(inputs), next(iter(maps.values())).device
            for size in set(sizes.values()):
                mask = box_mask(boxes, padding, size, self._foreground, self._background)
                masks[size] = mask.to(device, non_blocking=True)
        return {name: masks[size] for name, size in sizes.items()}

    def _scores(self, outputs: Features) -> List[torch.Tensor]:
        """Return each level's highest score over anchors and classes at each pixel, (B, 1, H, W) float32."""
        detector: Any = self._teacher.detector
        if isinstance(detector, DenseDetector):
            levels, head = [outputs[name] for name in detector.head_in_features], detector.head
            if type(head) in (RetinaNetHead, FCOSHead):  # without the convolutions of the boxes
                logits = [head.cls_score(head.cls_subnet(level)) for level in levels]
            else:
                logits = head(levels)[0]
        else:
            rpn = _proposal_generator(detector)
            logits = rpn.rpn_head([outputs[name] for name in rpn.in_features])[0]
        return [x.amax(dim=1, keepdim=True).float().sigmoid() for x in logits]


def _proposal_generator(detector: Any) -> Any:
    return getattr(detector, "proposal_generator", None)


def _of_size(scores: Sequence[torch.Tensor], size: Tuple[int, int]) -> torch.Tensor:
    """Return the scores of the level of this size, or else those of the level closest to it, interpolated."""
    closest = min(scores, key=lambda x: abs(x.shape[2] - size[0]) + abs(x.shape[3] - size[1]))
    if closest.shape[2:] == size:
        return closest
    return F.interpolate(closest, size, mode="bilinear", align_corners=False)


def _ground_truth(inputs: Sequence[Mapping[str, Any]]) -> List[torch.Tensor]:
    """Return the boxes (N, 4) of each image, on the CPU if Detectron2's mapper made them."""
    boxes = []
    for image in inputs:
        given = image["instances"].gt_boxes.tensor if "instances" in image else torch.zeros(0)
        if given.dim() != 2 or given.shape[1] != 4:
            name = image.get("file_name", "an image")
            raise UserError(
                f"MODEL.MGD.LOSS.MASK.NAME is 'boxes', but the ground truth of {name} has no boxes of left, top, right "
                "and bottom: use 'scores' or ''"
            )
        boxes.append(given)
    return boxes
