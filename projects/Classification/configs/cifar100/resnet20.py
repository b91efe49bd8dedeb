"""ResNet-20 on CIFAR-100, without distillation."""

from .resnet32x4 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.depth, model.backbone.width = 20, 1
train.output_dir = "output/classification/cifar100_resnet20"
