"""fcos_MobileNetV2_FPN_mgd_R50_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from mgd_det.distillation import PixelFormat
from mgd_det.modeling import FCOS, distilled_backbone, named_teacher
from mgd_det.modeling.backbone import MobileNetV2

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, pixel_mean, pixel_std, train  # noqa: F401

model = get_config("common/models/fcos.py").model
model._target_ = FCOS  # Detectron2's own fails in mixed precision
model.pixel_mean, model.pixel_std = pixel_mean, pixel_std

model.backbone.bottom_up = L(MobileNetV2)(
    norm="FrozenBN", width_mult=1.0, out_features=["res2", "res3", "res4", "res5"], freeze_at=1
)
model.backbone = L(distilled_backbone)(
    student=model.backbone,
    # Detectron2's model zoo has no FCOS weights, so a RetinaNet is the teacher: only the backbones meet.
    teacher=L(named_teacher)(config_file="COCO-Detection/retinanet_R_50_FPN_3x.yaml"),
    pixels=L(PixelFormat)(format="RGB", mean="${...pixel_mean}", std="${...pixel_std}"),
    positions=["res2", "res3", "res4", "res5"],
    norm_groups=8,
)

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
train.init_checkpoint = "torchvision://mobilenet_v2"
train.output_dir = "./output/fcos_MobileNetV2_FPN_mgd_R50_1x"
