"""Which sample comes when, known without reading an image."""

import itertools
import logging
import time
from typing import Iterator, List, Optional, Tuple

import numpy as np
from detectron2.utils import comm
from torch.utils.data import Sampler

from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

Sample = Tuple[int, int]
"""Position of a sample in the endless stream of all ranks, and index of its image in the data set."""


class SampleOrder:
    """The batches of this rank, each a list of (position, index).

    A position is the place of a sample in the endless stream of all ranks. Batch k of all ranks together holds the next
    ``total_batch_size`` samples of that stream, of which each rank takes every world-size-th: the union does not depend
    on the number of ranks.

    With ``is_wide`` a batch of all ranks holds images that are all wider than high, or none of them: Detectron2's
    aspect-ratio grouping as its loader has it on one rank, but of the sizes in the data set, before augmentation.

    It is a batch sampler for :class:`torch.utils.data.DataLoader`.
    """

    def __init__(
        self, sampler: Sampler, total_batch_size: int, is_wide: Optional[np.ndarray] = None, start: int = 0
    ) -> None:
        """
        Args:
            sampler: gives indices without end, the same at every start: one of Detectron2's training samplers.
                Another has to give this rank's indices alone; batches are then made of these.
            total_batch_size: images of a batch of all ranks; a multiple of their number.
            is_wide: (images,) bool; None for batches in the order of the stream.
            start: batches that are left out.

        Raises UserError for a batch that the ranks cannot share.
        """
        self._rank, self._world_size = comm.get_rank(), comm.get_world_size()
        if total_batch_size <= 0 or total_batch_size % self._world_size:
            raise UserError(
                f"SOLVER.IMS_PER_BATCH (dataloader.train.total_batch_size) is {total_batch_size}: give a multiple of "
                f"the number of processes, {self._world_size}"
            )
        self._sampler, self._total, self._is_wide, self._start = sampler, total_batch_size, is_wide, start

    def __iter__(self) -> Iterator[List[Sample]]:
        began = time.perf_counter()
        batches = self._batches()
        next(itertools.islice(batches, self._start, self._start), None)
        seconds = time.perf_counter() - began
        if seconds > 3:
            logger.info(f"Passed over {self._start} batches of the order of images in {seconds:.1f} s")
        return batches

    def _batches(self) -> Iterator[List[Sample]]:
        if hasattr(self._sampler, "_infinite_indices"):
            # All ranks' indices, of which Detectron2's samplers take their rank's in __iter__.
            stream = enumerate(self._sampler._infinite_indices())
            for batch in self._grouped(stream, self._total):
                yield batch[self._rank :: self._world_size]
        else:
            positions = itertools.count(self._rank, self._world_size)
            yield from self._grouped(zip(positions, self._sampler), self._total // self._world_size)

    def _grouped(self, stream: Iterator[Sample], size: int) -> Iterator[List[Sample]]:
        if self._is_wide is None:
            while True:
                batch = list(itertools.islice(stream, size))
                if len(batch) < size:
                    return
                yield batch
        is_wide = self._is_wide.tolist()
        groups: Tuple[List[Sample], List[Sample]] = ([], [])
        for sample in stream:
            group = groups[is_wide[sample[1]]]
            group.append(sample)
            if len(group) == size:
                yield group[:]
                group.clear()
