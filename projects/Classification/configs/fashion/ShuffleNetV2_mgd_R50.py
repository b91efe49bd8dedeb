"""A narrow ResNet-50 to a narrow ShuffleNetV2 on Fashion-MNIST by MGD, with mgd_det's own scale of the loss."""

from classification import recipes
from classification.networks import resnet
from classification.schedules import matching_every
from detectron2.config import LazyCall as L

from .ShuffleNetV2 import dataloader, lr_multiplier, model, optimizer, per_epoch, train  # noqa: F401

model.backbone = recipes.distilled(
    model.backbone,
    recipes.classifier(L(resnet)(depth=50, width=16, norm="FrozenBN"), num_classes=10),
    "output/classification/fashion_R50/model_final.pth",
    positions=["res3", "res4", "res5"],
    losses=recipes.our_losses(),
)
# From the features of the training itself: a forward of its own costs time that the study does not have.
train.matching = {"source": "online", "num_batches": per_epoch // 2, **matching_every(1, per_epoch)}
train.output_dir = "output/classification/fashion_ShuffleNetV2_mgd_R50"
