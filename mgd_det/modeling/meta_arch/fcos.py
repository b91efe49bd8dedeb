"""Detectron2's FCOS from a yaml config: Detectron2 itself builds it from a LazyConfig only."""

from typing import Any, Dict

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.meta_arch import fcos

from mgd_det.errors import UserError


@META_ARCH_REGISTRY.register()
class FCOS(fcos.FCOS):
    """Detectron2's FCOS (Tian et al., arXiv:2006.09214), which reads its arguments from MODEL.FCOS."""

    @configurable
    def __init__(self, **kwargs: Any) -> None:
        """Take the keyword arguments of :class:`detectron2.modeling.meta_arch.fcos.FCOS`."""
        super().__init__(**kwargs)

    def forward_training(self, images: Any, features: Any, predictions: Any, gt_instances: Any) -> Any:
        # Detectron2's box loss fails on the half precision of autocast.
        predictions = [[level.float() for level in levels] for levels in predictions]
        return super().forward_training(images, features, predictions, gt_instances)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        """Read MODEL.FCOS.

        Raises:
            UserError: the backbone does not return a level.
        """
        node = cfg.MODEL.FCOS
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        missing = [name for name in node.IN_FEATURES if name not in shapes]
        if missing:
            raise UserError(
                f"MODEL.FCOS.IN_FEATURES names {', '.join(missing)}; use features that {cfg.MODEL.BACKBONE.NAME} "
                f"returns: {', '.join(shapes)}"
            )
        levels = [shapes[name] for name in node.IN_FEATURES]
        head = fcos.FCOSHead(
            input_shape=levels,
            num_classes=node.NUM_CLASSES,
            conv_dims=[levels[0].channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
        )
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(node.IN_FEATURES),
            "num_classes": node.NUM_CLASSES,
            "center_sampling_radius": node.CENTER_SAMPLING_RADIUS,
            "focal_loss_alpha": node.FOCAL_LOSS_ALPHA,
            "focal_loss_gamma": node.FOCAL_LOSS_GAMMA,
            "test_score_thresh": node.SCORE_THRESH_TEST,
            "test_topk_candidates": node.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": node.NMS_THRESH_TEST,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }
