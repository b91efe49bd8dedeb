"""A MoCo-v2 ResNet-18 teaches one of half its width on Fashion-MNIST by MGD, with mgd_det's own scale of the loss."""

from classification import recipes
from classification.networks import resnet
from classification.schedules import matching_every
from detectron2.config import LazyCall as L

from .moco_R18 import dataloader, lr_multiplier, model, optimizer, per_epoch, train  # noqa: F401

model.backbone = recipes.distilled(
    model.backbone,
    L(resnet)(depth=18, width=32, norm="FrozenBN"),
    "output/classification/fashion_moco_R18_wide/model_final.pth",
    positions=["res2", "res3", "res4"],  # a map of one pixel, as that of res5, has no pattern to match
    losses=recipes.our_losses(),
)
# From the features of the training itself: a forward of its own costs time that the study does not have.
train.matching = {"source": "online", "num_batches": per_epoch // 2, **matching_every(1, per_epoch)}
train.output_dir = "output/classification/fashion_moco_R18_mgd_wide"
