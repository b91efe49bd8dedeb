"""ResNet-32x4 to ResNet-20 on CIFAR-100 by MGD: groups of four channels at each stage."""

from classification import recipes
from classification.datasets import cifar100
from classification.networks import cifar_resnet
from classification.schedules import matching_every
from detectron2.config import LazyCall as L

from .resnet20 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401
from .resnet32x4 import BATCH_SIZE, IMAGES, per_epoch

teacher = L(cifar_resnet)(depth=32, width=4, norm="FrozenBN")
model.backbone = recipes.distilled(
    model.backbone,
    recipes.classifier(teacher, num_classes=100, in_feature="res4"),
    "output/classification/cifar100_resnet32x4/model_final.pth",
    positions=["res2", "res3", "res4"],
    # The authors' factors are for images of 224 x 224 pixels.
    losses=recipes.our_losses(),
)
dataloader.matching = recipes.train_loader(L(cifar100)(split="train"), None, BATCH_SIZE)
train.matching = recipes.measured(IMAGES, BATCH_SIZE, **matching_every(2, per_epoch))
train.output_dir = "output/classification/cifar100_resnet20_mgd_resnet32x4"
