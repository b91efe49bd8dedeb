"""A loader's images and augmentation: functions of seed and position alone."""

import itertools
import logging
import multiprocessing
import os
import random
import signal
import time

import coco_data
import numpy as np
import pytest
import torch
import toy
from detectron2.data.samplers import TrainingSampler
from torch.utils.data import Dataset, IterableDataset

from mgd_det.data import BrokenImageError, build_resumable_train_loader, register_coco_folder
from mgd_det.engine import Trainer

NAME = "test_resumable_loader"
SAMPLERS = {
    "TrainingSampler": [],
    "RepeatFactorTrainingSampler": ["DATALOADER.REPEAT_THRESHOLD", "0.9"],
    "RandomSubsetTrainingSampler": [],  # draws its seeds from numpy's generator
}
IMAGES = [{"width": 1 + i % 3, "height": 2, "image_id": i} for i in range(10)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A registered set of 8 annotated images, three of them wider than high."""
    content = coco_data.content(9)
    for i, image in enumerate(content["images"]):
        image["height"], image["width"] = (40, 48) if i % 3 == 0 else (48, 40)
    json_file, images = coco_data.write(tmp_path_factory.mktemp("set"), content)
    register_coco_folder(NAME, json_file, images)
    yield images
    coco_data.forget(NAME)


@pytest.fixture(params=[(name, grouping) for name in SAMPLERS for grouping in (True, False)], ids=str)
def cfg(request, dataset):
    name, grouping = request.param
    return config("DATALOADER.SAMPLER_TRAIN", name, *SAMPLERS[name], "DATALOADER.ASPECT_RATIO_GROUPING", grouping)


def config(*opts, workers=0):
    opts = ["DATASETS.TRAIN", f"('{NAME}',)", "SOLVER.IMS_PER_BATCH", "2", "SEED", "6", *opts]
    cfg = toy.plain_config(opts=[*opts, "DATALOADER.NUM_WORKERS", workers])
    cfg.INPUT.MIN_SIZE_TRAIN = (24, 32, 40)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.6  # no key of every Detectron2
    cfg.INPUT.CROP.ENABLED = True  # draws of numpy's generator; flips are of it, too
    return cfg


def batches(loader, number, start=None, seed=None):
    """Ids, sizes and content of images and boxes."""
    if start is not None:
        loader.start_at(start, seed)
    return [
        [(x["image_id"], tuple(x["image"].shape), x["image"].sum().item(), str(x["instances"])) for x in batch]
        for batch in itertools.islice(loader, number)
    ]


def ids(loader, number):
    return [[x["image_id"] for x in batch] for batch in itertools.islice(loader, number)]


def drawing(entry):
    return {**entry, "draws": (random.random(), float(np.random.rand()), float(torch.rand(1)))}


def build(dataset=IMAGES, mapper=drawing, total_batch_size=2, **options):
    return build_resumable_train_loader(dataset, mapper=mapper, total_batch_size=total_batch_size, **options)


@pytest.mark.slow
def test_a_start_leaves_out_batches_and_changes_no_image(cfg):
    loader = Trainer.build_train_loader(cfg)
    whole = batches(loader, 20)
    assert len({image for batch in whole for image in batch}) > 20  # an image is augmented otherwise each time
    for start in (0, 1, 13):
        assert batches(Trainer.build_train_loader(cfg), 20 - start, start=start) == whole[start:]
        assert batches(loader, 20 - start, start=start) == whole[start:]


@pytest.mark.slow
def test_another_seed_gives_other_images_and_its_own_again(cfg):
    loader, other = (Trainer.build_train_loader(x) for x in (cfg, cfg))
    whole = batches(loader, 12)
    assert batches(other, 12, start=0, seed=7) != whole
    assert batches(other, 9, start=3, seed=6) == whole[3:]


def test_workers_change_nothing(dataset):
    whole = batches(Trainer.build_train_loader(config()), 12)
    assert batches(Trainer.build_train_loader(config(workers=2)), 12) == whole
    assert batches(Trainer.build_train_loader(config(workers=1)), 5, start=7) == whole[7:]


def test_the_process_that_iterates_draws_as_if_there_were_no_loader(dataset):
    for workers in (0, 1):
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(3)
        expected = [drawing({})["draws"] for _ in range(3)]
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(3)
        iterator = iter(Trainer.build_train_loader(config(workers=workers)))
        seen = []
        for _ in range(3):
            next(iterator)
            seen.append(drawing({})["draws"])
        assert seen == expected


def test_no_image_is_read_that_is_left_out():
    read = []
    loader = build(mapper=lambda entry: read.append(entry["image_id"]) or entry, seed=1)
    loader.start_at(5000)
    assert len(next(iter(loader))) == 2 and len(read) == 2


def test_unseeded_loaders_differ_and_take_the_seed_of_another(dataset):
    np.random.seed(0)
    first, second = (Trainer.build_train_loader(config("SEED", -1)) for _ in range(2))
    whole = batches(first, 8)
    assert first.seed != second.seed and batches(second, 8) != whole
    assert batches(second, 5, start=3, seed=first.seed) == whole[3:]


def test_ranks_without_a_seed_agree_on_one(run_ranks):
    def rank_ids(rank):
        np.random.seed(rank)
        loader = build(total_batch_size=4)
        return loader.seed, ids(loader, 12)

    (seed, first), (other_seed, second) = run_ranks(rank_ids, 2)
    assert seed == other_seed
    alone = ids(build(total_batch_size=4, seed=seed), 12)
    assert [sorted(a + b) for a, b in zip(first, second)] == [sorted(batch) for batch in alone]


def test_ranks_share_the_images_of_one_process(dataset, monkeypatch):
    cfg = config("SOLVER.IMS_PER_BATCH", "4")
    alone = batches(Trainer.build_train_loader(cfg), 10)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 2)
    monkeypatch.setattr("detectron2.utils.comm.shared_random_seed", lambda: np.random.randint(2**31))
    shares = []
    for rank in range(2):
        monkeypatch.setattr("detectron2.utils.comm.get_rank", lambda rank=rank: rank)
        shares.append(batches(Trainer.build_train_loader(cfg), 10))
    for batch, *parts in zip(alone, *shares):
        assert sorted(parts[0] + parts[1]) == sorted(batch)  # of the same images, augmented alike


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_takes_the_place_of_one_that_is_left_out(workers):
    def mapper(entry):
        return None if entry["image_id"] % 2 else drawing(entry)

    def content(batches):
        return [[(x["image_id"], x["draws"]) for x in batch] for batch in batches]

    whole = content(itertools.islice(build(mapper=mapper, seed=1), 30))
    taken = [x[0] for batch in whole for x in batch]
    assert set(taken) == {0, 2, 4, 6, 8} and len({taken.count(i) for i in set(taken)}) > 1
    loader = build(mapper=mapper, seed=1, num_workers=workers)
    loader.start_at(11)
    assert content(itertools.islice(loader, 19)) == whole[11:]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mapper_that_leaves_out_all_is_one_message(workers):
    with pytest.raises(BrokenImageError, match=r"^[^\n]* 10 images [^\n]*DATASETS.TRAIN[^\n]*$"):
        next(iter(build(mapper=lambda entry: None, num_workers=workers)))


def test_dataset_dicts_without_sizes_are_not_grouped(caplog):
    bare = [{"image_id": entry["image_id"]} for entry in IMAGES]
    with caplog.at_level(logging.INFO, "mgd_det"):
        loader = build(bare, seed=1)
    assert "not grouped by aspect ratio" in caplog.text
    assert ids(loader, 20) == ids(build(aspect_ratio_grouping=False, seed=1), 20) != ids(build(seed=1), 20)


def test_other_data_sets_and_samplers(caplog):
    class MapStyle(Dataset):
        def __len__(self):
            return len(IMAGES)

        def __getitem__(self, index):
            return IMAGES[index]

    class Stream(IterableDataset):
        def __iter__(self):
            return itertools.cycle(IMAGES)

    expected = ids(build(aspect_ratio_grouping=False, seed=1), 20)
    assert ids(build(MapStyle(), seed=1), 20) == expected
    sampler = TrainingSampler(len(IMAGES), seed=1)
    assert ids(build(sampler=sampler, aspect_ratio_grouping=False, seed=8), 20) == expected
    stream = build(Stream(), aspect_ratio_grouping=False)  # Detectron2's own loader
    assert ids(stream, 2) == [[0, 1], [2, 3]] and not hasattr(stream, "start_at")


def test_a_collate_function_and_options_of_torchs_loader():
    loader = build(collate_fn=lambda batch: len(batch), total_batch_size=3, num_workers=1, prefetch_factor=1)
    assert list(itertools.islice(loader, 2)) == [3, 3]


def test_a_signal_to_all_processes_leaves_workers_at_work():
    """As Ctrl-C in a terminal gives, or a scheduler."""

    def mapper(entry):
        if entry["image_id"] == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return entry

    in_order = TrainingSampler(len(IMAGES), shuffle=False, seed=1)
    loader = build(mapper=mapper, sampler=in_order, aspect_ratio_grouping=False, num_workers=1)
    assert ids(loader, 6) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [0, 1]]


@pytest.mark.parametrize("hangs", [False, True])
def test_workers_end_with_their_iterator(hangs):
    in_order = TrainingSampler(len(IMAGES), shuffle=False, seed=1)
    others = multiprocessing.active_children()
    iterator = iter(
        build(
            mapper=lambda entry: time.sleep(60 * hangs * (entry["image_id"] >= 2)) or entry,
            sampler=in_order,
            aspect_ratio_grouping=False,
            num_workers=1,
        )
    )
    next(iterator)
    (worker,) = [process for process in multiprocessing.active_children() if process not in others]
    start = time.monotonic()
    if hangs:
        worker.terminate()  # what torch does with a worker that does not end
    else:
        iterator.close()
    worker.join(10)
    assert worker.exitcode == 0 and time.monotonic() - start < 4
