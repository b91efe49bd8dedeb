"""retinanet_R_18_FPN_mgd_R50_1x.yaml as a LazyConfig."""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from mgd_det.distillation import PixelFormat
from mgd_det.modeling import distilled_backbone, named_teacher

from ..common.coco_1x import dataloader, lr_multiplier, optimizer, pixel_mean, pixel_std, train  # noqa: F401

model = get_config("common/models/retinanet.py").model
model.pixel_mean, model.pixel_std, model.input_format = pixel_mean, pixel_std, "RGB"

model.backbone.bottom_up.stages.depth = 18
del model.backbone.bottom_up.stages.stride_in_1x1  # R18's blocks have no 1x1 convolution
model.backbone.bottom_up.out_features = ["res2", "res3", "res4", "res5"]
model.backbone.bottom_up.freeze_at = 1
model.backbone.top_block.in_channels = 512
model.backbone = L(distilled_backbone)(
    student=model.backbone,
    teacher=L(named_teacher)(config_file="COCO-Detection/retinanet_R_50_FPN_1x.yaml"),
    pixels=L(PixelFormat)(format="RGB", mean="${...pixel_mean}", std="${...pixel_std}"),
    positions=["res2", "res3", "res4", "res5"],
    norm_groups=32,
)

dataloader.train.mapper.use_instance_mask = False
optimizer.lr = 0.01
train.init_checkpoint = "torchvision://resnet18"
train.output_dir = "./output/retinanet_R_18_FPN_mgd_R50_1x"
