"""Images that are missing, empty, cut or of another size."""

import shutil

import coco_data
import numpy as np
import pytest
from detectron2.data.detection_utils import check_image_size, read_image
from PIL import Image

from mgd_det.data.coco import image_check
from mgd_det.data.coco import problems as kinds
from mgd_det.data.coco.check import ImageFile, check_coco_content
from mgd_det.data.coco.image_check import absent_images, broken_images

SIZE = (48, 64)


@pytest.fixture
def folder(tmp_path):
    """(folder, its images as the json has them)."""
    content = coco_data.content()
    content["images"][2]["file_name"] = "deep/er/3.jpg"
    _, images = coco_data.write(tmp_path, content)
    return images, check_coco_content("a.json", content).images


def test_sound_images(folder):
    seen = []
    assert absent_images(*folder) == []
    assert broken_images(*folder, workers=2, progress=lambda *counts: seen.append(counts)) == []
    assert seen == [(i, 6) for i in range(1, 7)]


def test_absent_and_empty_images(folder):
    root, images = folder
    (root / "1.png").unlink()
    (root / "2.png").write_bytes(b"")
    shutil.rmtree(root / "deep")
    (root / "4.png").unlink()
    (root / "4.png").symlink_to(root / "nowhere.png")
    found = [(p.kind, p.entry, p.file, p.place, p.breaks) for p in absent_images(root, images)]
    assert found == [
        (kinds.MISSING_IMAGE, 1, str(root / "1.png"), 0, True),
        (kinds.EMPTY_IMAGE, 2, str(root / "2.png"), 1, True),
        (kinds.MISSING_IMAGE, 3, str(root / "deep/er/3.jpg"), 2, True),
        (kinds.MISSING_IMAGE, 4, str(root / "4.png"), 3, True),
    ]


@pytest.mark.parametrize(
    "name", ["\0.png", "\0/1.png", "\ud800.png", "\ud800/1.png", "x" * 300 + "/1.png", "/dev/null"]
)
def test_names_that_no_image_can_have(folder, name):
    (problem,) = absent_images(folder[0], [ImageFile(0, 1, name, *SIZE)])
    assert problem.kind in (kinds.MISSING_IMAGE, kinds.EMPTY_IMAGE) and str(problem).encode("utf-8")


def test_sizes_of_files_are_left_out_where_they_take_too_long(folder, monkeypatch):
    root, images = folder
    (root / "1.png").unlink()
    (root / "2.png").write_bytes(b"")
    monkeypatch.setattr(image_check, "_STAT_SECONDS", -1)
    assert [p.entry for p in absent_images(root, images)] == [1]


def test_broken_images(folder):
    root, images = folder
    coco_data.truncate(root / "1.png")
    (root / "2.png").write_bytes(b"")
    coco_data.truncate(root / "deep/er/3.jpg")
    (root / "4.png").write_text("<html>not found</html>")
    Image.new("RGB", (48, 64)).save(root / "5.png")
    (root / "6.png").unlink()
    found = broken_images(root, images, absent_images(root, images))
    assert [(p.kind, p.entry) for p in found] == [
        (kinds.UNREADABLE_IMAGE, 1),
        (kinds.UNREADABLE_IMAGE, 3),
        (kinds.UNREADABLE_IMAGE, 4),
        (kinds.WRONG_SIZE, 5),
    ]
    assert all(p.breaks and p.file in str(p) for p in found)
    assert "truncated" in str(found[1]) and "48 x 64 " in str(found[3]) and "says 64 x 48" in str(found[3])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_modes_that_training_reads(tmp_path, mode):
    name = "a.tif" if mode == "CMYK" else "a.png"
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).convert(mode).save(tmp_path / name)
    assert broken_images(str(tmp_path), [ImageFile(0, 1, name, *SIZE)]) == []


@pytest.mark.parametrize("mode, name", [("I;16", "a.png"), ("I;16B", "a.tif"), ("I", "a.tif"), ("F", "a.tif")])
def test_deep_images_are_broken(tmp_path, mode, name):
    pixels = np.full(SIZE, 4080, {"I;16": "<u2", "I;16B": ">u2", "I": "int32", "F": "float32"}[mode])
    image = Image.frombytes(mode, SIZE[::-1], pixels.tobytes())
    image.save(tmp_path / name)
    (problem,) = broken_images(str(tmp_path), [ImageFile(0, 1, name, *SIZE)])
    assert (problem.kind, problem.entry, problem.breaks) == (kinds.DEEP_IMAGE, 1, True)
    assert str(tmp_path / name) in str(problem) and f"'{mode}'" in str(problem)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_counts_after_the_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    for height, width in ((48, 64), (64, 48)):
        found = broken_images(str(tmp_path), [ImageFile(0, 1, "a.jpg", height, width)])
        try:  # what Detectron2's mapper does
            record = {"height": height, "width": width}
            check_image_size(record, read_image(str(tmp_path / "a.jpg"), "BGR"))
            accepted = True
        except ValueError:
            accepted = False
        assert accepted == (not found) == ((height == 48) == (orientation < 5))
