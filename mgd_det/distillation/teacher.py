"""The frozen teacher: the part of a detector that makes the features to distil."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Callable, ContextManager, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from mgd_det.distillation.compilation import compile_around
from mgd_det.distillation.conv_bn_fusion import BATCH_NORMS, fuse_conv_bn
from mgd_det.distillation.feature_hooks import FeatureHooks
from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.pixels import PixelConverter, PixelFormat
from mgd_det.errors import UserError

Features = Dict[str, torch.Tensor]

_HALF = (torch.float16, torch.bfloat16)
_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TeacherOptions:
    """How the teacher's backbone computes: the keys of MODEL.MGD.TEACHER by the same names, where more is said.

    Raises UserError for a value that is none.
    """

    dtype: str = "auto"
    channels_last: bool = False
    compile: bool = False
    fold_norm: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise UserError(f"MODEL.MGD.TEACHER.DTYPE is {self.dtype!r}; use one of {', '.join(_DTYPES)}")
        for name in ("channels_last", "compile", "fold_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"MODEL.MGD.TEACHER.{name.upper()} is {getattr(self, name)!r}; use one of True, False")


class Teacher:
    """A frozen backbone in eval mode, with or without the detector around it.

    It is no ``nn.Module``, so that a student which holds one has none of the teacher's parameters in
    its optimizer, its DistributedDataParallel or its checkpoints, and ``train()`` cannot reach it.
    :meth:`apply` moves it along.

    The first forward on the student's behalf prepares the network as its options say: by then it is on the device
    that it stays on. A network that never teaches is not touched.

    Attributes:
        backbone: the network whose features are read.
        detector: the detector that ``backbone`` belongs to, or None: its heads are of use to logit distillation.
        available: what can be read, by name.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        pixels: PixelFormat,
        unset: Sequence[str] = (),
        options: TeacherOptions = TeacherOptions(),  # noqa: B008  (immutable)
    ) -> None:
        """
        Args:
            network: the teacher's backbone, or its whole detector, with its weights.
            pixels: the input that the teacher was trained with.
            unset: names, in the detector, of the tensors that its weights left at their initial value.
            options: how the backbone computes.
        """
        self._network = network.eval().requires_grad_(False)
        self.detector: Optional[nn.Module] = network if hasattr(network, "backbone") else None
        self.backbone = network if self.detector is None else network.get_submodule("backbone")
        self.pixels = pixels
        self.options = options
        self.available: Dict[str, FeatureSpec] = distillation_features(self.backbone)
        self._unset = list(unset)
        self._norms: Dict[str, Optional[nn.Module]] = {}
        self._taps: Optional[FeatureHooks] = None
        self._whole_taps: Optional[FeatureHooks] = None
        self._convert: Optional[PixelConverter] = None
        self._read_in: List[nn.Module] = []
        self._is_optimized = False
        self._dtype: Optional[torch.dtype] = None  # of the images, once the network is in it

    def prepare(self, features: List[str], student_pixels: PixelFormat) -> None:
        """Chooses the features that a call returns, and what the student's images are normalised with.

        Raises UserError where the part of the network that makes them has tensors without weights.
        """
        # What is compiled can no longer be read in.
        assert not (self._is_optimized and self.options.compile), "prepare() comes before the first forward"
        specs = {name: self.available[name] for name in features}
        self._check_weights(specs)
        if not self._is_optimized:
            # Folding, or another dtype, would change what they say of the features.
            self._norms = {
                name: None if spec.norm is None else copy.deepcopy(self.backbone.get_submodule(spec.norm))
                for name, spec in self.available.items()
            }
        self._read_in = [self.backbone.get_submodule(spec.module) for spec in specs.values()]
        self._taps = FeatureHooks(self.backbone, specs, stop_after_last=True)
        self._whole_taps = FeatureHooks(self.backbone, specs)
        self._convert = PixelConverter(student_pixels, self.pixels)

    def norm(self, feature: str) -> Optional[nn.Module]:
        """A copy of the last norm layer before a feature, as it came with the weights; None where there is none."""
        assert self._taps is not None, "call prepare() first"
        return self._norms[feature]

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As ``nn.Module._apply``: what ``.to(device)`` of the owner does to every tensor.

        Where the options give the teacher a dtype, it does not follow the student's.
        """
        self._network._apply(fn if self.options.dtype == "auto" else _of_own_dtype(fn))

    def try_out(self, images: torch.Tensor) -> Features:
        """As a call, by the network as it was given, whatever its options: to see channels and sizes of its features.

        It is quick where a teacher that is to be compiled, or to run in half precision on a GPU, is still on the CPU.
        """
        assert self._taps is not None, "call prepare() first"
        return self._forward(self._taps, images, None)[0]

    def __call__(self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None) -> Features:
        """One forward of the backbone, up to the last feature.

        Args:
            images: (B, C, H, W), normalised for the student.
            image_sizes: see :class:`PixelConverter`.

        Returns:
            the chosen features by name, each (B, Ct, h, w), without gradient.

        Raises:
            UserError: as :meth:`start` and what it returns.
        """
        return self.start(images, image_sizes)()[0]

    def start(
        self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None, whole: bool = False
    ) -> Callable[[], Tuple[Features, Features]]:
        """Begins a forward, on a GPU in a stream of its own where the options say so.

        Args:
            images, image_sizes: as a call's.
            whole: run the whole backbone, not only up to the last feature.

        Returns:
            a function to call once the result is needed: the features, and the backbone's own outputs in float32
            or better (empty unless ``whole``). It raises UserError where a feature overflows float16.

        Raises:
            UserError: float16 on a CPU.
        """
        self._optimize(images.device)
        taps = self._whole_taps if whole else self._taps
        assert taps is not None, "call prepare() first"

        def forward(images: torch.Tensor) -> Tuple[Features, Features]:
            return self._forward(taps, images, image_sizes)

        join = _done(forward(images))

        def finish() -> Tuple[Features, Features]:
            features, outputs = join()
            if self.options.dtype == "float16":  # asked for: elsewhere the check of the loss is enough
                _refuse_overflow(features)
            return features, outputs

        return finish

    @torch.no_grad()
    def _forward(
        self, taps: FeatureHooks, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]]
    ) -> Tuple[Features, Features]:
        # no_grad, not inference_mode, whose tensors cannot be saved for the student's backward.
        assert self._convert is not None
        images = self._convert(images, image_sizes)
        precision: ContextManager[Any] = nullcontext()
        if self._dtype is not None:
            images = images.to(self._dtype)
            precision = torch.autocast(images.device.type, enabled=False)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        outputs: Features = {}
        with precision, taps.reading() as features:
            outputs = self.backbone(images)
        # Reducers and losses go through a map channel by channel, but for the kernel of CUDA, which takes either order.
        features = {name: f if f.is_cuda else f.contiguous() for name, f in features.items()}
        # The heads stay in float32: half precision has not the digits for the corners of a box.
        outputs = {name: x.float() if x.dtype in _HALF else x for name, x in outputs.items()}
        return features, outputs

    def _optimize(self, device: torch.device) -> None:
        if self._is_optimized:
            return
        options = self.options
        if options.dtype == "float16" and device.type == "cpu":
            raise UserError(
                "MODEL.MGD.TEACHER.DTYPE is 'float16', in which a CPU is slower than in float32: use 'bfloat16', "
                "which has as many bits, or 'float32'"
            )
        if options.fold_norm:
            fuse_conv_bn(self.backbone)
        self._dtype = _DTYPES[options.dtype]
        if self._dtype is not None:
            _cast(self.backbone, self._dtype)
        if options.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        if options.compile:
            compile_around(self.backbone, self._read_in, "MODEL.MGD.TEACHER.COMPILE")
        self._is_optimized = True

    def _check_weights(self, specs: Dict[str, FeatureSpec]) -> None:
        """A teacher that is partly random teaches noise. Of an FPN, the bottom-up alone may be all that runs."""
        modules = [spec.module for spec in specs.values()]
        if self.detector is not None:
            part = ""  # its heads run too
        elif modules and all(module.startswith("bottom_up.") for module in modules):
            part = "backbone.bottom_up."
        else:
            part = "backbone."
        unset = [name for name in self._unset if name.startswith(part)]
        if unset:
            raise UserError(
                f"the teacher's weights leave {len(unset)} of its tensors at their initial value "
                f"({', '.join(unset[:3])}{', ...' if len(unset) > 3 else ''}): they are of another network. Check "
                "MODEL.MGD.TEACHER.CONFIG_FILE, OPTS and WEIGHTS, or name them in MODEL.MGD.TEACHER.ALLOW_UNSET."
            )


def _done(result: Tuple[Features, Features]) -> Callable[[], Tuple[Features, Features]]:
    return lambda: result


def _of_own_dtype(fn: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        other = fn(tensor)
        return other if other.dtype == tensor.dtype else tensor.to(other.device)

    return moved


def _cast(network: nn.Module, dtype: torch.dtype) -> None:
    """To a dtype of floating point, but for batch norms: their statistics want float32, and torch takes that."""
    for module in network.modules():
        if isinstance(module, BATCH_NORMS):
            continue
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def _refuse_overflow(features: Features) -> None:
    """An infinity would be a NaN of the loss, or, normalised away, a wrong one: float16 ends at 65504."""
    half = {name: feature for name, feature in features.items() if feature.dtype == torch.float16}
    if not half:
        return
    # One answer of the device for all.
    finite = torch.stack([feature.isfinite().all() for feature in half.values()]).tolist()
    broken = [name for name, is_finite in zip(half, finite) if not is_finite]
    if broken:
        raise UserError(
            f"the teacher's {', '.join(broken)} overflows float16, whose largest value is 65504: set "
            "MODEL.MGD.TEACHER.DTYPE to 'bfloat16' or 'float32'"
        )
