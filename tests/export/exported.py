"""Small detectors that find something, to export."""

import numpy as np
import torch
import toy
from detectron2.modeling import build_model

SIZES = ((64, 96), (131, 150), (200, 70))


def build(detector="retinanet", student="mobilenetv2", opts=()):
    """(detector, config) of random weights whose scores differ enough to be above the threshold somewhere."""
    base, detector_opts = toy.DETECTORS[detector]
    cfg = toy.plain_config(base, student, [*detector_opts, *opts])
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    toy.randomize_norms(model)
    with torch.no_grad():
        if hasattr(model, "head"):
            model.head.cls_score.weight *= 60
            model.head.bbox_pred.weight *= 5
            model.head.cls_score.bias -= 1
        else:
            predictors = model.roi_heads.box_predictor
            for predictor in predictors if isinstance(predictors, torch.nn.ModuleList) else [predictors]:
                predictor.cls_score.weight *= 60
                predictor.cls_score.bias[-1] -= 1
    return model, cfg


def inputs(sizes=SIZES):
    """Noise with rectangles, as Detectron2's mapper makes inputs, of images of twice the size."""
    rng = np.random.default_rng(0)
    made = []
    for height, width in sizes:
        pixels = rng.integers(0, 60, (3, height, width), dtype=np.uint8)
        pixels[:, height // 4 : height // 2, width // 3 : width // 2] = rng.integers(100, 255, (3, 1, 1))
        made.append({"image": torch.from_numpy(pixels), "height": 2 * height, "width": 2 * width})
    return made
