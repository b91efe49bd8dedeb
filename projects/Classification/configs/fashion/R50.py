"""The teacher of the study on Fashion-MNIST: a ResNet-50 of a quarter of the width, from scratch."""

from classification import recipes
from classification.datasets import fashion_mnist
from classification.networks import resnet
from classification.schedules import iterations_per_epoch
from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import CosineParamScheduler

BATCH_SIZE = 64
SIDE = 56  # pixels: the photos of 28 x 28 are scaled up
IMAGES = 12_800
EPOCHS = 3

per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)
model = recipes.classifier(L(resnet)(depth=50, width=16, norm="BN"), num_classes=10, channels_last=True)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(fashion_mnist)(split="train", images=IMAGES), recipes.upsampled(SIDE), BATCH_SIZE, 0),
    test=recipes.test_loader(L(fashion_mnist)(split="test", images=2000), recipes.upsampled(SIDE), 200, 0),
)
optimizer = recipes.sgd(lr=0.1, weight_decay=5e-4)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
train = recipes.training("fashion_R50", EPOCHS, per_epoch)
train.eval_period, train.device = 0, "cpu"
