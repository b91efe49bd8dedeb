"""The cost matrix of the channel matching."""

import torch
import torch.distributed as dist
import torch.nn.functional as F


class ChannelCost:
    """Mean distance between every student channel and every teacher channel, over many images.

    With s_i and t_j a channel's map flattened over H * W and L2-normalised per image,
    ``D[i, j] = mean over images of |s_i - t_j|^2 = 2 - 2 <s_i, t_j>`` (MGD, section 3.1). It lies in
    [0, 4]; a channel that is zero on an image is at distance 2 from all others on that image.

    Shape shorthand: B images, Cs student channels, Ct teacher channels, a map of H x W.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        self.shape = (student_channels, teacher_channels)
        self._similarity = torch.zeros(self.shape, dtype=torch.float64)
        self._images = 0

    @torch.no_grad()
    def update(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Adds a batch of features, (B, Cs, H, W) and (B, Ct, H, W), on any one device.

        Nothing is read back from the device, so that the host need not wait for it.
        """
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
        # Autocast would run the product in half precision, where costs of like channels tie.
        with torch.autocast(student.device.type, enabled=False):
            s = F.normalize(student.flatten(2).float(), dim=2)
            t = F.normalize(teacher.flatten(2).float(), dim=2)
            similarity = torch.bmm(s, t.transpose(1, 2)).sum(dim=0, dtype=torch.float64)
        self._similarity = self._similarity.to(similarity.device) + similarity
        self._images += student.shape[0]

    def all_reduce(self) -> None:
        """Sums over all ranks of the default process group, so that every rank's images count."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        images = torch.tensor([self._images], dtype=torch.float64, device=self._similarity.device)
        packed = torch.cat([self._similarity.flatten(), images])
        dist.all_reduce(packed)
        self._similarity = packed[:-1].view(self.shape)
        self._images = int(packed[-1].item())

    @property
    def num_images(self) -> int:
        """Images seen; after :meth:`all_reduce`, by all ranks together."""
        return self._images

    def mean(self) -> torch.Tensor:
        """The cost D, (Cs, Ct) float64 on the CPU. Raises ValueError before the first update."""
        if self._images == 0:
            raise ValueError("no image was measured: call update() first")
        return 2 - 2 * (self._similarity.cpu() / self._images)
