"""Linear evaluation of a ResNet-18 that moco_R18.py has trained; train.init_checkpoint may name another's."""

from classification import recipes
from classification.datasets import fashion_mnist
from classification.networks import resnet
from detectron2.config import LazyCall as L

from .moco_R18_wide import BATCH_SIZE, SIDE, dataloader, lr_multiplier, optimizer  # noqa: F401

IMAGES = 5_120
EPOCHS = 2

# Frozen, batch norms too; only the linear layer learns.
model = recipes.classifier(L(resnet)(depth=18, width=16, norm="BN", freeze_at=5), num_classes=10)
photos = L(fashion_mnist)(split="train", images=IMAGES, side=SIDE)
dataloader = recipes.loaders(
    train=recipes.train_loader(photos, None, BATCH_SIZE, workers=0),
    test=dataloader.test,
)
optimizer.lr, optimizer.weight_decay = 0.01, 0.0
train = recipes.training("fashion_linear_R18", EPOCHS, IMAGES // BATCH_SIZE)
train.eval_period, train.device = 0, "cpu"
train.init_checkpoint = "output/classification/fashion_moco_R18/model_final.pth"
