"""Import of torchvision's detectors: Detectron2's backbone must compute what torchvision's does."""

import pytest
import torch
from checkpoint.networks import R18, R50, Detector, assert_same_features, load, randomize, save
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import fasterrcnn_resnet50_fpn_v2
from torchvision.models.detection.retinanet import retinanet_resnet50_fpn_v2
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

RETINANET_LEVELS = {"0": "p3", "1": "p4", "2": "p5", "p6": "p6", "p7": "p7"}
RCNN_LEVELS = {"0": "p2", "1": "p3", "2": "p4", "3": "p5", "pool": "p6"}


def retinanet_backbone(name="resnet18", norm_layer=nn.BatchNorm2d):
    return resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        norm_layer=norm_layer,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )


def rcnn_backbone(name="resnet18", norm_layer=nn.BatchNorm2d):
    return resnet_fpn_backbone(backbone_name=name, weights=None, norm_layer=norm_layer)


def tiny_variances(backbone):
    """Scales each block's first convolution and its norm so that eps is of the variance's size, as in trained nets."""
    for name, conv in backbone.body.named_modules():
        if isinstance(conv, nn.Conv2d) and name.endswith("conv1"):
            norm = backbone.body.get_submodule(name.replace("conv1", "bn1"))
            scale = (1e-5 / norm.running_var).sqrt()
            conv.weight.data *= scale[:, None, None, None]
            norm.running_mean *= scale
            norm.running_var *= scale**2


def frozen(backbone, build, eps):
    """The same with frozen norms of this eps, as torchvision's trained detectors have."""
    result = build(norm_layer=FrozenBatchNorm2d)
    result.load_state_dict(backbone.state_dict())
    for module in result.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = eps
    return result.eval()


def assert_loads_as(detector, net, levels, path):
    """The backbone of ``detector`` computes what that of torchvision's ``net`` does once it has its weights."""
    checkpointer = load(detector, path)
    assert checkpointer.unset_keys == []
    assert isinstance(net.backbone, BackboneWithFPN)
    image = torch.randn(2, 3, 128, 64)
    with torch.no_grad():
        features, expected = detector.backbone(image), net.backbone(image)
    assert_same_features(features, {levels[name]: expected[name] for name in levels})
    return checkpointer


@pytest.mark.slow
@pytest.mark.parametrize("norm, suffix", [("FrozenBN", ".pth"), ("BN", ".safetensors")])
def test_retinanet_with_batch_norm(norm, suffix, tmp_path):
    net = RetinaNet(randomize(retinanet_backbone()), num_classes=3).eval()
    path = save(net.state_dict(), tmp_path / f"retinanet{suffix}")
    opts = [*R18, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    detector = Detector("build_fcos_resnet_fpn_backbone", opts, norm, fpn_channels=256)
    checkpointer = assert_loads_as(detector, net, RETINANET_LEVELS, path)
    assert checkpointer.report.unused and all(name.startswith("head.") for name in checkpointer.report.unused)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("network, eps", [(RetinaNet, 0.0), (FCOS, 1e-5)])
def test_dense_detectors_with_frozen_norms(network, eps, norm, tmp_path):
    backbone = randomize(retinanet_backbone())
    tiny_variances(backbone)
    net = network(frozen(backbone, retinanet_backbone, eps), num_classes=3).eval()
    path = save(net.state_dict(), tmp_path / "detector.pth")
    opts = [*R18, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    detector = Detector("build_fcos_resnet_fpn_backbone", opts, norm, fpn_channels=256)
    assert_loads_as(detector, net, RETINANET_LEVELS, path)


@pytest.mark.slow
@pytest.mark.parametrize("network", [FasterRCNN, MaskRCNN])
def test_rcnns_with_frozen_norms_and_the_old_names(network, tmp_path):
    backbone = randomize(rcnn_backbone())
    tiny_variances(backbone)
    net = network(frozen(backbone, rcnn_backbone, 0.0), num_classes=3).eval()
    # As in the files of COCO_V1: the convolutions of FPN and of the mask head were not yet in blocks of their own.
    state_dict = {
        name.replace(".0.0.", ".0.").replace(".1.0.", ".1.").replace(".2.0.", ".2.").replace(".3.0.", ".3.")
        if name.startswith("backbone.fpn.")
        else name: value
        for name, value in net.state_dict().items()
    }
    assert "backbone.fpn.inner_blocks.3.weight" in state_dict
    state_dict["roi_heads.mask_head.mask_fcn1.weight"] = torch.ones(2, 2, 3, 3)
    detector = Detector("build_resnet_fpn_backbone", R18, fpn_channels=256)
    # A mask head of Detectron2 has this name too: it must not get half of torchvision's.
    detector.roi_heads = nn.Module()
    detector.roi_heads.mask_head = nn.Module()
    detector.roi_heads.mask_head.mask_fcn1 = nn.Conv2d(2, 2, 3, bias=False)
    nn.init.zeros_(detector.roi_heads.mask_head.mask_fcn1.weight)
    checkpointer = load(detector, save(state_dict, tmp_path / "rcnn.pth"))
    assert checkpointer.unset_keys == ["roi_heads.mask_head.mask_fcn1.weight"]
    assert not detector.roi_heads.mask_head.mask_fcn1.weight.any()
    assert "roi_heads.mask_head.mask_fcn1.weight" in checkpointer.report.unused
    del detector.roi_heads
    assert_loads_as(detector, net, RCNN_LEVELS, str(tmp_path / "rcnn.pth"))


@pytest.mark.slow
def test_the_affine_stays_as_the_margins_want_it(tmp_path):
    net = RetinaNet(frozen(randomize(retinanet_backbone()), retinanet_backbone, 0.0), num_classes=3)
    opts = [*R18, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    detector = Detector("build_fcos_resnet_fpn_backbone", opts, fpn_channels=256)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    load(detector, save(net.state_dict(), tmp_path / "retinanet.pth"))
    norm = detector.bottom_up.res3[1].conv2.norm
    for name in ("weight", "bias", "running_mean"):
        assert torch.equal(getattr(norm, name), before[f"backbone.body.layer2.1.bn2.{name}"])


@pytest.mark.slow
def test_retinanet_v2(tmp_path):
    """p6 from res5, as Detectron2's RetinaNet has it."""
    torch.manual_seed(0)
    net = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
    randomize(net.backbone)
    opts = [*R50, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    detector = Detector("build_retinanet_resnet_fpn_backbone", opts, fpn_channels=256)
    assert_loads_as(detector, net.eval(), RETINANET_LEVELS, save(net.state_dict(), tmp_path / "v2.pth"))


@pytest.mark.slow
def test_faster_rcnn_v2(tmp_path):
    """Batch norm in the FPN."""
    torch.manual_seed(0)
    net = fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=3)
    randomize(net.backbone)
    detector = Detector("build_resnet_fpn_backbone", [*R50, "MODEL.FPN.NORM", "BN"], fpn_channels=256)
    assert_loads_as(detector, net.eval(), RCNN_LEVELS, save(net.state_dict(), tmp_path / "v2.pth"))


def test_p6_of_another_width_is_left_and_reported(tmp_path):
    """retinanet_resnet50_fpn convolves p6 from p5, Detectron2's RetinaNet from res5."""
    net = RetinaNet(retinanet_backbone(), num_classes=3)
    opts = [*R18, "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    detector = Detector("build_retinanet_resnet_fpn_backbone", opts, fpn_channels=256)
    checkpointer = load(detector, save(net.state_dict(), tmp_path / "retinanet.pth"))
    assert checkpointer.unset_keys == ["backbone.top_block.p6.weight"]
    assert checkpointer.report.partly_loaded() == ["top_block"]


def test_a_backbone_without_fpn_takes_the_body_alone(tmp_path):
    net = RetinaNet(retinanet_backbone(), num_classes=3)
    detector = Detector("build_resnet_backbone", R18)
    checkpointer = load(detector, save(net.state_dict(), tmp_path / "retinanet.pth"))
    assert "backbone.fpn.inner_blocks.0.0.weight" in checkpointer.report.unused
    assert torch.equal(detector.backbone.res5[1].conv2.weight, net.backbone.body.layer4[1].conv2.weight)
