"""A small EmbedMask for the tests: seconds to train."""

from pathlib import Path

import embedmask  # noqa: F401  (registers EmbedMask)
import torch
import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.cli.yaml_setup import read_config

PROJECT = Path(__file__).parents[1] / "projects" / "EmbedMask"
BASE = str(PROJECT / "configs" / "FashionScenes" / "Base-EmbedMask.yaml")
OPTS = [*toy.SMALL_HEADS, *toy.R18, "MODEL.BACKBONE.NAME", "build_fcos_resnet_fpn_backbone", "MODEL.DEVICE", "cpu"]
OPTS += ["MODEL.EMBED_MASK.DIM", "4", "MODEL.EMBED_MASK.NORM", "BN", "REPORT.ENABLED", "False"]


def config(*opts):
    return read_config(BASE, [*OPTS, *opts])


def small_model(*opts):
    torch.manual_seed(0)
    return build_model(config(*opts))


def step(model, inputs):
    with EventStorage():
        return model.train()(inputs)
