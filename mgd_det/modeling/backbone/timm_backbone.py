"""The networks of timm as Detectron2 backbones.

timm is an optional dependency: it is imported when a network is built.

Shape shorthand in this module: B images, C channels, H and W pixels of the input.
"""

import copy
import re
from dataclasses import replace
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.layers import FrozenBatchNorm2d
from torch import nn

from mgd_det.distillation.feature_hooks import FeatureHooks, ends_in_activation
from mgd_det.distillation.features import FeatureSpec
from mgd_det.errors import UserError, did_you_mean
from mgd_det.modeling.backbone.norms import Norm, freeze_batch_norms
from mgd_det.modeling.backbone.staged_backbone import STAGE_NAMES, Stage, StagedBackbone

# Output strides of res2 to res5, and the pixels that an image's sides must be a multiple of for the last.
_STRIDES = (4, 8, 16, 32)
_MAX_STRIDE = _STRIDES[-1]
# Height and width of images for trial runs: multiples of 32 that no network was made for, and sides with a remainder
# at every stride.
_TRIAL_SIZE = (3 * _MAX_STRIDE, 5 * _MAX_STRIDE)
_ODD_SIZE = (75, 101)
# What networks raise in trial runs on images of a size that they cannot process.
_TRIAL_ERRORS = (RuntimeError, AssertionError, ValueError, IndexError, TypeError)
_NORMS = (FrozenBatchNorm2d, nn.GroupNorm)

Tensors = Dict[str, torch.Tensor]


class TimmBackbone(StagedBackbone):
    """A network of timm (https://github.com/huggingface/pytorch-image-models) that has ``features_only``.

    The layers are timm's, and their names are those of ``timm.create_model(name, features_only=True)`` after
    "body.". Suitable networks are a chain of modules with features of strides 4, 8, 16 and 32 for images of any size:
    most convolutional networks, but not vision transformers.

    res2 to res5 end with timm's last feature of stride 4, 8, 16 and 32. The stem is what runs before res2. Its stride
    is 2, or 4 in networks whose first layers reduce the map that far (ConvNeXt).

    Attributes:
        size_divisibility: 0 if a map of an image of H x W pixels has ceil(H / stride) x ceil(W / stride) places for
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
            name: of a network that timm knows, such as "efficientnet_b0". Its weights are random.
            norm: see :class:`StagedBackbone`.
            out_features: see :class:`StagedBackbone`.
            freeze_at: see :class:`StagedBackbone`.
            in_channels: channels of the input image, > 0.

        Raises:
            UserError: timm is not installed, does not know the network, or the network is not suitable; or a value
                is not listed above.
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

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility

    @torch.no_grad()
    def distillation_features(self) -> Dict[str, FeatureSpec]:
        """Find the features of each stage for distillation positions, by a trial run on a small image.

        "resN" is the stage's output before its activation, if it ends in one (ResNet, RegNet), otherwise its output
        (EfficientNet, ConvNeXt). "resN.expansion", in networks of inverted residuals (MobileNetV2 to V4,
        EfficientNet), is the expansion in the stage's last block of that kind, before its activation; a stage that
        halves its map after that expansion has none. All have the stage's stride.

        The norm layer of a feature is one whose output is the feature, alone or plus the input of a block around it.
        So if a shortcut is added, it describes the residual branch alone, as in Detectron2's ResNet. Other features
        (layer scale, concatenation, a shortcut with layers of its own) have None.

        Returns:
            :class:`FeatureSpec` by name, shallow to deep, of the stages that this backbone has.
        """
        # A copy, so that trial runs and hooks do not change this network.
        net: Any = freeze_batch_norms(copy.deepcopy(self)).eval()
        for norm in net.modules():
            if isinstance(norm, _NORMS) and norm.weight is not None:
                # Every channel gets its own weight and bias: initial zeros would hide which layers are added.
                norm.weight.copy_(torch.linspace(0.5, 1.5, norm.weight.numel()))
                norm.bias.copy_(torch.linspace(-1, 1, norm.bias.numel()))
        inputs = _record_inputs(net, _trial_image(net, self._in_channels, _TRIAL_SIZE))
        features: Dict[str, FeatureSpec] = {}
        for stage in net.built_stages[1:]:
            # An Identity at the end would hide the activation before it.
            last = next(p for p in reversed(stage.modules) if not isinstance(net.get_submodule(p), nn.Identity))
            spec, output = _read(net, last, inputs)
            expansion = _last_expansion(net, stage)
            if expansion is not None:
                of_expansion, expanded = _read(net, expansion, inputs)
                if expanded.shape[-2:] == output.shape[-2:]:
                    features[f"{stage.name}.expansion"] = of_expansion
            features[stage.name] = spec
        return features

    @torch.no_grad()
    def _takes_any_size(self) -> bool:
        self.eval()
        try:
            outputs = self(_trial_image(self, self._in_channels, _ODD_SIZE))
        except _TRIAL_ERRORS:
            return False
        finally:
            self.train()
        strides = self._out_feature_strides
        return all(
            x.shape[-2:] == tuple(-(-side // strides[name]) for side in _ODD_SIZE) for name, x in outputs.items()
        )


# ---------------------------------------------------------------------- construction
def _create_model(name: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise UserError("MODEL.TIMM needs the package timm, which is not installed: `pip install timm`.") from error
    if not timm.is_model(name):
        suggestion = did_you_mean(str(name), timm.list_models()) or " timm.list_models() lists the names."
        raise UserError(f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not know.{suggestion}")
    try:
        return timm.create_model(name, features_only=True, pretrained=False, in_chans=in_channels)
    except Exception as error:  # each network refuses features_only, in_chans or a tag in its own way
        raise _unsuitable(name, f"timm cannot build it as a feature extractor ({error})") from error


@torch.no_grad()
def _find_stages(name: str, body: nn.Module, in_channels: int) -> List[Stage]:
    """Divide a feature extractor of timm into the stages of :data:`STAGE_NAMES`; its owner has it as "body"."""
    info: Any = body.feature_info
    module_of = dict(zip(info.reduction(), info.module_name()))  # the last of each stride
    if not set(_STRIDES) <= set(module_of):
        found = ", ".join(map(str, module_of))
        raise _unsuitable(name, f"its features have strides {found}, but res2 to res5 need 4, 8, 16 and 32")
    lasts = [_path_in(body, module_of[stride]) for stride in _STRIDES]
    height, width = _TRIAL_SIZE
    image = _trial_image(body, in_channels, _TRIAL_SIZE)
    body.eval()
    try:
        features = dict(zip(info.reduction(), body(image)))
    except _TRIAL_ERRORS as error:
        message = str(error) or type(error).__name__
        raise _unsuitable(name, f"it cannot process images of {height} x {width} pixels ({message})") from error
    chain = _run_chain(body, lasts, image)
    body.train()
    for stride, last in zip(_STRIDES, lasts):
        if last not in chain or not torch.equal(chain[last], features[stride]):
            raise _unsuitable(
                name, f"its feature of stride {stride} is not the output of a module in a chain of modules"
            )
        shape = tuple(chain[last].shape)
        if shape[-2:] != (height // stride, width // stride):
            raise _unsuitable(name, f"its feature of stride {stride} has shape {shape} for {height} x {width} pixels")

    paths = list(chain)
    bounds = [0, _start_of_res2(body, chain, lasts[0]), *(paths.index(last) + 1 for last in lasts)]
    stages = []
    for stage, start, stop in zip(STAGE_NAMES, bounds, bounds[1:]):
        output = chain[paths[stop - 1]] if stop else image
        modules = tuple(f"body.{path}" for path in paths[start:stop])
        stages.append(Stage(stage, modules, output.shape[1], height // output.shape[-2]))
    return stages


def _path_in(body: nn.Module, name: str) -> str:
    """Return the path of the module that timm lists as ``name``; it renames some in feature extractors."""
    modules = dict(body.named_modules())
    paths = (name, name.replace(".", "_", 1), f"model.{name}")
    return next((path for path in paths if path in modules), name)


def _run_chain(body: nn.Module, ends: Sequence[str], x: torch.Tensor) -> Tensors:
    """Run a network's modules one after another, divided as finely as necessary to end with each of ``ends``.

    Returns:
        Path and output of each module, up to the last of ``ends``, or to one whose output the next cannot process.
    """

    def divide(module: nn.Module, prefix: str = "") -> Iterator[str]:
        for name, child in module.named_children():
            path = prefix + name
            if any(end.startswith(f"{path}.") for end in ends):
                yield from divide(child, f"{path}.")
            else:
                yield path

    outputs: Tensors = {}
    for path in divide(body):
        try:
            x = body.get_submodule(path)(x)
            outputs[path] = x.clone()  # the next module may write into it
        except (*_TRIAL_ERRORS, NotImplementedError, AttributeError):  # AttributeError: not a tensor
            break
        if path == ends[-1]:
            break
    return outputs


def _start_of_res2(body: nn.Module, chain: Tensors, last: str) -> int:
    """Return the index in ``chain`` of the first module of res2, which ends with module ``last``.

    A module before ``last`` belongs to res2 if it has its stride and either is numbered in a row with it
    ("features.1", "features.2"), or has no parameters and reduces the map to that stride (a pooling).
    """
    paths = list(chain)
    sizes = [chain[path].shape[-2:] for path in paths]
    row = re.sub(r"[\d_]+$", "", last)
    start = end = paths.index(last)
    while start > 0 and sizes[start - 1] == sizes[end]:
        path = paths[start - 1]
        is_pooling = start > 1 and sizes[start - 2] != sizes[end] and not list(body.get_submodule(path).parameters())
        if re.sub(r"[\d_]+$", "", path) != row and not is_pooling:
            break
        start -= 1
    return start


def _unsuitable(name: str, reason: str) -> UserError:
    return UserError(
        f"MODEL.TIMM.NAME is {name!r}, which cannot be a backbone here: {reason}. Choose a convolutional network such "
        "as resnet18, regnety_002, efficientnet_b0 or convnext_atto."
    )


def _trial_image(net: nn.Module, channels: int, size: Tuple[int, int]) -> torch.Tensor:
    """Return an image (1, channels, H, W) without constant regions; torch's random state does not change."""
    values = torch.arange(channels * size[0] * size[1]).reshape(1, channels, *size)
    return values.mul(0.7).sin().to(next(net.parameters()))


# ---------------------------------------------------------------------- distillation features
def _last_expansion(net: nn.Module, stage: Stage) -> Optional[str]:
    """Return the path of the module, with norm and activation, that expands a stage's last inverted residual."""
    for path in reversed(stage.modules):
        for name, block in reversed(list(net.get_submodule(path).named_modules(prefix=path))):
            if hasattr(block, "conv_pwl") and hasattr(block, "bn1"):  # InvertedResidual, EdgeResidual
                return f"{name}.bn1"
            if hasattr(block, "pw_proj") and hasattr(block, "pw_exp"):  # UniversalInvertedResidual
                return f"{name}.pw_exp"
    return None


def _record_inputs(net: nn.Module, image: torch.Tensor) -> Tensors:
    """Return the first input of every module in one forward, by path."""
    inputs: Tensors = {}

    def keep(path: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], torch.Tensor):
            inputs.setdefault(path, args[0].clone())

    handles = [module.register_forward_pre_hook(partial(keep, path)) for path, module in net.named_modules()]
    net(image)
    for handle in handles:
        handle.remove()
    return inputs


def _read(net: nn.Module, path: str, inputs: Tensors) -> Tuple[FeatureSpec, torch.Tensor]:
    """Run a module on its recorded input; return how to read its feature, and the feature (1, C, H, W)."""
    module = net.get_submodule(path)
    spec = FeatureSpec(path, before_activation=ends_in_activation(module, inputs[path].clone()))
    with FeatureHooks(net, {"feature": spec}).reading() as features:
        module(inputs[path].clone())
    return replace(spec, norm=_norm_of(module, path, features["feature"], inputs)), features["feature"]


def _norm_of(module: nn.Module, path: str, feature: torch.Tensor, inputs: Tensors) -> Optional[str]:
    """Return the path of the norm layer in ``module`` whose output is the feature, alone or plus a block's input."""
    for name, norm in module.named_modules(prefix=path):
        if not isinstance(norm, _NORMS) or norm.weight is None or name not in inputs:
            continue
        # forward() itself does not run the activation, which is in a hook of the layer (see replace_batch_norms).
        output = norm.forward(inputs[name])
        if output.shape == feature.shape:
            rest, tolerance = feature - output, 1e-4 * float(feature.abs().max())
            shortcuts = [x for block, x in inputs.items() if block.startswith(path) and name.startswith(f"{block}.")]
            added = [torch.zeros_like(rest), *(x for x in shortcuts if x.shape == rest.shape)]
            if any(torch.allclose(rest, x, atol=tolerance) for x in added):
                return name
    return None
