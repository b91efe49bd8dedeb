"""Small detectors that find something, to export."""

import atexit
import functools
import os
import shutil
import tempfile

import numpy as np
import torch
import toy
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BottleneckBlock

from mgd_det.export import ExportedDetector, Tolerance, detector_settings, verify, write_model

DETECTORS = {
    **toy.DETECTORS,
    "keypoint_rcnn": (
        toy.RCNN,
        ["MODEL.MASK_ON", "False", "MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "4"]
        + ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(16, 16)"],
    ),
}
# Each student with one detector, each detector in turn.
PAIRS = [(list(DETECTORS)[i % len(DETECTORS)], student) for i, student in enumerate(toy.STUDENTS)]
CLASSES = [f"class {i}" for i in range(10)]
# Rounding grows through a hundred random layers, in images of twice the network's input.
TOLERANCE = Tolerance(boxes=0.5, unmatched=0.05)
SIZES = ((64, 96), (131, 150), (200, 70))


def build(detector="retinanet", student="mobilenetv2", opts=(), spread=False):
    """(detector, config) of random weights whose scores differ enough to be above the threshold somewhere.

    Both names are keys: of DETECTORS and of toy.STUDENTS. With ``spread`` that holds for every student, with many
    objects of almost equal scores, whose order is one of rounding.
    """
    (base, detector_opts), (builder, student_opts) = DETECTORS[detector], toy.STUDENTS[student]
    # With hundreds of proposals of a random network, some overlap by just the threshold of NMS, where rounding decides.
    few = ["MODEL.RPN.POST_NMS_TOPK_TEST", "50"]
    cfg = toy.plain_config(base, builder, [*few, *detector_opts, *student_opts, *opts])
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    toy.randomize_norms(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BottleneckBlock):  # or features grow from block to block, and all scores are alike
                module.conv3.norm.weight *= 0.2
        if hasattr(model, "head"):
            model.head.bbox_pred.weight *= 5
            layers = [model.head.cls_score]
            factor = 60
        else:
            model.proposal_generator.rpn_head.objectness_logits.weight *= 60
            predictors = model.roi_heads.box_predictor
            predictors = list(predictors) if isinstance(predictors, torch.nn.ModuleList) else [predictors]
            layers = [predictor.cls_score for predictor in predictors]
            factor = 20  # with more, scores are 1 and the order in NMS is one of rounding
        if spread:
            _spread(model, layers, least=-6.0 if hasattr(model, "head") else 0.0)
        else:
            for layer in layers:
                layer.weight *= factor
                layer.bias[slice(None) if hasattr(model, "head") else -1] -= 1
    return model, cfg


def _spread(model, layers, least):
    """Scale layers of class logits, and of a dense detector those of boxes, to outputs of usual size.

    The median of the logits is then ``least``, and one in a thousand is above ``least + 6``. With less, no score is
    above the threshold; with more, scores are 1 and the order in NMS is one of rounding. The outputs of a random
    network of a hundred layers are far from normal, so mean and deviation would not do.
    """
    boxes = [model.head.bbox_pred] if hasattr(model, "head") else []
    outputs = {layer: [] for layer in [*layers, *boxes]}

    def keep(layer, _, output):
        outputs[layer].append(output.flatten().clone())  # a sigmoid in place follows

    hooks = [layer.register_forward_hook(keep) for layer in outputs]
    model(inputs()[:1])
    for hook in hooks:
        hook.remove()
    for layer, found in outputs.items():
        values = torch.cat(found)
        if layer in boxes:
            layer.weight *= 1 / values.std()
            if hasattr(model.head, "ctrness"):
                layer.bias += 2  # FCOS's are distances, and those below 0 make no box
            continue
        median, high = values.quantile(0.5), values.quantile(0.999)
        scale = 6 / (high - median)
        layer.weight *= scale
        layer.bias += (layer.bias - median) * (scale - 1) + least - median


def inputs(sizes=SIZES):
    """Noise with rectangles, as Detectron2's mapper makes inputs, of images of twice the size."""
    rng = np.random.default_rng(0)
    made = []
    for height, width in sizes:
        pixels = rng.integers(0, 60, (3, height, width), dtype=np.uint8)
        pixels[:, height // 4 : height // 2, width // 3 : width // 2] = rng.integers(100, 255, (3, 1, 1))
        made.append({"image": torch.from_numpy(pixels), "height": 2 * height, "width": 2 * width})
    return made


@functools.cache
def core_in_onnx(detector):
    """(detector, its config, its core in ONNX), made once in each process, since it takes long: do not change it."""
    model, cfg = build(detector, "R18")
    path = os.path.join(_folder(), f"{detector}.onnx")
    write_model(model, detector_settings(cfg, model, CLASSES), path, "onnx")
    return model, cfg, ExportedDetector(path, threads=1)


def exported_difference(detector, student, folder, whole=False):
    """The difference between a detector and its export in ONNX: of the core if it has one and not ``whole``."""
    model, cfg = build(detector, student, spread=True)
    images = inputs()
    settings = detector_settings(cfg, model, CLASSES, whole=whole or not hasattr(model, "head"))
    path = str(folder / "model.onnx")
    write_model(model, settings, path, "onnx", images[1]["image"].float())
    return verify(model, ExportedDetector(path, threads=1), images, least=1e-3)


@functools.cache
def _folder():
    folder = tempfile.mkdtemp(prefix="mgd_exported_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
