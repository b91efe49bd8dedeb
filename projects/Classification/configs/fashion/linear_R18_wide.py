"""Linear evaluation of the teacher, which moco_R18_wide.py has trained."""

from .linear_R18 import dataloader, lr_multiplier, model, optimizer, train  # noqa: F401

model.backbone.width = 32
train.output_dir = "output/classification/fashion_linear_R18_wide"
train.init_checkpoint = "output/classification/fashion_moco_R18_wide/model_final.pth"
