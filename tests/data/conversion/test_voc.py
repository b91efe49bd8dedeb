"""Pascal VOC's format, on files made on the spot."""

import numpy as np
import pytest
from PIL import Image

from mgd_det.data.conversion import read_voc
from mgd_det.errors import UserError


def thing(name="car", xmin=11, ymin=6, xmax=30, ymax=25, difficult=0, box=None):
    corners = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return (
        f"  <object>\n    <name>{name}</name>\n    <difficult>{difficult}</difficult>\n"
        f"    <bndbox>{corners if box is None else box}</bndbox>\n  </object>\n"
    )


def write(root, stem, *things):
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((50, 100, 3), dtype=np.uint8)).save(root / "JPEGImages" / f"{stem}.jpg")
    xml = f"<annotation>\n  <filename>{stem}.jpg</filename>\n{''.join(things)}</annotation>\n"
    (root / "Annotations" / f"{stem}.xml").write_text(xml)


def lists(root, **splits):
    folder = root / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        (folder / f"{name}.txt").write_text("\n".join(lines))


@pytest.fixture
def root(tmp_path):
    write(tmp_path, "2008_000001", thing("ship", 1, 1, 100, 50), thing())
    write(tmp_path, "2008_000002", thing("plane", difficult=1))
    write(tmp_path, "2008_000003")
    lists(tmp_path, train=["2008_000001", ""], val=["2008_000002", "2008_000003"], car_train=["2008_000001  1"])
    return tmp_path


def test_boxes_count_from_one_and_include_the_last_pixel(root):
    classes, (train, val) = read_voc(root)
    assert classes == ["car", "plane", "ship"] and (train.name, val.name) == ("train", "val")
    assert train.image_root == root / "JPEGImages"
    assert train.images == [{"id": 1, "file_name": "2008_000001.jpg", "height": 50, "width": 100}]
    ship, car = train.annotations
    assert ship["bbox"] == [0, 0, 100, 50] and ship["category_id"] == 3  # the whole image
    # Pixels 11 to 30, of which there are 20, begin at 10 when counted from 0.
    assert car["bbox"] == [10, 5, 20, 20] and (car["category_id"], car["area"], car["iscrowd"]) == (1, 400, 0)
    assert [entry["file_name"] for entry in val.images] == ["2008_000002.jpg", "2008_000003.jpg"]


def test_difficult_objects_are_crowds(root):
    _, (_, val) = read_voc(root)
    assert [(entry["image_id"], entry["iscrowd"]) for entry in val.annotations] == [(1, 1)]


def test_without_lists_all_images_are_one_split(tmp_path):
    write(tmp_path, "b", thing())
    write(tmp_path, "a", thing())
    _, (split,) = read_voc(tmp_path)
    assert split.name == "all" and [entry["file_name"] for entry in split.images] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    "bad, problem",
    [
        (thing(xmin="left"), "'xmin': 'left'"),
        (thing(box=""), "'xmin': None"),
        (thing(xmin=40), "'xmin': '40'"),
        (thing(ymax="nan"), "'ymax': 'nan'"),
        (thing(name=" "), "without a name"),
        (thing(xmin=101, xmax=120), "outside its image of 100 x 50"),
    ],
)
def test_a_bad_object_is_named_with_its_file_and_line(root, bad, problem):
    write(root, "2008_000001", thing(), bad)
    with pytest.raises(UserError) as error:
        read_voc(root)
    path = root / "Annotations" / "2008_000001.xml"
    (line,) = [i for i, text in enumerate(path.read_text().splitlines(), 1) if "<object>" in text][1:]
    (shown,) = str(error.value).splitlines()[1:]
    assert f"{path}, line {line}: " in shown and problem in shown


def test_files_that_are_missing_or_broken(root):
    (root / "Annotations" / "2008_000001.xml").write_text("<annotation>\n<object></annotation>")
    (root / "Annotations" / "2008_000002.xml").unlink()
    (root / "JPEGImages" / "2008_000003.jpg").write_bytes(b"no image")
    lists(root, test=["2008_000009", "2008_000001 -1"])
    with pytest.raises(UserError) as error:
        read_voc(root)
    message = str(error.value)
    assert "2008_000001.xml, line 2: " in message  # where the parser stops
    assert "2008_000002.xml: there is no such file" in message
    assert "2008_000003.jpg: cannot be read" in message
    assert "2008_000009: there is no image" in message
    assert "test.txt, line 2: 2 words" in message


def test_a_folder_of_another_kind(tmp_path):
    with pytest.raises(UserError, match="has no folder JPEGImages"):
        read_voc(tmp_path)
    write(tmp_path, "a")
    with pytest.raises(UserError, match="Annotations has no object"):
        read_voc(tmp_path)


def test_names_with_spaces_and_a_byte_order_mark(tmp_path):
    write(tmp_path, "IMG 1", thing())
    write(tmp_path, "b", thing())
    lists(tmp_path, train=["\ufeffIMG 1", "b"])
    _, (train,) = read_voc(tmp_path)
    assert [entry["file_name"] for entry in train.images] == ["IMG 1.jpg", "b.jpg"] and len(train.annotations) == 2
