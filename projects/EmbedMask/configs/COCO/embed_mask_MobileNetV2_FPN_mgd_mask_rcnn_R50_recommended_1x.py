"""embed_mask_MobileNetV2_FPN_mgd_mask_rcnn_R50_recommended_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L

from mgd_det.distillation import PixelFormat
from mgd_det.modeling import distilled_backbone, named_teacher

from .embed_mask_MobileNetV2_FPN_1x import (  # noqa: F401
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    pixel_mean,
    pixel_std,
    train,
)

model.backbone = L(distilled_backbone)(
    student=model.backbone,
    teacher=L(named_teacher)(config_file="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"),
    pixels=L(PixelFormat)(format="RGB", mean="${...pixel_mean}", std="${...pixel_std}"),
    positions=["p3", "p4", "p5"],
    losses={"pkd": {"weights": [10.0]}},
)
train.inherit = ["fpn"]
train.output_dir = "./output/embed_mask/coco/MobileNetV2_FPN_mgd_mask_rcnn_R50_recommended_1x"
