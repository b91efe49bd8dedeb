"""The order of training samples, computed without reading an image."""

import itertools
import logging
import time
from typing import Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Sampler

from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

Sample = Tuple[int, int]
"""Position of a sample in the endless stream of all ranks, and index of its image in the data set."""


class SampleOrder:
    """The batches of this rank, each a list of (position, index).

    Batch k of all ranks together holds the next ``total_batch_size`` samples of the endless stream of all ranks. Each
    rank takes every world-size-th of them, so that the union does not depend on the number of ranks.

    With ``is_wide``, either all images of a batch of all ranks are wider than high, or none is. This is Detectron2's
    aspect-ratio grouping as its loader does it on one rank, but by the sizes before augmentation.

    Use it as the batch sampler of a :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self,
        sampler: Sampler,
        total_batch_size: int,
        is_wide: Optional[np.ndarray] = None,
        start: int = 0,
        earlier: Sequence[Tuple[int, int]] = (),
    ) -> None:
        """
        Args:
            sampler: an endless iterable of indices, the same at every start: one of Detectron2's training samplers.
                Any other must yield the indices of this rank only.
            total_batch_size: images of a batch of all ranks; a multiple of their number.
            is_wide: (images,) bool; None for batches in the order of the stream.
            start: number of batches of this size to skip.
            earlier: (number, size) of batches of other sizes that were taken before those, in their order. The stream
                continues after their samples.

        Raises:
            UserError: the ranks cannot share a batch of this size.
        """
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % self._world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH (dataloader.train.total_batch_size) is {total_batch_size}: give a multiple of "
                f"the number of processes, {self._world_size}"
            )
        self._sampler, self._total, self._is_wide = sampler, total_batch_size, is_wide
        self._start, self._earlier = start, list(earlier)

    def __iter__(self) -> Iterator[List[Sample]]:
        began = time.perf_counter()
        batches = self._batches()
        skipped = self._start + sum(number for number, _ in self._earlier)
        next(itertools.islice(batches, skipped, skipped), None)
        seconds = time.perf_counter() - began
        if seconds > 3:
            logger.info(f"Skipped the first {skipped} batches of the order of images in {seconds:.1f} s")
        return batches

    def _batches(self) -> Iterator[List[Sample]]:
        if hasattr(self._sampler, "_infinite_indices"):
            # The indices of all ranks; __iter__ of Detectron2's samplers yields those of one rank.
            stream = enumerate(self._sampler._infinite_indices())
            for batch in self._grouped(stream, self._sizes()):
                yield batch[self._rank :: self._world_size]
        else:
            positions = itertools.count(self._rank, self._world_size)
            sizes = (size // self._world_size for size in self._sizes())
            yield from self._grouped(zip(positions, self._sampler), sizes)

    def _sizes(self) -> Iterator[int]:
        for number, size in self._earlier:
            yield from itertools.repeat(size, number)
        yield from itertools.repeat(self._total)

    def _grouped(self, stream: Iterator[Sample], sizes: Iterable[int]) -> Iterator[List[Sample]]:
        is_wide = None if self._is_wide is None else self._is_wide.tolist()
        groups: Tuple[List[Sample], List[Sample]] = ([], [])
        for size in sizes:
            group = max(groups, key=len)  # after a larger size, it may hold enough samples already
            while len(group) < size:
                sample = next(stream, None)
                if sample is None:
                    return
                group = groups[0 if is_wide is None else is_wide[sample[1]]]
                group.append(sample)
            yield group[:size]
            del group[:size]
