"""What a weight of the losses of the heads means in a cascade, and in which precision the teacher's boxes are made."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import nn
from toy import RCNN

from mgd_det.modeling.head_distillation.options import HeadOptions
from mgd_det.modeling.head_distillation.precision import in_float32
from mgd_det.modeling.head_distillation.record import HeadRecord
from mgd_det.modeling.head_distillation.roi_heads import RoIHeads

LEVELS = ("p2", "p3", "p4", "p5")


def two_detectors(opts):
    """A student and a teacher on the same ResNet-18, with random heads; in training and in eval mode."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(build_model(toy.plain_config(RCNN, opts=["MODEL.MASK_ON", "False", *opts])).cpu())
        for name, parameter in made[-1].roi_heads.named_parameters():
            if name.endswith("weight") and "box_predictor" in name:
                nn.init.normal_(parameter, std=0.1)
    return made[0].train(), made[1].eval()


def gradients(student, teacher, stages):
    """The gradients of both losses of the boxes, of weight 1, into the features and into each stage's predictor."""
    heads = student.roi_heads
    generator = torch.Generator().manual_seed(2)
    features, of_teacher = (
        {name: torch.randn(1, 16, 64 // 2**i, 64 // 2**i, generator=generator) for i, name in enumerate(LEVELS)}
        for _ in range(2)
    )
    for level in features.values():
        level.requires_grad_()
    corners = torch.rand(12, 2, generator=generator) * 100
    boxes = Boxes(torch.cat([corners, corners + 40 + torch.rand(12, 2, generator=generator) * 90], dim=1))
    record = HeadRecord()
    for stage in range(stages):
        if stages > 1:  # as CascadeROIHeads does in training
            proposals = [Instances((256, 256), proposal_boxes=boxes)]
            logits, deltas = heads._run_stage(list(features.values()), proposals, stage)
        else:
            logits, deltas = heads.box_predictor(heads.box_head(heads.box_pooler(list(features.values()), [boxes])))
        record.boxes.append([boxes]), record.logits.append(logits), record.deltas.append(deltas)
    options = HeadOptions.from_arguments(logits={"weight": 1.0}, boxes={"weight": 1.0})
    losses = RoIHeads(SimpleNamespace(detector=teacher), options).losses(student, of_teacher, record, 0.0)
    sum(losses.values()).backward()
    predictors = list(heads.box_predictor) if stages > 1 else [heads.box_predictor]
    return [level.grad for level in features.values()], [predictor.bbox_pred.weight.grad for predictor in predictors]


def test_a_weight_means_the_same_in_a_cascade_as_in_a_plain_rcnn():
    """Its three stages predict here what the plain head does, and it divides their gradient by three."""
    agnostic = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]
    plain, cascades = two_detectors(agnostic), two_detectors(toy.DETECTORS["cascade_mask_rcnn"][1])
    for one, cascade in zip(plain, cascades):
        for stage in range(3):
            cascade.roi_heads.box_head[stage].load_state_dict(one.roi_heads.box_head.state_dict())
            cascade.roi_heads.box_predictor[stage].load_state_dict(one.roi_heads.box_predictor.state_dict())
            cascade.roi_heads.box_predictor[stage].box2box_transform = one.roi_heads.box_predictor.box2box_transform
    of_features, (of_predictor,) = gradients(*plain, stages=1)
    of_cascades_features, of_stages = gradients(*cascades, stages=3)
    assert sum(gradient.abs().sum() for gradient in of_features) > 1e-3
    for own, gradient in zip(of_cascades_features, of_features):
        torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-8)
    for of_stage in of_stages:
        torch.testing.assert_close(of_stage, of_predictor, rtol=1e-4, atol=1e-8)


def test_a_layer_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    for precise in (x, x.bfloat16().requires_grad_()):
        with torch.autocast("cpu", torch.bfloat16):
            with in_float32(layer), in_float32(layer):  # nested, too
                inside = layer(precise)
            outside = layer(precise)
        assert (inside.dtype, outside.dtype) == (torch.float32, torch.bfloat16)
        expected = precise.detach().double().numpy() @ weight.T + bias
        np.testing.assert_allclose(inside.detach().numpy(), expected, rtol=1e-5, atol=1e-6)
    inside.sum().backward()
    np.testing.assert_allclose(precise.grad.float().numpy(), np.tile(weight.sum(axis=0), (3, 1)), rtol=1e-2, atol=1e-2)
    with pytest.raises(KeyError), in_float32(layer):
        raise KeyError
    assert "forward" not in vars(layer)


def test_a_box_heads_deltas_are_of_float32_under_autocast():
    student, teacher = two_detectors(["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"])
    seen = []
    teacher.roi_heads.box_predictor.register_forward_hook(lambda _, args, output: seen.append((args[0], output[1])))
    with torch.autocast("cpu", torch.bfloat16):
        gradients(student, teacher, stages=1)
    ((read, deltas),) = seen
    layer = teacher.roi_heads.box_predictor.bbox_pred
    expected = read.detach().double().numpy() @ layer.weight.detach().double().numpy().T
    assert read.dtype == torch.bfloat16  # the layers before it stay fast
    np.testing.assert_allclose(deltas.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
