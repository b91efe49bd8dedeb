"""MobileNetV1 on ImageNet, without distillation: as MobileNetV1_mgd_R50.py. Published: 31.13 % top-1 error."""

from classification import recipes
from classification.datasets import image_folder
from classification.networks import mobilenet_v1
from classification.schedules import epochwise, iterations_per_epoch, step_multipliers
from detectron2.config import LazyCall as L

BATCH_SIZE = 256
IMAGES = 1_281_167
per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)

model = recipes.classifier(L(mobilenet_v1)(norm="BN", out_features=["res5"]), num_classes=1000)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(image_folder)(split="train"), recipes.augmented(), BATCH_SIZE, workers=32),
    test=recipes.test_loader(L(image_folder)(split="val"), recipes.centre_crop()),
)
optimizer = recipes.sgd(lr=0.1)
# 120 epochs after 10 of warm-up; a tenth at 31, 61 and 81, counted without it.
multipliers = step_multipliers(130, drops=[41, 71, 91], warmup=10)
train = recipes.training("imagenet_MobileNetV1", len(multipliers), per_epoch)
lr_multiplier = epochwise(multipliers, per_epoch)
