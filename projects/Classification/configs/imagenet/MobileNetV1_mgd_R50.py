"""ResNet-50 to MobileNetV1 on ImageNet by MGD, as the authors publish it: 31.13 to 28.53 % top-1 error."""

from classification import recipes
from classification.datasets import image_folder
from classification.schedules import matching_every
from detectron2.config import LazyCall as L

from .MobileNetV1 import (  # noqa: F401
    BATCH_SIZE,
    IMAGES,
    dataloader,
    lr_multiplier,
    model,
    optimizer,
    per_epoch,
    train,
)

model.backbone = recipes.distilled(
    model.backbone,
    recipes.classifier(recipes.resnet50(), num_classes=1000),
    f"{recipes.WEIGHTS}/resnet50.pth",
    positions=["res2", "res3", "res4", "res5"],
)
dataloader.matching = recipes.train_loader(
    L(image_folder)(split="train"), recipes.centre_crop(), BATCH_SIZE, workers=32
)
train.matching = recipes.measured(IMAGES, BATCH_SIZE, **matching_every(1, per_epoch))
train.output_dir = "output/classification/imagenet_MobileNetV1_mgd_R50"
