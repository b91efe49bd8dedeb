"""A training loader that can start at any batch: images and augmentation are functions of seed and position."""

import logging
import multiprocessing
import os
import signal
import threading
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Protocol, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from detectron2.utils.serialize import PicklableWrapper
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from mgd_det.data.mapper import BrokenImageError
from mgd_det.data.sample_order import Sample, SampleOrder
from mgd_det.seeding import Purpose, seeded

logger = logging.getLogger(__name__)

MakeSampler = Callable[["MapStyleDataset", int], Sampler]


class MapStyleDataset(Protocol):
    """A data set with a length and entries by index, such as torch's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def _from_config(
    cfg: CfgNode,
    mapper: Any = None,
    *,
    dataset: Any = None,
    sampler: Union[Sampler, MakeSampler, None] = None,
    seed: Optional[int] = None,
) -> Dict[str, Any]:
    from_config = build_detection_train_loader.from_config

    def make_sampler(dataset: MapStyleDataset, seed: int) -> Sampler:
        with_seed = cfg.clone()
        with_seed.defrost()
        with_seed.SEED = seed
        return from_config(with_seed, mapper=arguments["mapper"], dataset=dataset)["sampler"]

    arguments = from_config(cfg, mapper=mapper, dataset=dataset, sampler=sampler or make_sampler)
    arguments["seed"] = cfg.SEED if seed is None and cfg.SEED >= 0 else seed
    return arguments


@configurable(from_config=_from_config)
def build_resumable_train_loader(
    dataset: Union[List[Dict[str, Any]], MapStyleDataset],
    *,
    mapper: Callable[[Dict[str, Any]], Any],
    sampler: Union[Sampler, MakeSampler, None] = None,
    total_batch_size: int,
    aspect_ratio_grouping: bool = True,
    num_workers: int = 0,
    collate_fn: Optional[Callable[[List[Any]], Any]] = None,
    seed: Optional[int] = None,
    **loader_options: Any,
) -> Iterable[Any]:
    """Build a loader as Detectron2's :func:`build_detection_train_loader` does, but one that can start at any batch.

    It can also be called with a cfg: ``build_resumable_train_loader(cfg)``.

    Args:
        dataset: dataset dicts, or a map-style data set. For an iterable one, Detectron2's own loader is built, which
            cannot resume.
        mapper: turns a dataset dict into the model's input, or into None to leave the image out; another image then
            takes its place.
        sampler: one of Detectron2's training samplers (a TrainingSampler by default, or the one that a cfg names), or
            a function that builds one from the data set and a seed.
        total_batch_size: images of a batch, over all ranks; a multiple of their number.
        aspect_ratio_grouping: keep images that are wider than high in batches of their own. Needs "width" and "height"
            in the dataset dicts; without them, batches follow the sampler.
        num_workers: processes that read images. The images do not depend on it.
        collate_fn: turns the list of mapped images into a batch; by default that list is the batch.
        seed: >= 0, of order and augmentation, equal on all ranks. None for the cfg's SEED or, without one, a seed from
            numpy's global generator.
        loader_options: further arguments of torch's DataLoader, such as ``prefetch_factor``.

    Returns:
        A :class:`ResumableLoader`.
    """
    if isinstance(dataset, IterableDataset):
        return build_detection_train_loader(
            dataset,
            mapper=mapper,
            total_batch_size=total_batch_size,
            aspect_ratio_grouping=aspect_ratio_grouping,
            num_workers=num_workers,
            collate_fn=collate_fn,
            **loader_options,
        )
    is_wide = _is_wide(dataset) if aspect_ratio_grouping else None
    if isinstance(dataset, list):
        dataset = DatasetFromList(dataset, copy=False)
    return ResumableLoader(
        dataset,
        mapper,
        sampler,
        total_batch_size,
        is_wide=is_wide,
        seed=comm.shared_random_seed() if seed is None else seed,
        num_workers=num_workers,
        collate_fn=collate_fn or trivial_batch_collator,
        **loader_options,
    )


class ResumableLoader:
    """An endless iterable of batches; :meth:`start_at` sets the first.

    The image at a position of the stream (:class:`SampleOrder`) is a function of seed and position. So are the random
    numbers that its mapper draws from Python's, numpy's and torch's global generators, for any number of workers and,
    with a sampler of Detectron2, of ranks. The state of these generators in the iterating process does not change.

    Attributes:
        seed: of order and augmentation.
        total_batch_size: images of a batch, over all ranks.
    """

    def __init__(
        self,
        dataset: MapStyleDataset,
        mapper: Callable[[Dict[str, Any]], Any],
        sampler: Union[Sampler, MakeSampler, None],
        total_batch_size: int,
        *,
        seed: int,
        is_wide: Optional[np.ndarray] = None,
        **loader_options: Any,
    ) -> None:
        """
        Args:
            is_wide: (images,) bool, whether each image is wider than high, to group them; None for no groups.
            loader_options: of torch's DataLoader.

        The other arguments are those of :func:`build_resumable_train_loader`.
        """
        self._dataset, self._mapper = dataset, mapper
        self.total_batch_size, self._is_wide = total_batch_size, is_wide
        self._loader_options = loader_options
        if sampler is None:
            self._make_sampler: MakeSampler = lambda dataset, seed: TrainingSampler(len(dataset), seed=seed)
        elif isinstance(sampler, Sampler):
            self._make_sampler = lambda dataset, seed: sampler
        else:
            self._make_sampler = sampler
        self.seed = -1
        self.start_at(0, seed)

    def start_at(self, batch: int, seed: Optional[int] = None, earlier: Sequence[Tuple[int, int]] = ()) -> None:
        """Set the batch at which iterators begin. Iterators that have already yielded a batch are not affected.

        Collective if ``seed`` changes.

        Args:
            batch: number of batches to skip; their images are not read.
            seed: for another order and augmentation; None to keep the present ones.
            earlier: (number, size) of the batches of other sizes that a training took before, in their order;
                ``batch`` counts from there.

        Raises:
            UserError: the ranks cannot share a batch of this size.
        """
        if seed is not None and seed != self.seed:
            self.seed = seed
            # Some of Detectron2's samplers draw their seed, or the images they keep, from numpy's generator.
            with seeded(Purpose.ORDER, seed):
                self._sampler = self._make_sampler(self._dataset, seed)
        self._order = SampleOrder(self._sampler, self.total_batch_size, self._is_wide, batch, earlier)

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            _SeededSamples(self._dataset, self._mapper, self.seed),
            batch_sampler=self._order,
            worker_init_fn=_prepare_worker,
            generator=torch.Generator().manual_seed(self.seed),  # otherwise it draws from the global one
            **self._loader_options,
        )
        iterator = iter(loader)
        try:
            yield from iterator
        finally:
            # After an error, torch leaves this to the garbage collector, and waits seconds for each worker.
            if hasattr(iterator, "_shutdown_workers"):
                iterator._shutdown_workers()


class _SeededSamples(Dataset):
    """Mapped images by (position, index); random draws are functions of seed and position."""

    def __init__(self, dataset: MapStyleDataset, mapper: Callable[[Dict[str, Any]], Any], seed: int) -> None:
        self._dataset, self._seed = dataset, seed
        self._mapper = PicklableWrapper(mapper)  # for processes that are not forked

    def __getitem__(self, sample: Sample) -> Any:
        position, index = sample
        with seeded(Purpose.SAMPLE, self._seed, position):
            mapped = self._mapper(self._dataset[index])
            return mapped if mapped is not None else self._another(index)

    def _another(self, index: int) -> Any:
        """Return an image in place of one that the mapper leaves out."""
        for other in np.random.permutation(len(self._dataset)).tolist():
            mapped = self._mapper(self._dataset[other]) if other != index else None
            if mapped is not None:
                return mapped
        raise BrokenImageError(
            f"none of the {len(self._dataset)} images of the training set can be used: the mapper left all of them "
            "out. Check DATASETS.TRAIN and the mapper."
        )


def _is_wide(dataset: Union[List[Dict[str, Any]], MapStyleDataset]) -> Optional[np.ndarray]:
    if isinstance(dataset, list) and all("width" in entry and "height" in entry for entry in dataset):
        return np.array([entry["width"] > entry["height"] for entry in dataset])
    logger.info(
        "The data set has no width and height of its images: batches are not grouped by aspect ratio "
        "(DATALOADER.ASPECT_RATIO_GROUPING)"
    )
    return None


def _prepare_worker(worker_id: int) -> None:
    """Keep a worker alive while the training process finishes the step in which a signal to all processes arrived.

    Ctrl-C in a terminal and many schedulers signal all processes. A worker ends with its parent, or when told to.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM ends a worker
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_at_the_parents_sigterm, daemon=True).start()


def _end_at_the_parents_sigterm() -> None:
    # torch sends SIGTERM to a worker that hangs.
    parent = multiprocessing.parent_process()  # not os.getppid(): a worker may be a fork server's child
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != (os.getppid() if parent is None else parent.pid):
        pass
    os._exit(0)
