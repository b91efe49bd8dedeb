"""MobileNetV2 on CUB-200-2011 from ImageNet's weights, without distillation. Published: 24.61 % top-1 error."""

from classification import recipes
from classification.networks import DepthwiseMobileNetV2
from detectron2.config import LazyCall as L

from .R50 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone = L(DepthwiseMobileNetV2)(norm="BN", out_features=["res5"])
model.last_channels, model.last_activation = 1280, "relu6"
train.init_checkpoint = f"{recipes.WEIGHTS}/mobilenet_v2.pth"
train.output_dir = "output/classification/cub_MobileNetV2"
