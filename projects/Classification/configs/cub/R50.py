"""The teacher on CUB-200-2011: ResNet-50 from ImageNet's weights. Published: 20.02 % top-1 error."""

from classification import recipes
from classification.datasets import cub
from classification.networks import resnet
from classification.schedules import epochwise, iterations_per_epoch, step_multipliers
from detectron2.config import LazyCall as L

BATCH_SIZE = 64
IMAGES = 5994
per_epoch = iterations_per_epoch(IMAGES, BATCH_SIZE)

# The authors keep the 1000 outputs of ImageNet's classifier for the 200 classes: model.num_classes=1000.
model = recipes.classifier(L(resnet)(depth=50, norm="BN"), num_classes=200)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(cub)(split="train"), recipes.augmented(), BATCH_SIZE),
    test=recipes.test_loader(L(cub)(split="test"), recipes.centre_crop()),
)
optimizer = recipes.sgd(lr=0.01)
multipliers = step_multipliers(120, drops=[31, 61, 81])
train = recipes.training("cub_R50", len(multipliers), per_epoch)
lr_multiplier = epochwise(multipliers, per_epoch)
train.init_checkpoint = f"{recipes.WEIGHTS}/resnet50.pth"
