"""A teacher sliced to a narrower student's widths, compared with the wide teacher whose dropped channels are zero."""

import logging

import numpy as np
import pytest
import torch
import toy
from detectron2.layers import DepthwiseSeparableConv2d
from detectron2.modeling import build_model
from torch import nn

from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import (
    NarrowingOptions,
    check_inheritance,
    inherit,
    inherit_from_config,
    inherit_from_teacher,
    narrow,
)
from mgd_det.modeling.channel_layout import channel_layout
from mgd_det.modeling.channel_statistics import measure_channels

NARROW = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.ROI_BOX_HEAD.FC_DIM", "12", "MODEL.ROI_MASK_HEAD.CONV_DIM", "6"]
UNMEASURED = NarrowingOptions("weight", compensate=False)

# By detector, the layers that read each set of channels, with the dimension of their weight that does.
FPN_READERS = {"backbone.fpn_output3": 1, "backbone.fpn_output4": 1, "backbone.fpn_output5": 1}
DENSE = {
    "fpn.sums": FPN_READERS,
    "fpn": {"head.cls_subnet.0": 1, "head.bbox_subnet.0": 1, "backbone.top_block.p7": 1},
    "head.cls_subnet.0": {"head.cls_score": 1},
    "head.bbox_subnet.0": {"head.bbox_pred": 1},
}
FCOS = {
    **DENSE,
    "fpn": {**DENSE["fpn"], "backbone.top_block.p6": 1},
    "head.bbox_subnet.0": {"head.bbox_pred": 1, "head.ctrness": 1},
}
FASTER = {
    "fpn.sums": {**FPN_READERS, "backbone.fpn_output2": 1},
    "fpn": {"proposal_generator.rpn_head.conv": 1, "roi_heads.box_head.fc1": 1},
    "proposal_generator.rpn_head.conv": {
        "proposal_generator.rpn_head.objectness_logits": 1,
        "proposal_generator.rpn_head.anchor_deltas": 1,
    },
    "roi_heads.box_head.fc1": {"roi_heads.box_head.fc2": 1},
    "roi_heads.box_head.fc2": {"roi_heads.box_predictor.cls_score": 1, "roi_heads.box_predictor.bbox_pred": 1},
}
MASK = {
    **FASTER,
    "fpn": {**FASTER["fpn"], "roi_heads.mask_head.mask_fcn1": 1},
    "roi_heads.mask_head.mask_fcn1": {"roi_heads.mask_head.mask_fcn2": 1},
    "roi_heads.mask_head.mask_fcn2": {"roi_heads.mask_head.deconv": 0},
    "roi_heads.mask_head.deconv": {"roi_heads.mask_head.predictor": 1},
}
READERS = {"retinanet": DENSE, "fcos": FCOS, "faster_rcnn": FASTER, "mask_rcnn": MASK}


def detectors(kind, narrow_opts=NARROW, more=()):
    """A wide detector and a narrow one with the same bottom-up network, both random, in eval mode."""
    base, opts = toy.DETECTORS[kind]
    made = []
    for widths in ([], narrow_opts):
        torch.manual_seed(3)
        made.append(build_model(toy.teacher_config(base, [*opts, *more, *widths])).cpu().eval())
        toy.randomize_norms(made[-1])
        for name, parameter in made[-1].named_parameters():
            if ".cls_score.weight" in name or "bbox" in name and name.endswith("weight") or "objectness" in name:
                nn.init.normal_(parameter, std=0.2)  # so that there are detections
    wide, slim = made
    slim.backbone.bottom_up.load_state_dict(wide.backbone.bottom_up.state_dict())
    return wide, slim


def outputs(detector, batch):
    with torch.no_grad():
        images = detector.preprocess_image(batch)
        levels = detector.backbone(images.tensor)
        return levels, [result["instances"] for result in detector(batch)]


def values(weight, dim, channels, width):
    """A view of the values of some channels, several of each where a map is flattened channel by channel."""
    return [weight.movedim(dim, 0).unflatten(0, (width, -1))[channel] for channel in channels]


@pytest.mark.parametrize("kind", READERS)
@torch.no_grad()
def test_the_narrow_net_computes_what_the_wide_one_does_without_its_dropped_channels(kind):
    wide, slim = detectors(kind)
    narrowed = narrow(wide, slim, wide.state_dict(), UNMEASURED)
    assert set(narrowed.channels) == set(READERS[kind])
    report = inherit(slim, wide.state_dict(), ["fpn", "head"], narrowed=narrowed)
    assert not report.other_shape and not report.not_in_teacher
    for name, readers in READERS[kind].items():
        kept, width = narrowed.channels[name].tolist(), narrowed.widths[name]
        dropped = [channel for channel in range(width) if channel not in kept]
        assert len(kept) in (6, 8, 12) and kept == sorted(kept) and dropped
        for reader, dim in readers.items():
            for part in values(wide.get_submodule(reader).weight, dim, dropped, width):
                part.zero_()
    batch = toy.batch(((64, 96), (64, 96)))
    (levels, expected), (own_levels, found) = outputs(wide, batch), outputs(slim, batch)
    for name, level in levels.items():
        torch.testing.assert_close(own_levels[name], level[:, narrowed.channels["fpn"]], rtol=1e-3, atol=1e-4)
    assert len(levels) >= 4 and sum(len(instances) for instances in expected) > 0
    for theirs, own in zip(expected, found):
        assert len(theirs) == len(own)
        torch.testing.assert_close(own.scores, theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
        if kind == "mask_rcnn":
            assert (own.pred_masks != theirs.pred_masks).float().mean() < 1e-3
