"""EmbedMask: FCOS whose proposals find the pixels of their masks by embeddings.

Shape shorthand: B images, R places of the detector in all levels, D dimensions of an embedding, (h, w) the mask map.
"""

from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor
from torch.nn import functional as F

from embedmask.coupling import add_location, mask_probability
from embedmask.mask_inference import MaskInference, select_proposals
from embedmask.mask_loss import MaskLoss
from embedmask.mask_samples import image_masks, mask_samples
from embedmask.pixel_head import PixelHead
from embedmask.proposal_head import EmbedMaskHead
from mgd_det.errors import ArgumentError, UserError, named_as
from mgd_det.modeling import FCOS

# Keyword argument of a part: key of MODEL.EMBED_MASK.
_KEYS = {"threshold": "MASK_THRESH_TEST"}


@META_ARCH_REGISTRY.register()
class EmbedMask(FCOS):
    """EmbedMask (Ying et al., arXiv:1912.01954) on Detectron2's FCOS.

    It assumes a backbone whose first level, p3, has a stride of 8, so that the masks have one of 4.
    """

    @configurable
    def __init__(
        self,
        *,
        head: EmbedMaskHead,
        pixel_head: PixelHead,
        mask_loss: MaskLoss,
        mask_inference: MaskInference,
        **kwargs: Any,
    ) -> None:
        """
        Args:
            head: of classes, boxes and proposal embeddings.
            pixel_head: of pixel embeddings; reads the first of ``head_in_features``.
            mask_loss: the losses of the embeddings.
            mask_inference: makes the masks.
            kwargs: of :class:`detectron2.modeling.meta_arch.fcos.FCOS`.

        Raises:
            ArgumentError: the two heads have embeddings of different dimensions.
        """
        super().__init__(head=head, **kwargs)
        if pixel_head.dim != head.dim:
            raise ArgumentError(
                "pixel_head", f"has embeddings of {pixel_head.dim} dimensions and head of {head.dim}: give both one dim"
            )
        self.pixel_head = pixel_head
        self._mask_loss, self._mask_inference = mask_loss, mask_inference
        # The first two dimensions count in two strides of the first level: with a prior distance of 2, a place and the
        # pixels up to four of its level's strides away are close at the start.
        self._unit = 4.0 * pixel_head.stride

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Read MODEL.FCOS and MODEL.EMBED_MASK.

        Raises:
            UserError: a key has a wrong value, or MODEL.MASK_ON is False.
        """
        if not cfg.MODEL.MASK_ON:
            raise UserError("MODEL.MASK_ON is False, but EmbedMask learns from masks: set it to True")
        arguments = super().from_config(cfg)
        node, fcos = cfg.MODEL.EMBED_MASK, cfg.MODEL.FCOS
        shapes = arguments["backbone"].output_shape()
        levels = [shapes[name] for name in fcos.IN_FEATURES]
        with named_as(lambda argument: f"MODEL.EMBED_MASK.{_KEYS.get(argument, argument.upper())}"):
            head = EmbedMaskHead(
                input_shape=levels,
                conv_dims=[levels[0].channels] * fcos.NUM_CONVS,
                num_classes=fcos.NUM_CLASSES,
                prior_prob=fcos.PRIOR_PROB,
                norm=fcos.NORM,
                dim=node.DIM,
                prior_distance=node.PRIOR_DISTANCE,
            )
            pixel_head = PixelHead(input_shape=levels[0], dim=node.DIM, num_convs=node.NUM_CONVS, norm=node.NORM)
            mask_loss = MaskLoss(
                box_padding=node.BOX_PADDING, mask_weight=node.MASK_WEIGHT, smooth_weight=node.SMOOTH_WEIGHT
            )
            mask_inference = MaskInference(threshold=node.MASK_THRESH_TEST)
        return {
            **arguments,
            "head": head,
            "pixel_head": pixel_head,
            "mask_loss": mask_loss,
            "mask_inference": mask_inference,
        }

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Any:
        """Return FCOS's losses with two more or, in evaluation, detections with ``pred_masks`` (N, H, W) bool."""
        outputs = super().forward(batched_inputs)
        if self.training:
            return outputs
        for inputs, output in zip(batched_inputs, outputs):
            instances = output["instances"]
            instances.pred_masks = self._mask_inference(
                instances.mask_probabilities,
                self.pixel_head.stride,
                tuple(inputs["image"].shape[-2:]),
                instances.pred_boxes.tensor,
                instances.image_size,
            )
            instances.remove("mask_probabilities")
        return outputs

    # ------------------------------------------------------------------ training
    def forward_training(
        self, images: ImageList, features: List[Tensor], predictions: Any, gt_instances: List[Instances]
    ) -> Dict[str, Tensor]:
        """Return the losses.

        Raises:
            UserError: an image has objects without masks.
        """
        # Detectron2's mapper gives an image without objects no gt_masks.
        if not all(instances.has("gt_masks") for instances in gt_instances if len(instances) > 0):
            raise UserError(
                "an image has objects without masks to learn from: set MODEL.MASK_ON True (LazyConfig: "
                "dataloader.train.mapper.use_instance_mask), and use a data set with segmentations"
            )
        losses = super().forward_training(images, features, predictions[:3], gt_instances)
        anchors = self.anchor_generator(features)
        pixels = self._pixel_embeddings(features)
        embeddings, margins = self._proposals(predictions, anchors)
        height, width = pixels.shape[-2:]
        samples = [
            mask_samples(
                self._objects_of_places(anchors, instances),
                instances.gt_boxes.tensor,
                image_masks(instances, pixels.device),
                instances.image_size,
                (height, width),
                self.pixel_head.stride,
                self._mask_loss.box_padding,
            )
            for instances in gt_instances
        ]
        return {**losses, **self._mask_loss(pixels, embeddings, margins, samples)}

    @torch.no_grad()
    def label_anchors(self, anchors: List[Boxes], gt_instances: List[Instances]) -> Tuple[List[Tensor], List[Tensor]]:
        """Return classes (R,), ``num_classes`` for none, and boxes (R, 4) of the places of each image.

        A place beside the mask of its object has no mask to learn, so it must not detect the object either.
        """
        classes, boxes = [], []
        for instances in gt_instances:
            objects = self._objects_of_places(anchors, instances)  # -1, for none, is what is appended
            classes.append(F.pad(instances.gt_classes, (0, 1), value=self.num_classes)[objects])
            boxes.append(F.pad(instances.gt_boxes.tensor, (0, 0, 0, 1))[objects])
        return classes, boxes

    def _pixel_embeddings(self, features: List[Tensor]) -> Tensor:
        """Return (B, D, h, w) with each pixel's location."""
        embeddings = self.pixel_head(features[0])
        height, width = embeddings.shape[-2:]
        y, x = ((torch.arange(size, device=self.device) + 0.5) * self.pixel_head.stride for size in (height, width))
        locations = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)
        return add_location(embeddings.flatten(2), locations, self._unit, dim=1).unflatten(2, (height, width))

    def _proposals(self, predictions: Any, anchors: List[Boxes]) -> Tuple[Tensor, Tensor]:
        """Return embeddings, with each place's location, and margins, (B, R, D)."""
        dim = self.head.dim
        embeddings, margins = (
            torch.cat([permute_to_N_HWA_K(level, dim) for level in levels], dim=1) for levels in predictions[3:]
        )
        return add_location(embeddings, Boxes.cat(anchors).get_centers(), self._unit, dim=2), margins

    @torch.no_grad()
    def _objects_of_places(self, anchors: List[Boxes], instances: Instances) -> Tensor:
        """Return the object of each place, (R,); -1 for none: as FCOS assigns it, among those whose mask it lies on."""
        if len(instances) == 0:
            return torch.full((sum(map(len, anchors)),), -1, device=self.device)
        x, y = Boxes.cat(anchors).get_centers().long().unbind(dim=1)
        height, width = instances.image_size  # a place in the padding is in no box
        on_mask = image_masks(instances, self.device)[:, y.clamp(max=height - 1), x.clamp(max=width - 1)]
        quality, objects = (self._match_anchors(instances.gt_boxes, anchors) * on_mask).max(dim=0)
        return objects.masked_fill(quality <= 0, -1)

    # ------------------------------------------------------------------ evaluation
    def forward_inference(self, images: ImageList, features: List[Tensor], predictions: Any) -> List[Instances]:
        """Return detections with ``mask_probabilities`` (N, h, w), in pixels of the network's image."""
        logits, deltas, centerness = self._transpose_dense_predictions(predictions[:3], [self.num_classes, 4, 1])
        anchors = self.anchor_generator(features)
        embeddings, margins = self._proposals(predictions, anchors)
        pixels = self._pixel_embeddings(features)
        results = []
        for image, image_size in enumerate(images.image_sizes):
            # FCOS's score: the geometric mean of class probability and centre-ness (arXiv:2006.09214, equation 4).
            scores = [(c[image].sigmoid() * n[image].sigmoid()).sqrt() for c, n in zip(logits, centerness)]
            boxes = [self.box2box_transform.apply_deltas(d[image], a.tensor) for d, a in zip(deltas, anchors)]
            result = select_proposals(
                scores,
                boxes,
                image_size,
                self.test_score_thresh,
                self.test_topk_candidates,
                self.test_nms_thresh,
                self.max_detections_per_image,
            )
            chosen = result.places
            result.remove("places")
            probabilities = mask_probability(
                pixels[image].flatten(1), embeddings[image, chosen], margins[image, chosen]
            )
            result.mask_probabilities = probabilities.unflatten(1, pixels.shape[-2:])
            results.append(result)
        return results
