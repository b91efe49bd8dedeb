"""YOLO's format, on files made on the spot."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools import mask as mask_util

from mgd_det.data.conversion import read_yolo
from mgd_det.errors import UserError


def image(path, width=100, height=50, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(path, **save)


@pytest.fixture
def root(tmp_path):
    """Two training images, one of them without objects, and a validation image."""
    for name in ("train/a.png", "train/empty.png", "val/b.png"):
        image(tmp_path / "images" / name)
    write(tmp_path, "train/a.txt", "1 0.5 0.5 0.2 0.4", "", "0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6")
    write(tmp_path, "val/b.txt", "2 0.05 0.5 0.2 1.0")
    data(tmp_path)
    return tmp_path


def write(root, name, *lines):
    path = root / "labels" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines))


def data(root, **changes):
    content = {"train": "images/train", "val": "images/val", "nc": 3, "names": ["ship", "plane", "car"], **changes}
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return path


def test_boxes_and_polygons_in_pixels(root):
    classes, (train, val) = read_yolo(root / "data.yaml")
    assert classes == ["ship", "plane", "car"] and (train.name, val.name) == ("train", "val")
    assert train.image_root == root / "images" / "train"
    assert train.images == [
        {"id": 1, "file_name": "a.png", "height": 50, "width": 100},
        {"id": 2, "file_name": "empty.png", "height": 50, "width": 100},
    ]
    box, polygon = train.annotations
    assert (box["id"], box["image_id"], box["category_id"], box["iscrowd"]) == (1, 1, 2, 0)
    assert box["bbox"] == pytest.approx([40, 15, 20, 20]) and box["area"] == pytest.approx(400)
    assert "segmentation" not in box
    assert polygon["segmentation"] == [pytest.approx([10, 10, 30, 10, 30, 30, 10, 30])]
    assert polygon["bbox"] == pytest.approx([10, 10, 20, 20]) and polygon["area"] == pytest.approx(400)
    # A box that sticks out at the left is cut there: from x = 0 to 15.
    assert val.annotations[0]["bbox"] == pytest.approx([0, 0, 15, 50])
    categories = train.content(classes)["categories"]
    assert categories == [{"id": 1, "name": "ship"}, {"id": 2, "name": "plane"}, {"id": 3, "name": "car"}]


def test_the_area_of_a_polygon_is_that_of_its_mask(root):
    write(root, "train/a.txt", "0 0.1 0.2 0.9 0.2 0.9 0.9 0.5 0.4 0.1 0.9")
    entry = read_yolo(root / "data.yaml")[1][0].annotations[0]
    mask = mask_util.decode(mask_util.frPyObjects(entry["segmentation"], 50, 100))
    assert entry["area"] == pytest.approx(mask.sum(), rel=0.03)


@pytest.mark.parametrize(
    "line, problem",
    [
        ("3 0.5 0.5 0.2 0.2", "class 3"),
        ("-1 0.5 0.5 0.2 0.2", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "class 0.5"),
        ("plane 0.5 0.5 0.2 0.2", "not only numbers"),
        ("0 0.5 0.5 0.2", "3 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "5 numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "7 numbers"),
        ("0", "0 numbers"),
        ("0 50 20 10 10", "from 0 to 1"),
        ("0 0.5 nan 0.2 0.2", "from 0 to 1"),
        ("0 0.5 0.5 0 0.2", "width or height"),
        ("0 0.1 0.1 0.1 0.5 0.1 0.9", "width or height"),
    ],
)
def test_a_bad_line_is_named_with_its_file(root, line, problem):
    write(root, "train/a.txt", "1 0.5 0.5 0.2 0.4", line)
    with pytest.raises(UserError) as error:
        read_yolo(root / "data.yaml")
    (shown,) = str(error.value).splitlines()[1:]
    assert f"{root / 'labels' / 'train' / 'a.txt'}, line 2: " in shown and problem in shown
    assert repr(line) in shown


def test_all_bad_lines_are_counted_and_some_shown(root):
    write(root, "train/a.txt", *["9 0.5 0.5 0.2 0.4"] * 30)
    with pytest.raises(UserError, match=r"(?s)30 problems.*line 10\b.*and 20 more") as error:
        read_yolo(root / "data.yaml")
    assert "line 11" not in str(error.value)


def test_images_are_as_training_sees_them(root):
    """Turned by EXIF; and an image that cannot be read is a problem."""
    turned = Image.Exif()
    turned[0x0112] = 6
    image(root / "images" / "train" / "turned.jpg", exif=turned)
    entry = read_yolo(root / "data.yaml")[1][0].images[-1]
    assert (entry["file_name"], entry["width"], entry["height"]) == ("turned.jpg", 50, 100)
    (root / "images" / "val" / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="images/val/b.png: cannot be read"):
        read_yolo(root / "data.yaml")


def test_other_ways_to_name_classes_and_images(root, tmp_path):
    data(
        root, names={0: "ship", 1: "plane", 2: "car"}, nc=None, val=["images/val", "images/train"], test="../images/val"
    )
    classes, (train, val, test) = read_yolo(root / "data.yaml")
    assert classes == ["ship", "plane", "car"] and test.name == "test"
    assert val.image_root == root / "images"
    assert [entry["file_name"] for entry in val.images] == ["val/b.png", "train/a.png", "train/empty.png"]
    (root / "list.txt").write_text("./images/train/a.png\n\n")
    data(root, train="list.txt", val=None)
    ((_, (listed,)),) = [read_yolo(root / "data.yaml")]
    assert [entry["file_name"] for entry in listed.images] == ["a.png"] and len(listed.annotations) == 2
    # "path" is another machine's, or leads to the data from elsewhere.
    data(root, path="/no/such/folder")
    assert len(read_yolo(root / "data.yaml")[1]) == 2
    (root / "configs").mkdir()
    elsewhere = data(root / "configs", path="..")
    assert read_yolo(elsewhere)[1][0].image_root.resolve() == Path(root / "images" / "train").resolve()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"names": None}, "names is None"),
        ({"names": {1: "ship", 2: "plane"}, "nc": 2}, "0, 1, 2"),
        ({"nc": 4}, "nc is 4, but names has 3"),
        ({"train": None, "val": None}, "train, val or test"),
        ({"train": "pictures"}, "train is 'pictures'"),
        ({"train": "labels/train"}, "there is no image"),
        ({"kpt_shape": [17, 3]}, "kpt_shape"),
    ],
)
def test_a_data_yaml_that_cannot_be_used(root, changes, message):
    path = data(root, **changes)
    with pytest.raises(UserError) as error:
        read_yolo(path)
    assert str(path) in str(error.value) and message in str(error.value)


def test_a_file_that_is_no_yaml(root):
    (root / "data.yaml").write_text("names: [")
    with pytest.raises(UserError, match="data.yaml cannot be read"):
        read_yolo(root / "data.yaml")
    (root / "data.yaml").write_text("ship")
    with pytest.raises(UserError, match="data.yaml is not a YAML mapping"):
        read_yolo(root / "data.yaml")


def test_files_with_a_byte_order_mark_as_windows_editors_write_them(root):
    write(root, "train/a.txt", "\ufeff1 0.5 0.5 0.2 0.4")
    path = root / "data.yaml"
    path.write_text("\ufeff" + path.read_text())
    assert [entry["category_id"] for entry in read_yolo(path)[1][0].annotations] == [2]


def test_names_with_keys_of_two_kinds_are_named(root):
    with pytest.raises(UserError, match=r"keys of names are \[0, 'b'\]; number the classes"):
        read_yolo(data(root, nc=2, names={0: "ship", "b": "plane"}))
