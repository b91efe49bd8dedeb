"""The teacher of the unsupervised study on Fashion-MNIST: MoCo-v2 of a ResNet-18 of half the width."""

from classification import recipes
from classification.datasets import fashion_mnist
from classification.moco import MoCo
from classification.networks import resnet
from classification.views import grey_view
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.optim import AdamW

BATCH_SIZE = 64
SIDE = 32  # pixels of a view; res5 has one pixel
IMAGES = 10_240
EPOCHS = 3

per_epoch = IMAGES // BATCH_SIZE
model = L(MoCo)(
    backbone=L(resnet)(depth=18, width=32, norm="BN"),
    key_backbone=L(resnet)(depth=18, width=32, norm="BN"),
    pixel_mean=list(recipes.PIXEL_MEAN),
    pixel_std=list(recipes.PIXEL_STD),
    dim=64,
    queue_size=2048,
    momentum=0.99,  # the authors' 0.999 remembers more steps than this training has
    temperature=0.2,
)
views = L(grey_view)(size=SIDE)
dataloader = recipes.loaders(
    train=recipes.train_loader(
        L(fashion_mnist)(split="train", images=IMAGES), views, BATCH_SIZE, workers=0, two_views=True
    ),
    test=recipes.test_loader(L(fashion_mnist)(split="test", images=2000, side=SIDE), None, batch_size=200, workers=0),
)
del dataloader.evaluator  # linear_R18_wide.py and linear_R18.py score what is learned here
optimizer = L(AdamW)(params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.002, weight_decay=0.01)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
train = recipes.training("fashion_moco_R18_wide", EPOCHS, per_epoch)
train.eval_period, train.device = 0, "cpu"
