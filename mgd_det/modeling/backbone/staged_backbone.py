"""The common base of the light students: a network cut into stages.

Shape shorthand in this module: B images, C channels, H and W pixels of the input.
"""

import functools
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import nn

from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError
from mgd_det.modeling.backbone.norms import Norm, freeze_batch_norms, replace_batch_norms

STAGE_NAMES = ("stem", "res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class Stage:
    """The layers of a network whose output has one stride, as FPN defines stages.

    Attributes:
        name: one of :data:`STAGE_NAMES`.
        modules: dotted paths of the modules that run one after another; no other layer runs.
        channels: of the last one's output.
        stride: pixels of the image from one place of that output to the next.
    """

    name: str
    modules: Tuple[str, ...]
    channels: int
    stride: int


class StagedBackbone(Backbone):
    """A network that runs as the stages stem, res2, res3, res4 and res5 and returns the outputs of some of them.

    A subclass sets :attr:`config_key`, passes the network and its stages to this constructor, and declares
    :meth:`distillation_features`. The modules keep their names, so that a state dict of the network loads as it is,
    except for layers that no stage names.

    Attributes:
        config_key: node of the config whose keys, in lower case, are arguments of the subclass, such as
            "MODEL.MOBILENETS".
        built_stages: the stages up to the deepest of ``out_features``, shallow to deep.
    """

    config_key: str

    def __init__(
        self,
        network: nn.Module,
        stages: Sequence[Stage],
        *,
        norm: Norm = "FrozenBN",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        network_name: Optional[str] = None,
    ) -> None:
        """
        Args:
            network: owner of the modules that ``stages`` name; they move here, and the rest is dropped.
            stages: all five, in the order of :data:`STAGE_NAMES`.
            norm: replaces every batch norm, see :func:`replace_batch_norms`.
            out_features: features to return, of :data:`STAGE_NAMES`. Stages after the deepest of them are not built.
            freeze_at: number of stages to freeze, 0 to 5; see :meth:`freeze`.
            network_name: for error messages; the class's name by default.

        Raises:
            UserError: a value that is not listed above.
        """
        super().__init__()
        assert tuple(stage.name for stage in stages) == STAGE_NAMES, stages
        self._network_name = network_name or type(self).__name__
        self._check(out_features, freeze_at)
        # Plain lists and strings, also if LazyConfig passes OmegaConf's.
        self._out_features: List[str] = [str(name) for name in out_features]
        self.built_stages = tuple(stages[: 1 + max(STAGE_NAMES.index(name) for name in self._out_features)])
        self._out_feature_channels = {stage.name: stage.channels for stage in self.built_stages}
        self._out_feature_strides = {stage.name: stage.stride for stage in self.built_stages}
        for stage in self.built_stages:
            for path in stage.modules:
                self._adopt(path, network.get_submodule(path))
        replace_batch_norms(self, norm, f"{self.config_key}.NORM")
        self.freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        """Return the arguments from the student's config node and MODEL.BACKBONE.FREEZE_AT."""
        node = cfg.MODEL[cls.config_key.partition(".")[2]]
        arguments = {key.lower(): value for key, value in node.items()}
        return {**arguments, "freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT, "in_channels": input_shape.channels}

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Run the stages.

        Args:
            x: images, (B, C, H, W).

        Returns:
            ``out_features`` by name, shallow to deep; each (B, C, ceil(H / stride), ceil(W / stride)), with the
            channels and the stride that :meth:`output_shape` declares.
        """
        assert x.dim() == 4, f"{self._network_name} takes images of shape (B, C, H, W), not {x.shape}"
        outputs: Dict[str, torch.Tensor] = {}
        for stage in self.built_stages:
            for path in stage.modules:
                # Not by get_submodule, which torch.export does not know in torch 2.5.
                x = functools.reduce(getattr, path.split("."), self)(x)
            if stage.name in self._out_features:
                outputs[stage.name] = x
        return outputs

    def freeze(self, freeze_at: int = 0) -> "StagedBackbone":
        """Freeze the first stages, as :meth:`detectron2.modeling.ResNet.freeze` does.

        Their parameters stop requiring gradients, and their batch norms become :class:`FrozenBatchNorm2d`. Other norm
        layers stay what they are, with frozen parameters.

        Args:
            freeze_at: 0 for none, 1 for the stem (everything before res2), 2 for the stem and res2, ... 5 for all.

        Returns:
            This backbone.
        """
        for stage in self.built_stages[:freeze_at]:
            for path in stage.modules:
                module = self.get_submodule(path)
                for parameter in module.parameters():
                    parameter.requires_grad = False
                self.set_submodule(path, freeze_batch_norms(module))
        return self

    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Return the features of res2 to res5 for distillation positions, shallow to deep, by name."""
        raise NotImplementedError(f"{type(self).__name__} declares no distillation features")

    def _adopt(self, path: str, module: nn.Module) -> None:
        parent: nn.Module = self
        *containers, name = path.split(".")
        for container in containers:
            if not hasattr(parent, container):
                parent.add_module(container, nn.Sequential())
            parent = parent.get_submodule(container)
        parent.add_module(name, module)

    def _check(self, out_features: Sequence[str], freeze_at: int) -> None:
        names = ", ".join(STAGE_NAMES)
        if isinstance(out_features, str) or not out_features or any(name not in STAGE_NAMES for name in out_features):
            raise UserError(
                f"{self.config_key}.OUT_FEATURES is {out_features!r}; for {self._network_name}, give a list of one or "
                f"more of {names}"
            )
        if freeze_at not in range(len(STAGE_NAMES) + 1):
            raise UserError(
                f"MODEL.BACKBONE.FREEZE_AT is {freeze_at!r}; for {self._network_name}, give a whole number from 0 "
                f"(nothing frozen) to {len(STAGE_NAMES)} (all of {names})"
            )


def set_input_channels(network: nn.Module, in_channels: int) -> None:
    """Give a network a newly initialised first convolution for images that are not RGB.

    Args:
        network: one whose first convolution by order of registration takes the image.
        in_channels: channels of the image, > 0; 3 leaves the network as it is.
    """
    assert in_channels > 0, f"in_channels must be > 0, not {in_channels}"
    if in_channels == 3:
        return
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    conv.in_channels = in_channels
    conv.weight = nn.Parameter(conv.weight.new_empty(conv.out_channels, in_channels, *conv.kernel_size))
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
