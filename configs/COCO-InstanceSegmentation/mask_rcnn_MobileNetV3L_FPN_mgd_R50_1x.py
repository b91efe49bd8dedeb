"""mask_rcnn_MobileNetV3L_FPN_mgd_R50_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from mgd_det.distillation import PixelFormat
from mgd_det.modeling import distilled_backbone, named_teacher
from mgd_det.modeling.backbone import MobileNetV3Large

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, pixel_mean, pixel_std, train  # noqa: F401

model = get_config("common/models/mask_rcnn_fpn.py").model
model.pixel_mean, model.pixel_std, model.input_format = pixel_mean, pixel_std, "RGB"

model.backbone.bottom_up = L(MobileNetV3Large)(
    norm="FrozenBN", width_mult=1.0, out_features=["res2", "res3", "res4", "res5"], freeze_at=1
)
model.backbone = L(distilled_backbone)(
    student=model.backbone,
    teacher=L(named_teacher)(config_file="COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"),
    pixels=L(PixelFormat)(format="RGB", mean="${...pixel_mean}", std="${...pixel_std}"),
    positions=["res2", "res3", "res4", "res5"],
    norm_groups=8,
)

optimizer.lr = 0.02
train.init_checkpoint = "torchvision://mobilenet_v3_large"
train.output_dir = "./output/mask_rcnn_MobileNetV3L_FPN_mgd_R50_1x"
