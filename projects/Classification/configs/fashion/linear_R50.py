"""Linear evaluation of the teacher, which moco_R50.py has trained."""

from .linear_R18 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.depth = 50
train.output_dir = "output/classification/fashion_linear_R50"
train.init_checkpoint = "output/classification/fashion_moco_R50/model_final.pth"
