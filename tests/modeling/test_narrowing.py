"""A teacher sliced to a narrower student's widths, compared with the wide teacher whose dropped channels are zero."""

import numpy as np
import pytest
import torch
import toy
from detectron2.layers import Conv2d, DepthwiseSeparableConv2d
from detectron2.modeling import build_model
from fast_cases import fast
from torch import nn

from mgd_det.errors import UserError
from mgd_det.modeling import NarrowingOptions, channel_statistics, inherit, narrow
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


@pytest.mark.parametrize("kind", fast(READERS, "mask_rcnn"))
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


def test_what_is_not_finite_is_named_with_the_layer_that_reads_it():
    wide, slim = detectors("retinanet")
    nn.init.constant_(wide.backbone.fpn_lateral4.weight, float("nan"))
    with pytest.raises(
        UserError, match="MODEL.MGD.INHERIT_CHANNELS.*backbone.fpn_output[34].*MODEL.MGD.TEACHER.WEIGHTS"
    ):
        narrow(wide, slim, wide.state_dict(), batches=[toy.batch()])


@torch.no_grad()
def test_nothing_is_lost_where_the_dropped_channels_are_combinations_of_the_kept_ones():
    plain = ["MODEL.FPN.NORM", "", "MODEL.RPN.CONV_DIMS", "[16]"]
    wide, slim = detectors("mask_rcnn", ["MODEL.FPN.OUT_CHANNELS", "8"], plain)
    for prefix in ("lateral", "output"):
        mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)) / 4
        for level in range(2, 6):
            layer = wide.backbone.get_submodule(f"fpn_{prefix}{level}")
            layer.bias.normal_()
            layer.weight[8:] = torch.einsum("ds,schw->dchw", mix, layer.weight[:8])
            layer.bias[8:] = mix @ layer.bias[:8]
    batch = toy.batch(((64, 96), (64, 96)))
    narrowed = narrow(wide, slim, wide.state_dict(), batches=[batch])
    assert set(narrowed.channels) == {"fpn", "fpn.sums"} and max(narrowed.errors.values()) < 1e-9
    inherit(slim, wide.state_dict(), ["fpn", "head"], narrowed=narrowed)
    (_, expected), (_, found) = outputs(wide, batch), outputs(slim, batch)
    for theirs, own in zip(expected, found):
        assert len(theirs) == len(own) > 0
        torch.testing.assert_close(own.scores, theirs.scores, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(own.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=1e-3, atol=1e-2)
    narrowed = narrow(wide, slim, wide.state_dict(), NarrowingOptions(compensate=False), [batch])
    assert min(narrowed.errors.values()) > 0.01  # so it is the folding that loses nothing


@torch.no_grad()
def test_moments_are_those_of_what_the_layers_read(monkeypatch):
    monkeypatch.setattr(channel_statistics, "_VALUES_AT_ONCE", 10 * 16 * 49)  # so that regions come in parts
    wide, _ = detectors("mask_rcnn")
    batches = [toy.batch(((64, 96), (64, 96)), seed=seed) for seed in range(2)]
    head = "roi_heads.box_head.fc1"
    pooled = []
    wide.roi_heads.box_pooler.register_forward_hook(lambda module, args, output: pooled.append(output))
    was_training = wide.train().training
    statistics = measure_channels(wide, batches, {"proposal_generator.rpn_head.conv": 16, head: 16})
    assert was_training and all(module.training for module in wide.modules())

    def moment(values):  # (N, C, H, W)
        pixels = values.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 16)
        return np.mean(pixels[:, :, None] * pixels[:, None], axis=0)

    wide.eval()
    levels = [level for batch in batches for level in wide.backbone(wide.preprocess_image(batch).tensor).values()]
    expected = np.mean([moment(level) for level in levels], axis=0)
    np.testing.assert_allclose(statistics.moments["proposal_generator.rpn_head.conv"], expected, rtol=1e-6, atol=1e-8)
    expected = np.mean([moment(regions) for regions in pooled], axis=0)
    assert len(pooled) == 2
    np.testing.assert_allclose(statistics.moments[head], expected, rtol=1e-6, atol=1e-8)
    wide.proposal_generator.rpn_head.conv(levels[0])  # the hooks are gone
    assert set(statistics.moments) == {"proposal_generator.rpn_head.conv", head}


def inputs_of(detector, name, batch):
    inputs = []
    handle = detector.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    detector(batch)
    handle.remove()
    return inputs


GROUP_NORM = ["MODEL.FPN.NORM", "GN", "MODEL.RETINANET.NORM", "GN", "MODEL.FPN.OUT_CHANNELS", "128"]


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("width", [96, 64])
def test_group_norms_keep_their_groups_and_are_fitted_to_what_is_left_of_them(width):
    wide, slim = detectors("retinanet", ["MODEL.FPN.OUT_CHANNELS", str(width)], GROUP_NORM)
    for module in wide.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    batch = toy.batch(((64, 96), (64, 96)))
    narrowed = narrow(wide, slim, wide.state_dict(), batches=[batch])
    for kept in narrowed.channels.values():  # 32 groups of 4
        assert np.bincount(kept.numpy() // 4, minlength=32).tolist() == [width // 32] * 32
    for name in ("head.cls_subnet.1", "backbone.fpn_output4.norm"):
        inputs = inputs_of(wide, name, batch)
        kept = narrowed.channels["fpn" if "fpn" in name else "head.cls_subnet.0"]
        ours, theirs, weights = [], [], []
        for x in inputs:
            theirs.append(wide.get_submodule(name)(x)[:, kept].transpose(0, 1).flatten(1))
            ours.append(nn.functional.group_norm(x[:, kept], 32).transpose(0, 1).flatten(1))
            weights += [np.full(ours[-1].shape[1], ours[-1].shape[1] ** -0.5)]
        u, v, weights = (
            torch.cat(ours, 1).double().numpy(),
            torch.cat(theirs, 1).double().numpy(),
            np.concatenate(weights),
        )
        for channel in range(0, width, 7):
            slope, bias = np.polyfit(u[channel], v[channel], 1, w=weights)
            assert narrowed.tensors[f"{name}.weight"][channel].item() == pytest.approx(slope, rel=1e-3, abs=1e-4)
            assert narrowed.tensors[f"{name}.bias"][channel].item() == pytest.approx(bias, rel=1e-3, abs=1e-4)
    sliced = narrow(wide, slim, wide.state_dict(), NarrowingOptions(compensate=False), [batch])
    kept = sliced.channels["head.cls_subnet.0"]
    assert torch.equal(sliced.tensors["head.cls_subnet.1.weight"], wide.head.cls_subnet[1].weight[kept])


def test_a_student_as_wide_as_its_teacher_has_no_set_to_choose():
    wide, _ = detectors("mask_rcnn")
    assert narrow(wide, wide, wide.state_dict(), batches=iter([None])).channels == {}


def test_separable_convolutions_have_the_channels_of_what_they_read_and_of_what_they_make():
    wide, slim = detectors("retinanet")
    slim.head.cls_subnet[0] = DepthwiseSeparableConv2d(8, 12, norm1="BN", norm2="BN")
    slim.head.cls_score = nn.Conv2d(12, slim.head.cls_score.out_channels, 3, padding=1)
    layout = channel_layout(slim)
    assert layout.axes["head.cls_subnet.0.depthwise.weight"] == ("fpn", None)
    assert layout.axes["head.cls_subnet.0.depthwise.norm.running_var"] == ("fpn",)
    pointwise = "head.cls_subnet.0.pointwise"
    assert layout.axes[f"{pointwise}.weight"] == (pointwise, "fpn") and layout.widths[pointwise] == 12
    assert layout.axes["head.cls_score.weight"] == (None, pointwise)
    report = inherit(
        slim, wide.state_dict(), ["fpn", "head"], narrowed=narrow(wide, slim, wide.state_dict(), UNMEASURED)
    )
    assert report.sliced["head.bbox_subnet.0.weight"] == ((16, 16, 3, 3), (8, 8, 3, 3))
    assert "head.cls_subnet.0.weight" in report.not_in_student
    assert f"{pointwise}.weight" in report.not_in_teacher
    assert report.other_shape["head.cls_score.weight"][0][1] == 16


class DepthwiseFirst(Conv2d):
    """A pointwise convolution that runs a depthwise child first."""

    def __init__(self, channels, out_channels):
        super().__init__(channels, out_channels, 1, norm=nn.BatchNorm2d(out_channels))
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)

    def forward(self, x):
        return super().forward(self.depthwise(x))


@torch.no_grad()
def test_a_depthwise_child_has_the_channels_that_its_owner_reads():
    nets = detectors("retinanet")
    for net, width in zip(nets, (16, 8)):
        net.head.cls_subnet[0], net.head.bbox_subnet[0] = (DepthwiseFirst(width, width).eval() for _ in range(2))
    wide, slim = nets
    axes = channel_layout(wide).axes
    assert axes["head.cls_subnet.0.depthwise.weight"] == ("fpn", None)
    assert axes["head.cls_subnet.0.weight"] == ("head.cls_subnet.0", "fpn")
    assert axes["head.cls_subnet.0.norm.running_mean"] == ("head.cls_subnet.0",)
    batch = toy.batch(((64, 96), (64, 96)))
    narrowed = narrow(wide, slim, wide.state_dict(), UNMEASURED)
    kept = {name: channels for name, channels in narrowed.channels.items() if name.startswith(("fpn", "head"))}
    assert not torch.equal(kept["fpn"], kept["head.cls_subnet.0"])  # so that a wrong set would show
    inherit(slim, wide.state_dict(), ["fpn", "head"], narrowed=narrowed)
    for name, readers in DENSE.items():
        for reader in readers:
            dropped = [channel for channel in range(16) if channel not in kept[name]]
            wide.get_submodule(reader).weight[:, dropped] = 0
    levels = list(wide.backbone(wide.preprocess_image(batch).tensor).values())
    found = slim.head([level[:, kept["fpn"]] for level in levels])
    for own, theirs in zip(found, wide.head(levels)):
        for own_level, level in zip(own, theirs):
            torch.testing.assert_close(own_level, level, rtol=1e-3, atol=1e-4)

    name = "head.cls_subnet.0"
    moment = measure_channels(wide, [batch], {name: 16}).moments[name].numpy()
    maps = [wide.head.cls_subnet[0].depthwise(level).double().transpose(0, 1).flatten(1).numpy() for level in levels]
    np.testing.assert_allclose(
        moment, np.mean([np.cov(x, bias=True) + np.outer(x.mean(1), x.mean(1)) for x in maps], 0)
    )
