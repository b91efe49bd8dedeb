"""The class names of a run's data sets."""

import coco_data
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from mgd_det.data.class_names import check_same_classes, check_scorable_classes, class_names
from mgd_det.errors import UserError

NAME = "test_class_names"
THREE = ["plane", "car", "ship"]


@pytest.fixture(autouse=True)
def catalog():
    yield
    coco_data.forget(NAME)


@pytest.mark.parametrize(
    "trained, tested",
    [
        ({"a": THREE, "b": tuple(THREE)}, {"c": THREE, "d": THREE}),
        ({"a": THREE[:2]}, {"c": THREE}),  # the config has more classes than the data to train on
        ({"a": None, "b": THREE}, {"c": None}),
        ({}, {"c": THREE}),
        ({"a": THREE}, {}),
    ],
)
def test_sets_whose_indices_mean_the_same(trained, tested):
    check_same_classes(trained, tested)


@pytest.mark.parametrize(
    "trained, tested, said",
    [
        ({"a": THREE}, {"c": THREE[::-1]}, r"c has .*'ship', 'car', 'plane'.*a has .*class 0: 'ship' and 'plane'"),
        ({"a": THREE}, {"c": ["plane", "van", "ship"]}, r"class 1: 'van' and 'car'"),
        ({"a": THREE}, {"c": THREE[:2]}, r"c has the classes \['plane', 'car'\], but a has"),
        ({"a": THREE, "b": THREE[:2]}, {}, r"b has .* a has"),
        ({"a": THREE, "b": ["plane", "car", "boat"]}, {}, r"class 2: 'boat' and 'ship'"),
        ({}, {"c": THREE, "d": [*THREE, "van"]}, r"d has .* c has"),
        ({"a": None}, {"c": THREE, "d": THREE[::-1]}, r"d has .* c has"),
        ({"a": THREE}, {"c": None, "d": THREE[::-1]}, r"d has .* a has"),
    ],
)
def test_sets_whose_indices_differ(trained, tested, said):
    with pytest.raises(UserError, match=f"{said}.*same list of categories"):
        check_same_classes(trained, tested)
    with pytest.raises(UserError, match="Buy another one."):
        check_same_classes(trained, tested, "Buy another one.")


def test_long_lists_are_cut_and_the_difference_is_named():
    names = [f"class_{i}" for i in range(80)]
    with pytest.raises(UserError, match="80 in all.*class 40: 'other' and 'class_40'") as error:
        check_same_classes({"a": names}, {"b": [*names[:40], "other", *names[41:]]})
    assert "class_39" not in str(error.value)


def test_a_set_whose_function_sets_its_classes_is_loaded_once():
    loads = []

    def load():
        loads.append(1)
        MetadataCatalog.get(NAME).thing_classes = THREE
        return []

    DatasetCatalog.register(NAME, load)
    check_scorable_classes(NAME)
    assert class_names(NAME) == class_names(NAME) == THREE
    assert loads == [1]


@pytest.mark.parametrize(
    "metadata, is_scorable",
    [
        ({}, False),
        ({"evaluator_type": "coco"}, False),
        ({"evaluator_type": "pascal_voc"}, False),
        ({"evaluator_type": "cityscapes_instance"}, False),
        ({"evaluator_type": "sem_seg"}, True),
        ({"evaluator_type": "lvis"}, True),
        ({"thing_classes": THREE}, True),
        ({"json_file": "http://nowhere/instances.json"}, True),  # COCO's evaluator takes the names from it
    ],
)
def test_sets_without_classes(metadata, is_scorable, caplog):
    DatasetCatalog.register(NAME, list)
    MetadataCatalog.get(NAME).set(**metadata)
    if is_scorable:
        check_scorable_classes(NAME)
    else:
        with pytest.raises(UserError, match=rf"DATASETS.TEST {NAME}: .*MetadataCatalog.get\('{NAME}'\).thing_classes"):
            check_scorable_classes(NAME)
        assert NAME in caplog.text and "thing_classes" in caplog.text
