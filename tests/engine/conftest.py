"""What the tests of trainings share."""

import pytest
import toy
from detectron2.data import DatasetCatalog

from mgd_det.data import register_coco_folder


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Overrides of a config that name six registered scenes."""
    _, annotations, _, images, *_ = toy.write_scenes(tmp_path_factory.mktemp("scenes") / "toy", train=6, val=1)
    register_coco_folder("six_scenes", annotations, images)
    yield ["DATASETS.TRAIN", "('six_scenes',)", "DATASETS.TEST", "()"]
    DatasetCatalog.remove("six_scenes")
