"""The teacher on CIFAR-100: ResNet-32x4."""

from classification import recipes
from classification.datasets import cifar100
from classification.networks import cifar_resnet
from classification.schedules import epochwise, iterations_per_epoch, step_multipliers
from detectron2.config import LazyCall as L

BATCH_SIZE = 64
IMAGES = 50_000
per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)

model = recipes.classifier(L(cifar_resnet)(depth=32, width=4), num_classes=100, in_feature="res4")
dataloader = recipes.loaders(
    train=recipes.train_loader(L(cifar100)(split="train"), recipes.cifar_augmented(), BATCH_SIZE),
    test=recipes.test_loader(L(cifar100)(split="test"), None),
)
optimizer = recipes.sgd(lr=0.05, weight_decay=5e-4, nesterov=False)
multipliers = step_multipliers(240, drops=[150, 180, 210])
train = recipes.training("cifar100_resnet32x4", len(multipliers), per_epoch)
lr_multiplier = epochwise(multipliers, per_epoch)
