"""MoCo-v2 of ResNet-18 on ImageNet, 200 epochs. Published (linear evaluation): 52.5 % top-1 accuracy."""

from classification import recipes
from classification.datasets import image_folder
from classification.moco import MoCo
from classification.networks import resnet
from classification.schedules import cosine_multipliers, epochwise
from detectron2.config import LazyCall as L

BATCH_SIZE = 256
IMAGES = 1_281_167
per_epoch = IMAGES // BATCH_SIZE  # the last batch is left out

model = L(MoCo)(
    backbone=L(resnet)(depth=18, norm="BN"),
    key_backbone=L(resnet)(depth=18, norm="BN"),
    pixel_mean=list(recipes.PIXEL_MEAN),
    pixel_std=list(recipes.PIXEL_STD),
    dim=128,
    queue_size=65536,
    momentum=0.999,
    temperature=0.2,
)
loader = recipes.train_loader(
    L(image_folder)(split="train"), recipes.two_view_augmented(), BATCH_SIZE, workers=32, two_views=True
)
dataloader = recipes.loaders(
    train=loader, test=recipes.test_loader(L(image_folder)(split="val"), recipes.centre_crop())
)
del dataloader.evaluator  # linear_R18.py scores what is learned here
optimizer = recipes.sgd(lr=0.03, nesterov=False)
multipliers = cosine_multipliers(200)
train = recipes.training("moco_R18", len(multipliers), per_epoch)
lr_multiplier = epochwise(multipliers, per_epoch)
