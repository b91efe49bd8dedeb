"""The networks of timm as Detectron2 backbones.

timm is an optional dependency: it is imported when a network is built, and not before.

Shape shorthand in this module: B images, C channels, H and W pixels of the input.
"""

import copy
import difflib
import re
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from torch import nn

from mgd_det.distillation.feature_hooks import FeatureHooks, ends_in_activation
from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError
from mgd_det.modeling.backbone.norms import Norm, freeze_batch_norms
from mgd_det.modeling.backbone.staged_backbone import STAGE_NAMES, Stage, StagedBackbone

__all__ = ["TimmBackbone"]

# Output strides of res2 to res5, and the pixels that an image's sides must be a multiple of for the last.
_STRIDES = (4, 8, 16, 32)
_MAX_STRIDE = _STRIDES[-1]
# Images for trial runs, height and width: multiples of 32 that no network was made for, and sides that leave a
# remainder at every stride.
_TRIAL_SIZE = (3 * _MAX_STRIDE, 5 * _MAX_STRIDE)
_ODD_SIZE = (75, 101)
_SUGGESTION = "Choose a convolutional network such as resnet18, regnety_002, efficientnet_b0 or convnext_atto."
# What networks raise in trial runs on images of a size that they do not take.
_TRIAL_ERRORS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError)
_NORMS = (FrozenBatchNorm2d, nn.GroupNorm)


class TimmBackbone(StagedBackbone):
    """A network of timm (https://github.com/huggingface/pytorch-image-models) that has ``features_only``.

    The layers are timm's, and their names are those of ``timm.create_model(name, features_only=True)`` after
    "body.". Networks fit that are a chain of modules, with features of strides 4, 8, 16 and 32, for images of any size:
    convolutional networks, as a rule. Vision transformers do not.

    res2 to res5 end with timm's last feature of stride 4, 8, 16 and 32. The stem is what runs before res2; its stride
    is 2, but 4 in networks whose first layers reduce the map that far (ConvNeXt).

    Attributes:
        size_divisibility: 0 where a map of an image of H x W pixels has ceil(H / stride) x ceil(W / stride) places for
            any H and W; 32 for networks that cut off a remainder (ConvNeXt, VoVNet), so that images are padded.
    """

    config_key = "MODEL.TIMM"

    @configurable
    def __init__(
        self,
        *,
        name: str,
        norm: Norm = "FrozenBN",
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        freeze_at: int = 0,
        in_channels: int = 3,
    ) -> None:
        """
        Args:
            name: of a network that timm knows, such as "efficientnet_b0". Its weights are drawn at random.
            norm: in the place of the network's batch norms, "FrozenBN", "BN", "SyncBN", "GN" or another name that
                :func:`detectron2.layers.get_norm` knows, or a function from a number of channels to a layer. "GN" has
                32 groups, or gcd(32, channels) where 32 does not divide the channels.
            out_features: features to return, of "stem", "res2", "res3", "res4", "res5". Layers after the
                deepest of them are not built.
            freeze_at: number of stages to freeze, 0 to 5; see :meth:`freeze`.
            in_channels: channels of the input image, > 0.

        Raises:
            UserError: timm is not installed, does not know the network, or the network does not fit; or a value
                outside of what is listed above.
        """
        assert in_channels > 0, f"in_channels must be > 0, not {in_channels}"
        network = nn.Module()
        network.body = _create_model(name, in_channels)
        stages = _find_stages(name, network.body, in_channels)
        super().__init__(
            network, stages, norm=norm, out_features=out_features, freeze_at=freeze_at, network_name=f"timm's {name}"
        )
        self._in_channels = in_channels
        self._size_divisibility = 0 if self._takes_any_size() else _MAX_STRIDE

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> Dict[str, Any]:
        """Reads MODEL.TIMM and MODEL.BACKBONE.FREEZE_AT."""
        return {**super().from_config(cfg, input_shape), "name": cfg.MODEL.TIMM.NAME}

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @torch.no_grad()
    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """The features that each stage offers to a distillation position, found in a trial run on a small image.

        "resN" is the stage's output before its activation, where it ends in one (ResNet, RegNet), else its output
        (EfficientNet, ConvNeXt). "resN.expansion", in networks of inverted residuals (MobileNetV2 to V4,
        EfficientNet), is what the stage's last block of that kind expands to, before its activation; a stage whose
        map is halved after that expansion has none. All have the stage's stride.

        The norm layer of a feature is one whose output the feature is, alone or plus the input of a block around it.
        So where a shortcut is added, it describes the residual branch alone, as in Detectron2's ResNet. Features made
        otherwise (layer scale, concatenation, a shortcut with layers of its own) have None.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        # A copy, so that trial runs and hooks leave no trace in this network.
        net: Any = freeze_batch_norms(copy.deepcopy(self)).eval()
        _spread_norms(net)
        inputs = _record_inputs(net, _trial_image(_TRIAL_SIZE, self._in_channels, like=next(self.parameters())))
        features: Dict[str, FeatureSpec] = {}
        for stage in net.built_stages[1:]:
            output = _Feature(net, _last_that_computes(net, stage), inputs)
            expansion = _last_expansion(net, stage)
            if expansion is not None:
                expanded = _Feature(net, expansion, inputs)
                if expanded.value.shape[-2:] == output.value.shape[-2:]:
                    features[f"{stage.name}.expansion"] = expanded.spec
            features[stage.name] = output.spec
        return features

    @torch.no_grad()
    def _takes_any_size(self) -> bool:
        self.eval()
        image = _trial_image(_ODD_SIZE, self._in_channels, like=next(self.parameters()))
        try:
            sizes = {name: tuple(x.shape[-2:]) for name, x in self(image).items()}
        except _TRIAL_ERRORS:
            return False
        finally:
            self.train()
        strides = self._out_feature_strides
        return all(sizes[name] == tuple(-(-side // strides[name]) for side in _ODD_SIZE) for name in sizes)


# ---------------------------------------------------------------------- construction
def _create_model(name: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError("MODEL.TIMM needs the package timm, which is not installed: `pip install timm`.") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(str(name), timm.list_models(), n=5, cutoff=0.5)
        advice = f"Did you mean {', '.join(near)}?" if near else "timm.list_models() lists the names."
        raise UserError(f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know. {advice}")
    try:
        return timm.create_model(name, features_only=True, pretrained=False, in_chans=in_channels)
    except Exception as error:  # each network refuses features_only, in_chans or a tag in its own way
        raise _unfit(name, f"timm does not build it as a feature extractor ({error})") from error


@torch.no_grad()
def _find_stages(name: str, body: nn.Module, in_channels: int) -> List[Stage]:
    """Cuts a feature extractor of timm into the stages of :data:`STAGE_NAMES`, with paths from its owner's "body"."""
    info: Any = body.feature_info
    index_of = {feature["reduction"]: i for i, feature in enumerate(info.info)}  # the last of each stride
    if not set(_STRIDES) <= set(index_of):
        strides = ", ".join(map(str, index_of))
        raise _unfit(
            name, f"its features have strides {strides}, but res2 to res5 are those of strides 4, 8, 16 and 32"
        )
    lasts = [_path_in(body, info[index_of[stride]]["module"]) for stride in _STRIDES]
    height, width = _TRIAL_SIZE
    image = _trial_image(_TRIAL_SIZE, in_channels, like=next(body.parameters()))
    body.eval()
    try:
        outputs = dict(zip(info.out_indices, body(image)))
    except _TRIAL_ERRORS as error:
        message = str(error) or type(error).__name__
        raise _unfit(name, f"it does not take images of {height} x {width} pixels ({message})") from error
    chain = _run_chain(body, lasts, image)
    body.train()
    for stride, last in zip(_STRIDES, lasts):
        expected, feature = outputs.get(index_of[stride]), chain.get(last)
        if feature is None or expected is None or feature.shape != expected.shape or not torch.equal(feature, expected):
            raise _unfit(name, f"its feature of stride {stride} is not the output of one of a chain of modules")
        if feature.shape[-2:] != (height // stride, width // stride):
            shape = tuple(feature.shape)
            raise _unfit(name, f"its feature of stride {stride} has shape {shape} for {height} x {width} pixels")

    paths = list(chain)
    stops = [_start_of_res2(body, chain, lasts[0]), *(paths.index(last) + 1 for last in lasts)]
    starts = [0, *stops[:-1]]
    stages = []
    for stage, start, stop in zip(STAGE_NAMES, starts, stops):
        output = chain[paths[stop - 1]] if stop else image
        modules = tuple(f"body.{path}" for path in paths[start:stop])
        stages.append(Stage(stage, modules, output.shape[1], height // output.shape[-2]))
    return stages


def _path_in(body: nn.Module, name: str) -> str:
    """Where timm put the module that it lists under ``name``; it renames some in feature extractors."""
    modules = dict(body.named_modules())
    paths = (name, name.replace(".", "_", 1), f"model.{name}")
    return next((path for path in paths if path in modules), name)


def _run_chain(body: nn.Module, ends: Sequence[str], x: torch.Tensor) -> Dict[str, torch.Tensor]:
    """Runs a network's modules one after the other, as finely divided as it takes to end with each of ``ends``.

    Returns:
        path and output of each module, up to the last of ``ends``, or to a module that cannot follow the one before.
    """

    def divide(path: str, module: nn.Module) -> Iterator[str]:
        if not path or any(end.startswith(f"{path}.") for end in ends):
            for name, child in module.named_children():
                yield from divide(f"{path}.{name}" if path else name, child)
        else:
            yield path

    outputs: Dict[str, torch.Tensor] = {}
    for path in divide("", body):
        try:
            x = body.get_submodule(path)(x)
        except _TRIAL_ERRORS + (NotImplementedError,):
            break
        if not isinstance(x, torch.Tensor):
            break
        outputs[path] = x.clone()  # the next module may write into it
        if path == ends[-1]:
            break
    return outputs


def _start_of_res2(body: nn.Module, chain: Dict[str, torch.Tensor], last: str) -> int:
    """Index in ``chain`` of the first module of res2, which ends with module ``last``.

    Modules before ``last`` are of the stage where they have its stride and are numbered in a row with it
    ("features.1", "features.2"), or have no parameters and reduce the map to its stride (a pooling).
    """

    def series(path: str) -> str:
        return re.sub(r"[\d_]+$", "", path)

    paths = list(chain)
    sizes = [chain[path].shape[-2:] for path in paths]
    start = end = paths.index(last)
    while start > 0 and sizes[start - 1] == sizes[end]:
        path = paths[start - 1]
        reduces = start > 1 and sizes[start - 2] != sizes[end]
        is_pooling = reduces and next(body.get_submodule(path).parameters(), None) is None
        if series(path) != series(last) and not is_pooling:
            break
        start -= 1
    return start


def _unfit(name: str, reason: str) -> UserError:
    return UserError(f"MODEL.TIMM.NAME is {name!r}, which cannot be a backbone here: {reason}. {_SUGGESTION}")


def _trial_image(size: Tuple[int, int], channels: int, like: torch.Tensor) -> torch.Tensor:
    """An image (1, channels, H, W) without constant regions; torch's random state stays as it is."""
    height, width = size
    return torch.arange(channels * height * width).reshape(1, channels, height, width).mul(0.7).sin().to(like)


# ---------------------------------------------------------------------- distillation features
def _last_that_computes(net: nn.Module, stage: Stage) -> str:
    """Path of a stage's last module that is no Identity, which would hide the activation before it."""
    return next(path for path in reversed(stage.modules) if not isinstance(net.get_submodule(path), nn.Identity))


def _last_expansion(net: nn.Module, stage: Stage) -> Optional[str]:
    """Path of the module, with norm and activation, that widens the input of a stage's last inverted residual."""
    for path in reversed(stage.modules):
        for name, block in reversed(list(net.get_submodule(path).named_modules(prefix=path))):
            if hasattr(block, "conv_pwl") and hasattr(block, "bn1"):  # InvertedResidual, EdgeResidual
                return f"{name}.bn1"
            if hasattr(block, "pw_proj") and hasattr(block, "pw_exp"):  # UniversalInvertedResidual
                return f"{name}.pw_exp"
    return None


def _spread_norms(net: nn.Module) -> None:
    """Gives every channel of a norm layer a weight and bias of its own: initial zeros would hide what adds what."""
    for norm in net.modules():
        if isinstance(norm, _NORMS) and norm.weight is not None:
            channels = norm.weight.numel()
            norm.weight.copy_(torch.linspace(0.5, 1.5, channels))
            norm.bias.copy_(torch.linspace(-1, 1, channels))


def _record_inputs(net: nn.Module, image: torch.Tensor) -> Dict[str, torch.Tensor]:
    """The first input of every module in one forward, by path."""
    inputs: Dict[str, torch.Tensor] = {}

    def keep(path: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor):
            inputs.setdefault(path, args[0].clone())

    handles = [module.register_forward_pre_hook(partial(keep, path)) for path, module in net.named_modules()]
    net(image)
    for handle in handles:
        handle.remove()
    return inputs


class _Feature:
    """What a module of ``net`` makes of its recorded input, before its activation if it ends in one.

    Attributes:
        spec: how to read it.
        value: (1, C, H, W).
    """

    def __init__(self, net: nn.Module, path: str, inputs: Dict[str, torch.Tensor]) -> None:
        module = net.get_submodule(path)
        spec = FeatureSpec(path, before_activation=ends_in_activation(module, inputs[path].clone()))
        with FeatureHooks(net, {"feature": spec}).reading() as features:
            module(inputs[path].clone())
        self.value = features["feature"]
        self.spec = replace(spec, norm=self._find_norm(module, path, inputs))

    def _find_norm(self, module: nn.Module, path: str, inputs: Dict[str, torch.Tensor]) -> Optional[str]:
        for name, norm in module.named_modules(prefix=path):
            if not isinstance(norm, _NORMS) or norm.weight is None or name not in inputs:
                continue
            # forward() itself leaves out the activation, which runs in a hook of the layer (see replace_batch_norms).
            output = norm.forward(inputs[name])
            if output.shape != self.value.shape:
                continue
            rest = self.value - output
            blocks = [block for block in inputs if block.startswith(path) and name.startswith(f"{block}.")]
            shortcuts = [inputs[block] for block in blocks if inputs[block].shape == rest.shape]
            tolerance = 1e-4 * float(self.value.abs().max())
            if any(torch.allclose(rest, added, atol=tolerance) for added in [torch.zeros_like(rest), *shortcuts]):
                return name
        return None
