"""A MoCo-v2 ResNet-50 teaches a MoCo-v2 ResNet-18 by MGD. Published: 52.5 to 53.6 % top-1 accuracy, linear."""

from classification import recipes
from classification.datasets import image_folder
from classification.schedules import cosine_multipliers, epochwise, matching_at
from detectron2.config import LazyCall as L

from .moco_R18 import BATCH_SIZE, IMAGES, dataloader, model, optimizer, per_epoch, train  # noqa: F401

model.backbone = recipes.distilled(
    model.backbone,
    recipes.resnet50(),
    f"{recipes.WEIGHTS}/moco_v2_r50.pth",
    positions=["res2", "res3", "res4", "res5"],
)
dataloader.matching = recipes.train_loader(
    L(image_folder)(split="train"), recipes.centre_crop(), BATCH_SIZE, workers=32
)
# The authors' code (unsup/main_moco_mgd.py) updates after these epochs, and warms up for 3.
updates = [1, 2, 3, 6, 9, 15, 26, 43, 74, 126]
train.matching = recipes.measured(IMAGES, BATCH_SIZE, **matching_at(updates, per_epoch))
lr_multiplier = epochwise(cosine_multipliers(200, warmup=3), per_epoch)
train.output_dir = "output/classification/moco_R18_mgd_R50"
