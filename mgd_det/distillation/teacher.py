"""The frozen teacher: the part of a detector that makes the features to distil."""

import copy
import hashlib
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, ContextManager, Dict, Optional, Sequence, Tuple

import torch
from torch import nn

from mgd_det.distillation.compilation import compile_around
from mgd_det.distillation.conv_bn_fusion import BATCH_NORMS, fuse_conv_bn
from mgd_det.distillation.feature_hooks import FeatureHooks
from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.pixels import PixelConverter, PixelFormat
from mgd_det.errors import ArgumentError, UserError, check_choice

Features = Dict[str, torch.Tensor]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TeacherOptions:
    """How the teacher's backbone computes: the keys of MODEL.MGD.TEACHER of the same names, which say more.

    Raises:
        ArgumentError: an option has a wrong value.
    """

    dtype: str = "auto"
    channels_last: bool = True
    compile: bool = False
    fold_norm: bool = True

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, _DTYPES)
        for name in ("channels_last", "compile", "fold_norm"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ArgumentError(name, f"is {value!r}; use one of True, False")


@dataclass(frozen=True)
class TeacherNetwork:
    """A trained network that can teach, as it was loaded.

    Attributes:
        network: a backbone, or the whole detector where its heads teach too.
        pixels: the input that it was trained with.
        unset: names, in the detector, of the tensors that its weights left at their initial value.
        options: how its backbone computes.
    """

    network: nn.Module
    pixels: PixelFormat
    unset: Sequence[str] = ()
    options: TeacherOptions = field(default_factory=TeacherOptions)

    @property
    def detector(self) -> Optional[nn.Module]:
        """The detector, or None where ``network`` is a backbone."""
        return self.network if hasattr(self.network, "backbone") else None

    @property
    def backbone(self) -> nn.Module:
        """The network whose features are read."""
        return getattr(self.network, "backbone", self.network)

    @property
    def features(self) -> Dict[str, FeatureSpec]:
        """What can be read, by name."""
        return distillation_features(self.backbone)


class Teacher:
    """A frozen backbone in eval mode, with or without the detector around it, that answers a student's images.

    It is not an ``nn.Module``, so that the optimizer, DistributedDataParallel and the checkpoints of a student that
    holds one have no parameter of the teacher, and ``train()`` does not reach it. :meth:`apply` moves it along.
    A deep copy shares the network, which never changes in training, until one of the two moves elsewhere.

    Attributes:
        pixels, options: see :class:`TeacherNetwork`.
    """

    def __init__(self, teacher: TeacherNetwork, features: Sequence[str], student_pixels: PixelFormat) -> None:
        """
        Args:
            teacher: the network, with its weights.
            features: what a call returns, of ``teacher.features``.
            student_pixels: what the student's images are normalised with.

        Raises:
            UserError: the part of the network that makes the features has tensors without weights.
            ArgumentError: the student's colour channels are not the teacher's.
            KeyError: the network has no feature of that name.
        """
        available = teacher.features
        specs = {name: available[name] for name in features}
        _check_weights(teacher, specs)
        self.pixels, self.options = teacher.pixels, teacher.options
        self._network = teacher.network.eval().requires_grad_(False)
        self._is_detector = teacher.detector is not None
        self._part = _part_that_runs(specs)
        self._hashes: Tuple[str, str] = ("", "")  # not computed yet
        # Copies: fusion, or another dtype, would change what they say of the features.
        self._norms = {
            name: None if spec.norm is None else copy.deepcopy(self.backbone.get_submodule(spec.norm))
            for name, spec in specs.items()
        }
        self._read_in = [spec.module for spec in specs.values()]
        self._hooks = FeatureHooks(self.backbone, specs, stop_after_last=True)
        self._hooks_of_whole = FeatureHooks(self.backbone, specs)
        self._convert = PixelConverter(student_pixels, teacher.pixels)
        self._dtype: Optional[torch.dtype] = None  # of the images, once the network is in it
        self._is_optimized = False
        self._is_shared = False  # with a deep copy

    @property
    def detector(self) -> Optional[nn.Module]:
        """The teacher's detector, whose heads some losses and masks run; None where only the backbone is there."""
        return self._network if self._is_detector else None

    @property
    def backbone(self) -> nn.Module:
        """The network whose features are read."""
        return self._network.get_submodule("backbone") if self._is_detector else self._network

    def norm(self, feature: str) -> Optional[nn.Module]:
        """Return a copy of the last norm layer before a feature, as it was loaded, or None."""
        return self._norms[feature]

    @property
    def weights_hash(self) -> str:
        """A short hash of the weights that make the features, as they were loaded, on any device.

        It is computed once: at the first use, or before :meth:`optimize` changes them.
        """
        return self._hashed()[0]

    @property
    def detector_hash(self) -> str:
        """The same of the whole detector, whose FPN and heads teach too; "" where only the backbone is there."""
        return self._hashed()[1]

    def _hashed(self) -> Tuple[str, str]:
        if not self._hashes[0]:
            whole = _hash_of_tensors(self._network, "") if self._is_detector else ""
            self._hashes = (_hash_of_tensors(self.backbone, self._part), whole)
        return self._hashes

    def optimize(self, device: torch.device) -> None:
        """Make the network compute as its options say. Call it when the network is on its final device.

        A second call does nothing. Until the first, the network runs as it was loaded.

        Raises:
            UserError: float16 on a CPU.
        """
        if self._is_optimized:
            return
        options = self.options
        if options.dtype == "float16" and device.type == "cpu":
            raise UserError(
                "MODEL.MGD.TEACHER.DTYPE is 'float16', in which a CPU is slower than in float32: use 'bfloat16', "
                "which has as many bits, or 'float32'"
            )
        self._hashed()
        if options.fold_norm:
            fuse_conv_bn(self.backbone)
        self._dtype = _DTYPES[options.dtype]
        if self._dtype is not None:
            _cast(self.backbone, self._dtype)
        if options.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if options.compile:
            read_in = [self.backbone.get_submodule(name) for name in self._read_in]
            compile_around(self.backbone, read_in, "MODEL.MGD.TEACHER.COMPILE")
        self._is_optimized = True

    def __call__(self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None) -> Features:
        """Run the backbone up to the last feature.

        Args:
            images: (B, C, H, W), normalised for the student.
            image_sizes: see :class:`PixelConverter`.

        Returns:
            The chosen features by name, each (B, Ct, h, w), without gradient.

        Raises:
            UserError: a feature overflows float16.
        """
        return self._forward(self._hooks, images, image_sizes)[0]

    def features_and_outputs(
        self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None
    ) -> Tuple[Features, Features]:
        """Run the whole backbone; return the features as a call does, and its outputs in float32 or better."""
        return self._forward(self._hooks_of_whole, images, image_sizes)

    @torch.no_grad()
    def _forward(
        self, hooks: FeatureHooks, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]]
    ) -> Tuple[Features, Features]:
        # no_grad, not inference_mode, whose tensors cannot be saved for the student's backward.
        images = self._convert(images, image_sizes)
        precision: ContextManager[Any] = nullcontext()
        if self._dtype is not None:
            images = images.to(self._dtype)
            precision = torch.autocast(images.device.type, enabled=False)
        if self._is_optimized and self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs: Features = {}
        with precision, hooks.reading() as features:
            outputs = self.backbone(images)
        if self.options.dtype == "float16":
            _refuse_overflow(features)
        else:
            _mark_overflow(features)
        # Reducers and losses go through a map channel by channel, and beside a student's map that is contiguous.
        features = {name: feature.contiguous() for name, feature in features.items()}
        # The heads' weights are in float32, and outside autocast so must be what they read.
        outputs = {name: x.float() if x.dtype in _HALF else x for name, x in outputs.items()}
        return features, outputs

    # ------------------------------------------------------------------ moves and copies
    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply ``fn`` to every tensor, as ``nn.Module._apply`` does for ``.to(device)`` of the owner.

        A teacher whose options name a dtype does not follow the student's.
        """
        if self.options.dtype != "auto":
            fn = _of_own_dtype(fn)
        if self._is_shared and self._is_changed_by(fn):
            # Copied together: the hooks on the network belong to the objects that read them.
            self._network, self._hooks, self._hooks_of_whole = copy.deepcopy(
                (self._network, self._hooks, self._hooks_of_whole)
            )
            self._is_shared = False
        self._network._apply(fn)

    def _is_changed_by(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> bool:
        tensor = next(self._network.parameters()).detach()
        result = fn(tensor)
        return (result.device, result.dtype) != (tensor.device, tensor.dtype)

    def __deepcopy__(self, memo: Dict[int, Any]) -> "Teacher":
        self._hashed()  # of the weights as they were loaded: either may change the network that both share
        twin = copy.copy(self)
        self._is_shared = twin._is_shared = True
        return twin


def _check_weights(teacher: TeacherNetwork, specs: Dict[str, FeatureSpec]) -> None:
    """Raise UserError if the part that runs (of an FPN, maybe the bottom-up alone) has tensors without weights."""
    # Of a detector the heads run too.
    part = "" if teacher.detector is not None else f"backbone.{_part_that_runs(specs)}"
    unset = [name for name in teacher.unset if name.startswith(part)]
    if unset:
        raise UserError(
            f"the teacher's weights leave {len(unset)} of its tensors at their initial value "
            f"({', '.join(unset[:3])}{', ...' if len(unset) > 3 else ''}): they are of another network. Check "
            "MODEL.MGD.TEACHER.CONFIG_FILE, OPTS and WEIGHTS, or name them in MODEL.MGD.TEACHER.ALLOW_UNSET."
        )


def _part_that_runs(specs: Dict[str, FeatureSpec]) -> str:
    """Return the prefix, in the backbone, of the tensors that make the features: of an FPN, maybe the bottom-up's."""
    modules = [spec.module for spec in specs.values()]
    return "bottom_up." if modules and all(module.startswith("bottom_up.") for module in modules) else ""


def _hash_of_tensors(network: nn.Module, prefix: str) -> str:
    """Return a hash of 16 hexadecimal digits of the floating-point tensors below a prefix, read as float32."""
    result = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(network.state_dict().items()):
        if name.startswith(prefix) and tensor.is_floating_point():
            result.update(f"{name} {tuple(tensor.shape)}".encode())
            result.update(tensor.float().cpu().contiguous().flatten().numpy())
    return result.hexdigest()


def _of_own_dtype(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        other = fn(tensor)
        return other if other.dtype == tensor.dtype else tensor.to(other.device)

    return moved


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast a network to a floating-point dtype. Batch norms stay in float32, which their statistics need."""
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _mark_overflow(features: Features) -> None:
    """Put NaN into each float16 feature with an infinity, so that its loss is NaN. Nothing is read from the device.

    An infinity alone may leave a loss finite: -inf is below every margin.
    """
    for feature in features.values():
        if feature.dtype == torch.float16 and feature.numel() > 0:
            # At one place of every channel, since a loss may read some of them only.
            feature[:, :, 0, 0] += torch.where(feature.isfinite().all(), 0.0, torch.nan).to(feature.dtype)


def _refuse_overflow(features: Features) -> None:
    """Raise UserError for a float16 feature with an infinity, which would make the loss NaN or wrong."""
    half = {name: feature for name, feature in features.items() if feature.dtype == torch.float16}
    if not half:
        return
    # One transfer from the device for all.
    finite = torch.stack([feature.isfinite().all() for feature in half.values()]).tolist()
    broken = [name for name, is_finite in zip(half, finite) if not is_finite]
    if broken:
        raise UserError(
            f"the teacher's {', '.join(broken)} overflows float16, whose largest value is 65504: set "
            "MODEL.MGD.TEACHER.DTYPE to 'bfloat16' or 'float32'"
        )
