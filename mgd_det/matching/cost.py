"""The cost matrix of the channel matching."""

from contextlib import contextmanager
from typing import Any, Iterator, List

import torch


class ChannelCost:
    """Mean squared distance between every student channel and every teacher channel, over many images.

    With s_i and t_j a channel's map flattened over H * W and L2-normalised per image,
    ``D[i, j] = mean over images of |s_i - t_j|^2 = 2 - 2 <s_i, t_j>`` (MGD, section 3.1). It lies in
    [0, 4]; a channel that is zero on an image is at distance 2 from all others on that image.

    Shape shorthand: B images, Cs student channels, Ct teacher channels, a map of H x W.

    Attributes:
        sums: (Cs * Ct + 1,) float64 on the features' device: the sums of the similarities <s_i, t_j>, and the number
            of images. Add the sums of several ranks or runs to get the cost over all their images.

    Example:
        >>> cost = ChannelCost(student_channels=1, teacher_channels=2)
        >>> student = torch.tensor([1.0, 0, 2, 0]).view(1, 1, 2, 2)
        >>> teacher = torch.cat([3 * student, -student], dim=1)
        >>> cost.update(student, teacher)
        >>> cost.mean().round(decimals=3)
        tensor([[0., 4.]], dtype=torch.float64)
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        self.shape = (student_channels, teacher_channels)
        self.sums = torch.zeros(student_channels * teacher_channels + 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, student: torch.Tensor, teacher: torch.Tensor, *, only_finite: bool = False) -> None:
        """Add a batch of features, (B, Cs, H, W) and (B, Ct, H, W), on any one device.

        The host does not wait for the device: nothing is read back from it.

        Args:
            only_finite: leave out a batch with a value that is not finite. By default it makes the cost not finite.

        Raises:
            ValueError: the features do not have this cost's channels, or differ in images or size.
        """
        self._check(student, teacher)
        students, teachers = student.flatten(2), teacher.flatten(2)
        student_norms, teacher_norms = _norms(students), _norms(teachers)
        by_student, by_teacher = _inverse(student_norms), _inverse(teacher_norms)
        # Autocast would run the product in half precision, where costs of like channels tie.
        with torch.autocast(student.device.type, enabled=False), _exact_float32_products():
            if students.shape[2] < self.shape[0]:
                # The maps are smaller than a product: they are scaled, for one product over all images.
                similarity = _side_by_side(students, by_student) @ _side_by_side(teachers, by_teacher).T
            else:
                similarity = torch.zeros(self.shape, device=student.device)
                for s, t, s_scale, t_scale in zip(students, teachers, by_student, by_teacher):
                    product = (s.float() @ t.float().T).mul_(s_scale.unsqueeze(1))
                    similarity.addcmul_(product, t_scale)
        images = torch.full((), student.shape[0], dtype=torch.float64, device=student.device)
        if only_finite:
            # The norms show whether it is, and are far fewer than the similarities.
            is_bad = ~(student_norms.sum() + teacher_norms.sum()).isfinite()
            for added in (similarity, images):
                added.masked_fill_(is_bad, 0.0)
        self.sums = self.sums.to(student.device)
        self.sums[:-1].add_(similarity.flatten())
        self.sums[-1].add_(images)

    def _check(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        if student.dim() != 4 or teacher.dim() != 4:
            raise ValueError(f"features must be (B, C, H, W), got {student.shape} and {teacher.shape}")
        if (student.shape[1], teacher.shape[1]) != self.shape:
            raise ValueError(
                f"features have {student.shape[1]} and {teacher.shape[1]} channels, "
                f"but this cost was made for {self.shape[0]} and {self.shape[1]}"
            )
        if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
            raise ValueError(
                f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} "
                "must have the same images and map size"
            )

    @property
    def num_images(self) -> int:
        """Number of images measured."""
        return int(self.sums[-1].item())

    def mean(self) -> torch.Tensor:
        """Return the cost D, (Cs, Ct) float64 on the CPU.

        Raises:
            ValueError: no image was measured.
        """
        sums = self.sums.cpu()
        if sums[-1] == 0:
            raise ValueError("no image was measured: call update() first")
        return 2 - 2 * (sums[:-1] / sums[-1]).view(self.shape)


def _norms(maps: torch.Tensor) -> torch.Tensor:
    """Return the L2 norms of (B, C, N), as (B, C) float32."""
    return torch.linalg.vector_norm(maps, dim=2, dtype=torch.promote_types(maps.dtype, torch.float32)).float()


def _inverse(norms: torch.Tensor) -> torch.Tensor:
    """Return 1 / norm, and 0 for a map that is zero."""
    return torch.where(norms > 0, 1 / norms, 0.0)


def _side_by_side(maps: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return (C, B * N), the maps (B, C, N) of all images side by side, each times its scale of (B, C)."""
    return (maps.float() * scales.unsqueeze(2)).transpose(0, 1).flatten(1)


@contextmanager
def _exact_float32_products() -> Iterator[None]:
    """Compute matrix products with all bits of float32, also where the user allows TF32 or bfloat16."""
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9
        mkldnn: Any = torch.backends.mkldnn
        backends: List[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
        allowed = {backend: backend.fp32_precision for backend in backends if backend.fp32_precision != "ieee"}
        try:
            for backend in allowed:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in allowed.items():
                # A backend without a setting of its own shows the one of all, and must follow it again.
                backend.fp32_precision = "none"
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision
    else:
        precision = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
