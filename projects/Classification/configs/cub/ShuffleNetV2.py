"""ShuffleNetV2 on CUB-200-2011 from ImageNet's weights, without distillation. Published: 31.39 % top-1 error."""

from classification import recipes
from detectron2.config import LazyCall as L

from mgd_det.modeling import ShuffleNetV2

from .R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone = L(ShuffleNetV2)(norm="BN", out_features=["res5"])
model.last_channels, model.last_activation = 1024, "relu"
train.init_checkpoint = f"{recipes.WEIGHTS}/shufflenet_v2_x1_0.pth"
train.output_dir = "output/classification/cub_ShuffleNetV2"
