"""Which channels of a layer a narrower one keeps, and what the layers that read them get for the rest.

Shape shorthand in this module: C channels of which K are kept; O outputs and P positions (kernel places, or pixels of a
flattened map) of a layer that reads them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from mgd_det.errors import ArgumentError, check_choice

# How channels are chosen; see MODEL.MGD.INHERIT_CHANNELS.CRITERION.
CRITERIA = ("energy", "weight", "energy_weight", "reconstruction", "random")

# A channel with less than this part of the largest energy is zero except for rounding.
_TINY = 1e-10


@dataclass(frozen=True)
class Consumer:
    """A layer that reads the channels.

    Attributes:
        weight: (O, C, P).
        moment: (C, C), mean of x x^T over the pixels x of its input, or None if it was not measured.
    """

    weight: Tensor
    moment: Optional[Tensor] = None

    @cached_property
    def gram(self) -> Tensor:
        """(C, C) float64, the sum over outputs and positions of the products of two channels' weights."""
        weight = self.weight.double()
        return torch.einsum("ocp,odp->cd", weight, weight)


def select_channels(
    consumers: Sequence[Consumer], count: int, criterion: str = "reconstruction", *, blocks: int = 1, seed: int = 0
) -> Tensor:
    """Choose the channels to keep.

    Every consumer counts as much as any other: its scores are divided by their sum.

    - "energy": the channel's mean square in the consumers' inputs.
    - "weight": the squared L2 norm of the consumers' weights that read it.
    - "energy_weight": the product of both, which is the mean square of what it adds to the consumers' outputs.
    - "reconstruction": one after the other, the channel that lowers the squared error of the consumers' outputs most if
      dropped channels are replaced by their best linear combination of the kept ones (:func:`fold_dropped`). Greedy
      selection as in ThiNet (Luo et al., ICCV 2017, section 3.2), with the least squares of He et al. (ICCV 2017,
      section 3.1) in every step. Of channels that are alike it keeps one.
    - "random": to compare with.

    Args:
        consumers: the layers that read the channels, one or more. If no moment was measured, the criteria that need one
            fall back on "weight".
        count: channels to keep, K.
        criterion: of :data:`CRITERIA`.
        blocks: keep equally many of each of so many blocks of neighbouring channels, the groups of a group norm.
        seed: of "random".

    Returns:
        (K,) long on the CPU, ascending.

    Raises:
        ArgumentError: an unknown criterion, or numbers that do not divide.

    Example:
        >>> select_channels([Consumer(torch.tensor([[[1.0], [3.0], [2.0]]]))], 2, "weight")
        tensor([1, 2])
    """
    check_choice("criterion", criterion, CRITERIA)
    channels = consumers[0].weight.shape[1]
    if not 0 < count <= channels or channels % blocks or count % blocks:
        raise ArgumentError("count", f"is {count} of {channels} channels in {blocks} blocks; give a multiple of blocks")
    if criterion == "random":
        scores = torch.rand(channels, generator=torch.Generator().manual_seed(seed))
        return _highest(scores, count, blocks)
    measured = [consumer for consumer in consumers if consumer.moment is not None]
    if criterion == "weight" or not measured:
        return _highest(_total([consumer.gram.diagonal() for consumer in consumers]), count, blocks)
    if criterion == "energy":
        return _highest(_total([_moment(consumer).diagonal() for consumer in measured]), count, blocks)
    contributions = _total([_moment(c).diagonal() * c.gram.diagonal() for c in measured])
    if criterion == "energy_weight":
        return _highest(contributions, count, blocks)
    return _greedy(measured, count, blocks, contributions)


def fold_dropped(weight: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """Return a consumer's weights of the kept channels, with those of the dropped ones folded in by least squares.

    The dropped channels are replaced by the linear combination of the kept ones that is closest to them on the measured
    inputs, without a constant. It is exact where they are one, and commutes with zero padding.

    Args:
        weight: (O, C, P).
        moment: (C, C), see :class:`Consumer`.
        kept: (K,) long.

    Returns:
        (O, K, P), of the dtype of ``weight``.
    """
    return torch.einsum("ocp,ck->okp", weight.double(), _from_kept(moment.double(), kept)).to(weight)


def relative_error(consumers: Sequence[Consumer], kept: Tensor, compensate: bool) -> Optional[float]:
    """Return the squared error of the consumers' outputs over their mean square, on the measured inputs.

    Args:
        consumers: the layers that read the channels.
        kept: (K,) long.
        compensate: the dropped channels are folded in (:func:`fold_dropped`), not just left out.

    Returns:
        The mean over the consumers, or None if none was measured.
    """
    errors = []
    for consumer in consumers:
        if consumer.moment is None:
            continue
        moment, gram = _moment(consumer), consumer.gram
        lost = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
        if compensate:
            lost[:, kept] -= _from_kept(moment, kept)
        else:
            lost[kept, kept] = 0
        whole = (gram * moment).sum()
        errors.append(float((gram * (lost @ moment @ lost.T)).sum().clamp(min=0) / whole) if whole > 0 else 0.0)
    return sum(errors) / len(errors) if errors else None


def _moment(consumer: Consumer) -> Tensor:
    assert consumer.moment is not None
    return consumer.moment.double()


def _from_kept(moment: Tensor, kept: Tensor) -> Tensor:
    """Return (C, K): every channel as a combination of the kept ones."""
    kept = kept.to(moment.device)
    inverse = torch.linalg.pinv(moment[kept][:, kept], rtol=_TINY, hermitian=True)
    combination = moment[:, kept] @ inverse
    combination[kept] = torch.eye(len(kept), dtype=moment.dtype, device=moment.device)
    return combination


def _total(scores: List[Tensor]) -> Tensor:
    """Return the sum of the scores' shares, (C,) on the CPU."""
    shares = [score / score.sum().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
    return torch.stack(shares).sum(dim=0).cpu()


def _highest(scores: Tensor, count: int, blocks: int) -> Tensor:
    size = len(scores) // blocks
    order = scores.view(blocks, size).argsort(dim=1, descending=True, stable=True)[:, : count // blocks]
    return (order + size * torch.arange(blocks).unsqueeze(1)).flatten().sort().values


def _greedy(consumers: Sequence[Consumer], count: int, blocks: int, contributions: Tensor) -> Tensor:
    """Choose as "reconstruction" does; where nothing is left to explain, by ``contributions``."""
    residuals = [_Residual(_moment(consumer), consumer.gram) for consumer in consumers]
    size = len(contributions) // blocks
    left = torch.full((blocks,), count // blocks)
    is_open = torch.ones(len(contributions), dtype=torch.bool)
    chosen = []
    for _ in range(count):
        gains = torch.stack([residual.gains() for residual in residuals]).sum(dim=0).cpu().where(is_open, 0)
        scores = gains if gains.max() > _TINY else contributions
        best = int(scores.masked_fill(~is_open, -torch.inf).argmax())
        chosen.append(best)
        for residual in residuals:
            residual.remove(best)
        block = best // size
        left[block] -= 1
        is_open[best] = False
        if left[block] == 0:
            is_open[block * size : (block + 1) * size] = False
    return torch.tensor(sorted(chosen))


class _Residual:
    """What the chosen channels do not explain of one consumer's input: R = G - G_s G_ss^-1 G_s^T."""

    def __init__(self, moment: Tensor, gram: Tensor) -> None:
        self._rest, self._gram = moment.clone(), gram
        self._whole = (gram * moment).sum().clamp(min=torch.finfo(moment.dtype).tiny)
        self._floor = _TINY * moment.diagonal().max()
        # Diagonal of R A R, kept up to date because a product of matrices in each step would take long.
        self._products = (moment @ gram * moment).sum(dim=1)

    def gains(self) -> Tensor:
        """Return (C,): by which part of the output's mean square each channel would lower the error."""
        energy = self._rest.diagonal()
        gains = self._products.clamp(min=0) / energy.clamp(min=self._floor) / self._whole
        return gains.where(energy > self._floor, torch.zeros_like(gains))

    def remove(self, channel: int) -> None:
        """Take out what a channel explains."""
        column = self._rest[:, channel].clone()
        energy = column[channel]
        if energy <= self._floor:
            return
        read = self._gram @ column
        self._products -= 2 * column * (self._rest @ read) / energy
        self._products += column.square() * (column @ read) / energy.square()
        self._rest -= torch.outer(column, column) / energy
