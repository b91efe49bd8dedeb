"""MoCo-v2 of a ResNet-18 of a quarter of the width on Fashion-MNIST, without distillation."""

from .moco_R18_wide import BATCH_SIZE, dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

IMAGES = 5_120
EPOCHS = 2
per_epoch = IMAGES // BATCH_SIZE
for encoder in ("backbone", "key_backbone"):
    model[encoder].width = 16
dataloader.train.dataset.images = IMAGES
train.output_dir, train.max_iter = "output/classification/fashion_moco_R18", EPOCHS * per_epoch
train.checkpointer.period = train.max_iter
