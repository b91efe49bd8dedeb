"""The frozen teacher: the part of its backbone that makes the features to distil."""

from typing import Callable, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.modeling.backbone import Backbone

from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.pixels import PixelConverter, PixelFormat
from mgd_det.distillation.taps import FeatureTaps


class Teacher:
    """A frozen bottom-up network in eval mode.

    It is no ``nn.Module``, so that a student which holds one has none of the teacher's parameters in
    its optimizer, its DistributedDataParallel or its checkpoints, and ``train()`` cannot reach it.
    :meth:`apply` moves it along.
    """

    def __init__(self, backbone: Backbone, *, pixels: PixelFormat) -> None:
        """
        Args:
            backbone: the teacher's backbone with its weights; of an FPN only the bottom-up is kept.
            pixels: the input that the teacher was trained with.
        """
        self.bottom_up = getattr(backbone, "bottom_up", backbone).eval().requires_grad_(False)
        self.pixels = pixels
        self.available: Dict[str, FeatureSpec] = distillation_features(self.bottom_up)
        self._taps: Optional[FeatureTaps] = None
        self._convert: Optional[PixelConverter] = None

    def prepare(self, features: List[str], student_pixels: PixelFormat) -> None:
        """Chooses the features that a call returns, and what the student's images are normalised with."""
        specs = {name: self.available[name] for name in features}
        self._taps = FeatureTaps(self.bottom_up, specs, stop_after_last=True)
        self._convert = PixelConverter(student_pixels, self.pixels)

    def apply(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """As ``nn.Module._apply``: what ``.to(device)`` of the owner does to every tensor."""
        self.bottom_up._apply(fn)

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, image_sizes: Optional[Sequence[Tuple[int, int]]] = None
    ) -> Dict[str, torch.Tensor]:
        """One forward of the bottom-up, up to the last feature.

        Args:
            images: (B, C, H, W), normalised for the student.
            image_sizes: see :class:`PixelConverter`.

        Returns:
            the chosen features by name, each (B, Ct, h, w), without gradient.
        """
        assert self._taps is not None and self._convert is not None, "call prepare() first"
        # no_grad, not inference_mode, whose tensors cannot be saved for the student's backward.
        images = self._convert(images, image_sizes)
        with self._taps.reading() as features:
            self.bottom_up(images)
        return features
