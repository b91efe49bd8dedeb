"""The teacher of the study on Fashion-MNIST: a ResNet-50 of a quarter of the width, from scratch."""

from classification import recipes
from classification.datasets import fashion_mnist
from classification.networks import resnet
from classification.schedules import iterations_per_epoch, step_multipliers
from detectron2.config import LazyCall as L

BATCH_SIZE = 64
SIDE = 56  # pixels: the photos of 28 x 28 are scaled up
IMAGES = 12_800

per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)
model = recipes.classifier(L(resnet)(depth=50, width=16, norm="BN"), num_classes=10)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(fashion_mnist)(split="train", images=IMAGES), recipes.upsampled(SIDE), BATCH_SIZE, 0),
    test=recipes.test_loader(L(fashion_mnist)(split="test", images=2000), recipes.upsampled(SIDE), 200, 0),
)
optimizer = recipes.sgd(lr=0.05, weight_decay=5e-4)
nodes = recipes.schedule("fashion_R50", step_multipliers(4, drops=[2, 3]), per_epoch)
train, lr_multiplier = nodes["train"], nodes["lr_multiplier"]
train.eval_period, train.device = 0, "cpu"
