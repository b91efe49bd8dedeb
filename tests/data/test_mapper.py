"""Broken images met in training and evaluation."""

import logging
import multiprocessing

import coco_data
import numpy as np
import pytest
import torch
import toy
from detectron2.data import DatasetCatalog, DatasetMapper
from PIL import Image

from mgd_det.data import BrokenImageError, CheckedMapper, register_coco_folder
from mgd_det.data import mapper as mapper_module
from mgd_det.data.mapper import SkippedImages, skipped_list
from mgd_det.engine import Trainer
from mgd_det.errors import UserError

NAME = "test_mapper"


@pytest.fixture
def dataset(tmp_path):
    """A registered set of 6 images; returns their folder."""
    _, images = coco_data.write(tmp_path / "set", coco_data.content())
    register_coco_folder(NAME, tmp_path / "set" / "instances.json", images)
    yield images
    coco_data.forget(NAME)


def config(tmp_path, *opts):
    cfg = toy.plain_config(opts=["DATASETS.TRAIN", f"('{NAME}',)", "DATASETS.TEST", f"('{NAME}',)", *opts])
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.SOLVER.IMS_PER_BATCH = 2
    return cfg


def skipping(tmp_path, *opts):
    return config(tmp_path, "DATASETS.BROKEN_INPUT", "skip", *opts)


def skips(caplog):
    return [record.getMessage() for record in caplog.records if record.name == mapper_module.__name__]


def test_sound_images_are_mapped_as_by_detectron2(dataset, tmp_path):
    cfg = config(tmp_path, "INPUT.RANDOM_FLIP", "none")
    for is_train in (True, False):
        for record in DatasetCatalog.get(NAME):
            ours, theirs = CheckedMapper(cfg, is_train)(record), DatasetMapper(cfg, is_train)(record)
            assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
            assert ("instances" in ours) == is_train


def test_refused(dataset, tmp_path):
    coco_data.truncate(dataset / "2.png")
    mapper, records = CheckedMapper(config(tmp_path), True), DatasetCatalog.get(NAME)
    assert mapper(records[0])["image_id"] == 1
    with pytest.raises(BrokenImageError, match="/2.png' cannot be read .OSError: .*truncated.*check_dataset.py.*skip"):
        mapper(records[1])


def test_another_size_than_the_json_says(dataset, tmp_path):
    records = DatasetCatalog.get(NAME)
    records[1]["width"] = 65
    with pytest.raises(BrokenImageError, match="/2.png' has 64 x 48 .* the json says 65 x 48"):
        CheckedMapper(config(tmp_path), True)(records[1])


def test_deep_images_are_broken(dataset, tmp_path):
    """Pillow would make every pixel above 255 white."""
    Image.fromarray(np.full(coco_data.SIZE, 4080, np.uint16)).save(dataset / "2.png")
    record = DatasetCatalog.get(NAME)[1]
    for is_train in (True, False):
        with pytest.raises(BrokenImageError, match="/2.png' has PIL mode 'I;16'"):
            CheckedMapper(config(tmp_path), is_train)(record)
    assert CheckedMapper(skipping(tmp_path), True)(record) is None


def test_other_errors_are_not_taken_for_broken_images(dataset, tmp_path, monkeypatch):
    def fails(self, image):
        raise ZeroDivisionError("a bug")

    mapper = CheckedMapper(skipping(tmp_path), True)
    monkeypatch.setattr(type(mapper.augmentations), "__call__", fails)
    with pytest.raises(ZeroDivisionError):
        mapper(DatasetCatalog.get(NAME)[0])


def test_skipped_and_logged_once(dataset, tmp_path, caplog):
    coco_data.truncate(dataset / "2.png")
    (dataset / "4.png").unlink()
    cfg, records = skipping(tmp_path), DatasetCatalog.get(NAME)
    with caplog.at_level(logging.WARNING, "mgd_det"):
        for _ in range(2):
            mapper = CheckedMapper(cfg, True)  # another loader or worker has one of its own
            for _ in range(3):
                mapped = [mapper(record) for record in records]
                assert [None if m is None else m["image_id"] for m in mapped] == [1, None, 3, None, 5, 6]
    messages = skips(caplog)
    assert len(messages) == 2
    assert "2.png" in messages[0] and "so far: 1" in messages[0]
    assert "4.png" in messages[1] and "FileNotFoundError" in messages[1] and "so far: 2" in messages[1]
    assert SkippedImages(skipped_list(cfg)).read() == [str(dataset / "2.png"), str(dataset / "4.png")]


def test_without_a_config(dataset, caplog):
    coco_data.truncate(dataset / "2.png")
    mapper = CheckedMapper(True, augmentations=[], image_format="BGR", broken_input="skip")
    with caplog.at_level(logging.WARNING, "mgd_det"):
        assert [mapper(record) is None for record in DatasetCatalog.get(NAME) * 2] == [False, True, *[False] * 4] * 2
    assert len(skips(caplog)) == 1


def test_evaluation_skips_nothing(dataset, tmp_path):
    coco_data.truncate(dataset / "2.png")
    with pytest.raises(BrokenImageError, match="2.png"):
        CheckedMapper(skipping(tmp_path), False)(DatasetCatalog.get(NAME)[1])


def test_a_disk_that_is_gone(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(mapper_module, "_IN_A_ROW", 4)
    mapper, records = CheckedMapper(skipping(tmp_path), True), DatasetCatalog.get(NAME)
    for i in (1, 2, 3):
        (dataset / f"{i}.png").unlink()
    order = [records[i] for i in (0, 1, 2, 3, 0, 1, 2, 0)]
    assert [mapper(record) is None for record in order[:-1]] == [True, True, True, False, True, True, True]
    with pytest.raises(BrokenImageError, match="4 images in a row .*check their disk"):
        mapper(order[-1])


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_take_another_image(dataset, tmp_path, workers):
    coco_data.truncate(dataset / "2.png")
    cfg = skipping(tmp_path)
    cfg.DATALOADER.NUM_WORKERS = workers
    loader = iter(Trainer.build_train_loader(cfg))
    seen = {entry["image_id"] for _ in range(12) for entry in next(loader)}
    assert seen == {1, 3, 4, 5, 6}
    assert SkippedImages(skipped_list(cfg)).read() == [str(dataset / "2.png")]


@pytest.mark.parametrize(
    "workers, build", [(1, Trainer.build_train_loader), (0, lambda cfg: Trainer.build_test_loader(cfg, NAME))]
)
def test_the_error_of_a_loader_is_one_message(dataset, tmp_path, workers, build):
    coco_data.truncate(dataset / "2.png")
    cfg = config(tmp_path)
    cfg.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(UserError) as error:
        for _, _ in zip(range(12), build(cfg)):
            pass
    assert type(error.value) is BrokenImageError
    message = str(error.value)
    assert message.startswith(f"'{dataset}/2.png' cannot be read") and message.endswith("without them.")
    assert "Traceback" not in message and "DataLoader" not in message and "\n" not in message


def test_processes_that_skip_at_the_same_time(tmp_path):
    def run():
        skipped = SkippedImages(str(tmp_path / "new" / "skipped.txt"))
        counts.put([skipped.add(f"/{i}.png") for i in range(50)])

    context = multiprocessing.get_context("fork")
    counts = context.Queue()
    processes = [context.Process(target=run) for _ in range(4)]
    for process in processes:
        process.start()
    numbers = sorted(count for _ in processes for count in counts.get(timeout=60) if count)
    for process in processes:
        process.join()
    assert numbers == list(range(1, 51))
    assert sorted(SkippedImages(str(tmp_path / "new" / "skipped.txt")).read()) == sorted(f"/{i}.png" for i in range(50))
