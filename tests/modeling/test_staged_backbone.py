"""The base of the students, on a network whose stages hold bare norm layers."""

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.errors import UserError
from mgd_det.modeling.backbone.staged_backbone import Stage, StagedBackbone

STAGES = ["stem", "res2", "res3", "res4", "res5"]


class BareNorms(StagedBackbone):
    """Each stage a convolution and a batch norm of its own, as some of timm's networks have them."""

    config_key = "MODEL.BARE"

    def __init__(self, **options):
        layers, stages = {}, []
        for i, stage in enumerate(STAGES):
            layers[f"conv{i}"] = nn.Conv2d(4 if i else 3, 4, 3, stride=2, padding=1)
            layers[f"bn{i}"] = nn.BatchNorm2d(4)
            stages.append(Stage(stage, (f"conv{i}", f"bn{i}"), 4, 2 ** (i + 1)))
        super().__init__(nn.ModuleDict(layers), stages, **options)


def test_batch_norms_that_are_modules_of_a_stage_freeze_too():
    backbone = BareNorms(norm="BN", freeze_at=2)
    kinds = [type(getattr(backbone, f"bn{i}")) for i in range(5)]
    assert kinds == [FrozenBatchNorm2d] * 2 + [nn.BatchNorm2d] * 3
    assert [p.requires_grad for p in backbone.parameters()] == [False] * 4 + [True] * 12
    before = backbone.bn1.running_mean.clone()
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert torch.equal(backbone.bn1.running_mean, before) and backbone.bn2.running_mean.abs().max() > 0
    assert isinstance(BareNorms(norm="GN", freeze_at=1).bn0, nn.GroupNorm)


def test_a_network_that_has_a_name_of_its_own():
    with pytest.raises(UserError, match=r"MODEL.BARE.OUT_FEATURES is .*'p3'.* bare of someone"):
        BareNorms(out_features=["p3"], network_name="bare of someone")


def test_a_feature_list_that_is_a_name():
    with pytest.raises(UserError, match="OUT_FEATURES is 'res5'"):
        BareNorms(out_features="res5")
