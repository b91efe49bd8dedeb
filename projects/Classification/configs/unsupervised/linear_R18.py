"""Linear evaluation of a ResNet-18 that MoCo-v2 has trained: train.init_checkpoint names its model_final.pth."""

from classification import recipes
from classification.datasets import image_folder
from classification.networks import resnet
from classification.schedules import epochwise, iterations_per_epoch, step_multipliers
from detectron2.config import LazyCall as L

BATCH_SIZE = 256
per_epoch = iterations_per_epoch(1_281_167, BATCH_SIZE)

# Frozen, batch norms too; only the linear layer learns.
model = recipes.classifier(L(resnet)(depth=18, norm="BN", freeze_at=5), num_classes=1000)
dataloader = recipes.loaders(
    train=recipes.train_loader(L(image_folder)(split="train"), recipes.augmented(), BATCH_SIZE, workers=32),
    test=recipes.test_loader(L(image_folder)(split="val"), recipes.centre_crop()),
)
optimizer = recipes.sgd(lr=30.0, weight_decay=0.0, nesterov=False)
multipliers = step_multipliers(100, drops=[60, 80])
train = recipes.training("linear_R18", len(multipliers), per_epoch)
lr_multiplier = epochwise(multipliers, per_epoch)
train.init_checkpoint = "output/classification/moco_R18_mgd_R50/model_final.pth"
