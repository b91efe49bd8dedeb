"""MoCo-v2 (He et al., CVPR 2020; Chen et al., arXiv:2003.04297): unsupervised learning by contrast with a queue.

Shape shorthand in this module: B images of this rank, D dimensions of an embedding, K keys in the queue.
"""

from typing import Any, Dict, List, Sequence, Tuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.modeling.backbone import Backbone
from detectron2.utils import comm
from torch import nn

from classification.classifier import normalised
from mgd_det.errors import UserError


class MoCo(nn.Module):
    """Learns a backbone whose embedding of an image is closer to that of another view than to those of other images.

    An input is a dict with two views of an image, "image" (the query's) and "image_key". A training forward returns
    {"loss_contrast": scalar}, InfoNCE over the other view's key and the queue, and puts the new keys into the queue. In
    evaluation it returns the unit embeddings of "image", (B, D).

    ``backbone`` may be distilled (:func:`mgd_det.modeling.distilled_backbone`): the teacher then sees the queries.
    Key encoder, projection heads and queue are part of the state dict, so a resumed training is the same.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        key_backbone: Backbone,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        in_feature: str = "res5",
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
    ) -> None:
        """
        Args:
            backbone: the query's, which learns.
            key_backbone: a plain network of the same architecture; it starts as a copy, and follows as a moving
                average.
            pixel_mean: one for each colour channel, on the scale 0..255.
            pixel_std: the same.
            in_feature: feature of the backbone that is pooled and projected.
            dim: D, > 0.
            queue_size: K, a multiple of the batch size of all ranks.
            momentum: weight of the old value in the moving average, in [0, 1).
            temperature: of InfoNCE, > 0.

        Raises:
            UserError: a value is not as above.
        """
        super().__init__()
        for name, value, is_right in (
            ("dim", dim, dim > 0),
            ("queue_size", queue_size, queue_size > 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("temperature", temperature, temperature > 0),
        ):
            if not is_right:
                raise UserError(f"model.{name} is {value!r}; see MoCo for the range")
        self._in_feature, self._momentum, self._temperature = in_feature, momentum, temperature
        channels = backbone.output_shape()[in_feature].channels
        self.backbone, self.key_backbone = backbone, key_backbone
        self.head, self.key_head = _projection(channels, dim), _projection(channels, dim)
        # The state of a distilled backbone is the plain student's.
        key_backbone.load_state_dict(backbone.state_dict())
        self.key_head.load_state_dict(self.head.state_dict())
        for module in (self.key_backbone, self.key_head):
            module.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(queue_size, dim), dim=1))
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    def forward(self, inputs: List[Dict[str, Any]]) -> Any:
        """Return losses in training and embeddings in evaluation; see the class."""
        queries = self._embedded(self.backbone, self.head, normalised(inputs, self.pixel_mean, self.pixel_std))
        if not self.training:
            return queries
        views = normalised(inputs, self.pixel_mean, self.pixel_std, key="image_key")
        with torch.no_grad():
            self._follow()
            views, order = _shuffled(views)
            keys = _in_order(self._embedded(self.key_backbone, self.key_head, views), order)
        # The queue changes in place below, and backward reads what the logits were made of.
        logits = torch.cat([(queries * keys).sum(dim=1, keepdim=True), queries @ self.queue.clone().t()], dim=1)
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        loss = F.cross_entropy(logits.float() / self._temperature, labels)
        self._enqueue(keys)
        return {"loss_contrast": loss}

    def _embedded(self, backbone: nn.Module, head: nn.Module, images: torch.Tensor) -> torch.Tensor:
        return F.normalize(head(backbone(images)[self._in_feature].mean(dim=(2, 3))), dim=1)

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the key encoder's parameters a step towards the query encoder's. Its buffers are its own."""
        for own, followed in ((self.key_backbone, self.backbone), (self.key_head, self.head)):
            targets = dict(followed.named_parameters())
            for name, parameter in own.named_parameters():
                parameter.mul_(self._momentum).add_(targets[name], alpha=1 - self._momentum)

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor) -> None:
        """Replace the oldest keys of the queue by those of all ranks.

        Raises:
            UserError: the queue's size is not a multiple of theirs.
        """
        keys = _gathered(keys)
        if len(self.queue) % len(keys):
            raise UserError(
                f"model.queue_size is {len(self.queue)}, which is not a multiple of the batch size {len(keys)} "
                "(dataloader.train.total_batch_size): change one of them"
            )
        start = int(self.queue_position)
        self.queue[start : start + len(keys)] = keys
        self.queue_position.fill_((start + len(keys)) % len(self.queue))


def _projection(channels: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, dim))


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """Return (B, ...) of all ranks, in their order, without gradient."""
    if comm.get_world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(comm.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _shuffled(images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Exchange images between the ranks at random, so that batch norm does not tell a key by its neighbours.

    Returns:
        As many images as given, and the order for :func:`_in_order`. On one rank, the images themselves.
    """
    ranks, size = comm.get_world_size(), len(images)
    if ranks == 1:
        return images, torch.arange(size)
    order = torch.randperm(ranks * size, device=images.device)
    dist.broadcast(order, src=0)
    rank = comm.get_rank()
    return _gathered(images)[order[rank * size : (rank + 1) * size]], order


def _in_order(keys: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return this rank's own keys, in the order of its images."""
    if comm.get_world_size() == 1:
        return keys
    size, rank = len(keys), comm.get_rank()
    return _gathered(keys)[order.argsort()][rank * size : (rank + 1) * size]
