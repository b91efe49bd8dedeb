"""The frozen teacher: the part of a detector that makes the features to distil."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.pixels import PixelConverter, PixelFormat
from mgd_det.distillation.taps import FeatureTaps
from mgd_det.errors import UserError

Features = Dict[str, torch.Tensor]


class Teacher:
    """A frozen backbone in eval mode, with or without the detector around it.

    It is no ``nn.Module``, so that a student which holds one has none of the teacher's parameters in
    its optimizer, its DistributedDataParallel or its checkpoints, and ``train()`` cannot reach it.
    :meth:`apply` moves it along.

    Attributes:
        backbone: the network whose features are read.
        detector: the detector that ``backbone`` belongs to, or None: its heads are of use to logit distillation.
        available: what can be read, by name.
    """

    def __init__(self, network: nn.Module, *, pixels: PixelFormat, unset: Sequence[str] = ()) -> None:
        """
        Args:
            network: the teacher's backbone, or its whole detector, with its weights.
            pixels: the input that the teacher was trained with.
            unset: names, in the detector, of the tensors that its weights left at their initial value.
        """
        self._network = network.eval().requires_grad_(False)
        self.detector: Optional[nn.Module] = network if hasattr(network, "backbone") else None
        self.backbone = network if self.detector is None else network.get_submodule("backbone")
        self.pixels = pixels
        self.available: Dict[str, FeatureSpec] = distillation_features(self.backbone)
        self._unset = list(unset)
        self._taps: Optional[FeatureTaps] = None
        self._whole_taps: Optional[FeatureTaps] = None
        self._convert: Optional[PixelConverter] = None

    def prepare(self, features: List[str], student_pixels: PixelFormat) -> None:
        """Chooses the features that a call returns, and what the student's images are normalised with.

        Raises UserError where the part of the network that makes them has tensors without weights.
        """
        specs = {name: self.available[name] for name in features}
        self._check_weights(specs)
        self._taps = FeatureTaps(self.backbone, specs, stop_after_last=True)
        self._whole_taps = FeatureTaps(self.backbone, specs)
        self._convert = PixelConverter(student_pixels, self.pixels)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As ``nn.Module._apply``: what ``.to(device)`` of the owner does to every tensor."""
        self._network._apply(fn)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None) -> Features:
        """One forward of the backbone, up to the last feature.

        Args:
            images: (B, C, H, W), normalised for the student.
            image_sizes: see :class:`PixelConverter`.

        Returns:
            the chosen features by name, each (B, Ct, h, w), without gradient.
        """
        return self._read(self._taps, images, image_sizes)[0]

    @torch.no_grad()
    def features_and_outputs(
        self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None
    ) -> Tuple[Features, Features]:
        """One forward of the whole backbone: what a call returns, and the backbone's own outputs."""
        return self._read(self._whole_taps, images, image_sizes)

    def _read(
        self,
        taps: Optional[FeatureTaps],
        images: torch.Tensor,
        image_sizes: Optional[Sequence[Tuple[int, int]]],
    ) -> Tuple[Features, Features]:
        assert taps is not None and self._convert is not None, "call prepare() first"
        # no_grad, not inference_mode, whose tensors cannot be saved for the student's backward.
        images = self._convert(images, image_sizes)
        outputs: Features = {}
        with taps.reading() as features:
            outputs = self.backbone(images)
        return features, outputs

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
