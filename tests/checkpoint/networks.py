"""Networks of torchvision and timm with random weights, detectors to load them into, and their features."""

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone
from torch import nn

from mgd_det import add_mgd_config
from mgd_det.checkpoint import WeightsCheckpointer

STAGES = ("res2", "res3", "res4", "res5")
R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
R34 = ["MODEL.RESNETS.DEPTH", 34, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
R50 = ["MODEL.RESNETS.DEPTH", 50]
R101 = ["MODEL.RESNETS.DEPTH", 101]


def randomize(net):
    """Give a network random affines and running statistics, and return it in eval mode.

    The statistics are those of random images, with noise, so that the signal keeps its size in all stages.
    """
    generator = torch.Generator().manual_seed(7)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
        nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)
        norm.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(4, 3, 64, 64, generator=generator))
    for norm in norms:
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.running_mean.shape, generator=generator)
        norm.running_var *= 0.8 + 0.4 * torch.rand(norm.running_var.shape, generator=generator)
    return net.eval()


class Detector(nn.Module):
    """A model with a backbone under a meta-architecture's name for it, and nothing else."""

    def __init__(self, builder, opts=(), norm="FrozenBN", fpn_channels=8):
        super().__init__()
        cfg = get_cfg()
        add_mgd_config(cfg)
        cfg.MODEL.DEVICE = "cpu"
        cfg.MODEL.BACKBONE.NAME = builder
        cfg.MODEL.BACKBONE.FREEZE_AT = 0
        cfg.MODEL.FPN.IN_FEATURES = list(STAGES)
        cfg.MODEL.FPN.OUT_CHANNELS = fpn_channels
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.MOBILENETS, cfg.MODEL.SHUFFLENETS, cfg.MODEL.TIMM):
            node.NORM = norm
            node.OUT_FEATURES = list(STAGES)
        cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
        cfg.merge_from_list(list(opts))
        self.backbone = build_backbone(cfg)

    @property
    def bottom_up(self):
        return getattr(self.backbone, "bottom_up", self.backbone)


def save(state_dict, path):
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: value.contiguous() for name, value in state_dict.items()}, path)
    else:
        torch.save(state_dict, path)
    return str(path)


def load(detector, path):
    """Load weights into the detector and check that they set every tensor of its bottom-up network."""
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(path)
    prefix = "backbone.bottom_up." if hasattr(detector.backbone, "bottom_up") else "backbone."
    assert [key for key in checkpointer.unset_keys if key.startswith(prefix)] == []
    detector.eval()
    return checkpointer


def outputs_of(net, modules, image):
    """Return the outputs of submodules (name -> path), cloned before an in-place activation changes them."""
    outputs = {}

    def keep(name):
        return lambda module, inputs, output: outputs.update({name: output.clone()})

    handles = [net.get_submodule(path).register_forward_hook(keep(name)) for name, path in modules.items()]
    with torch.no_grad():
        net(image)
    for handle in handles:
        handle.remove()
    return outputs


def assert_same_features(actual, expected):
    assert list(actual) == list(expected)
    for name in expected:
        # Features near zero would agree with anything.
        assert expected[name].std() > 0.02, name
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5 * scale)


def assert_it_computes_the_same(net, student, opts, modules, folder):
    """Save a network; a detector's bottom-up of its weights has the features of ``modules``, by paths in the network.

    Under an FPN and alone, where the names in the model are others.
    """
    image = torch.randn(1, 3, 64, 96)
    expected = outputs_of(net, dict(zip(STAGES, modules)), image)
    for norm, suffix, builder in (("FrozenBN", "safetensors", "_fpn_backbone"), ("BN", "pth", "_backbone")):
        detector = Detector(f"build_{student}{builder}", opts, norm)
        load(detector, save(net.state_dict(), folder / f"weights.{suffix}"))
        with torch.no_grad():
            assert_same_features(detector.bottom_up(image), expected)
