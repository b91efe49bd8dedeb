"""The teacher of the study on Fashion-MNIST: a ResNet-50 of a quarter of the width, from scratch."""

from classification import recipes
from classification.datasets import fashion_mnist
from classification.networks import resnet
from classification.schedules import iterations_per_epoch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler
from torch.optim import AdamW

BATCH_SIZE = 64
SIDE = 56  # pixels: the photos of 28 x 28 are scaled up
IMAGES = 9_600
EPOCHS = 3

per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)
model = recipes.classifier(L(resnet)(depth=50, width=16, norm="BN"), num_classes=10, channels_last=True)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(fashion_mnist)(split="train", images=IMAGES, side=SIDE), None, BATCH_SIZE, workers=0),
    test=recipes.test_loader(L(fashion_mnist)(split="test", images=2000, side=SIDE), None, batch_size=200, workers=0),
)
optimizer = L(AdamW)(params=L(get_default_optimizer_params)(weight_decay_norm=0.0), lr=0.003, weight_decay=0.01)
lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=0.0)
train = recipes.training("fashion_R50", EPOCHS, per_epoch)
train.eval_period, train.device = 0, "cpu"
