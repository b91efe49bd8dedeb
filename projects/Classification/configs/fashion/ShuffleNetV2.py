"""A narrow ShuffleNetV2 on Fashion-MNIST, from scratch, without distillation."""

from classification import recipes
from detectron2.config import LazyCall as L

from mgd_det.modeling import ShuffleNetV2 as Student

from .R50 import BATCH_SIZE, dataloader, lr_multiplier, model, train  # noqa: F401

IMAGES = 3_200
EPOCHS = 2
per_epoch = IMAGES // BATCH_SIZE
model.backbone = L(Student)(norm="BN", width_mult=0.5, out_features=["res5"])
model.last_channels, model.last_activation = 256, "relu"
dataloader.train.dataset.images = IMAGES
optimizer = recipes.sgd(lr=0.1, weight_decay=5e-4)
train.output_dir, train.max_iter = "output/classification/fashion_ShuffleNetV2", EPOCHS * per_epoch
train.checkpointer.period = train.max_iter
