import contextlib
import gzip
import io
import json
import os
import struct
from dataclasses import replace

import cv2
import numpy as np
import programs
import pycocotools.mask as mask_util
import pytest
from fast_cases import fast
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mgd_det.cli import prepare_fashion_scenes
from mgd_det.data.fashion_scenes.drawing import Placement, compose_scene, draw_background, silhouette
from mgd_det.data.fashion_scenes.photos import CLASS_NAMES, FashionPhotos
from mgd_det.data.fashion_scenes.scenes import SCENE_SPECS, SceneSpec, write_fashion_scenes
from mgd_det.errors import UserError

SPEC = SceneSpec("test", 12, 6, 64)
WHOLE = np.full((28, 28), 255, np.uint8)


def square_photos():
    """Training photos: squares of the first five classes."""
    images = np.zeros((10, 28, 28), np.uint8)
    images[:, 4:24, 4:24] = np.arange(160, 260, 10)[:, None, None].clip(0, 255)
    return FashionPhotos(images, np.arange(10) % 5)


def disc_photos():
    """Test photos: discs of the last five classes."""
    y, x = np.mgrid[:28, :28] - 13.5
    images = np.repeat(((x**2 + y**2 < 10**2) * 200).astype(np.uint8)[None], 10, axis=0)
    return FashionPhotos(images, 5 + np.arange(10) % 5)


def make(root, spec=SPEC, **options):
    return write_fashion_scenes(root, spec, square_photos(), disc_photos(), **dict({"workers": 1}, **options))


def contents(root):
    files = [path for path in root.rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def load(root, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}.json"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make(tmp_path_factory.mktemp("scenes") / "test", replace(SPEC, train_images=40, val_images=40))


# ------------------------------------------------------------------------ files


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_workers(tmp_path):
    one = contents(make(tmp_path / "one"))
    assert len(one) == 12 + 6 + 2
    assert contents(make(tmp_path / "again")) == one
    assert contents(make(tmp_path / "two", workers=2)) == one


def test_every_scene_differs(tmp_path):
    photos = square_photos()  # the same in both splits, so that only the generator tells scenes apart
    first = write_fashion_scenes(tmp_path / "0", SPEC, photos, photos, seed=0, workers=1)
    second = write_fashion_scenes(tmp_path / "1", SPEC, photos, photos, seed=1, workers=1)
    images = [path.read_bytes() for root in (first, second) for path in root.rglob("*.png")]
    assert len(set(images)) == len(images) == 36


def test_a_longer_set_starts_with_the_same_scenes(tmp_path):
    short = contents(make(tmp_path / "short"))
    longer = contents(make(tmp_path / "long", replace(SPEC, train_images=14)))
    assert {name: longer[name] for name in short if name.endswith(".png")} == {
        name: data for name, data in short.items() if name.endswith(".png")
    }


@pytest.mark.parametrize("split, classes, fill", [("train", range(1, 6), 1.0), ("val", range(6, 11), np.pi / 4)])
def test_each_split_draws_its_own_photos(tmp_path, split, classes, fill):
    # One upright object a scene: a square fills its box, a disc pi/4 of it.
    spec = SceneSpec("test", 40, 40, 128, max_objects=1, min_scale=1.5, max_angle=0.0)
    annotations = load(make(tmp_path / "test", spec), split).dataset["annotations"]
    assert {a["category_id"] for a in annotations} == set(classes)
    inner = [a for a in annotations if min(a["bbox"][:2]) > 0 and a["bbox"][0] + a["bbox"][2] < 128]
    inner = [a for a in inner if a["bbox"][1] + a["bbox"][3] < 128]
    assert len(inner) > 10
    for annotation in inner:
        _, _, width, height = annotation["bbox"]
        assert annotation["area"] / (width * height) == pytest.approx(fill, abs=0.06)


@pytest.mark.parametrize("split", ["train", "val"])
def test_annotations_agree_with_their_masks(scenes, split):
    coco = load(scenes, split)
    assert [c["name"] for c in coco.loadCats(sorted(coco.getCatIds()))] == CLASS_NAMES
    assert sorted(coco.getCatIds()) == list(range(1, 11))
    assert len(coco.imgs) == 40 and len(coco.anns) > 60
    assert sorted(coco.anns) == list(range(1, len(coco.anns) + 1))
    for image_id, image in coco.imgs.items():
        pixels = cv2.imread(str(scenes / "images" / split / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3) == (64, 64, 3)
        covered = np.zeros((64, 64), int)
        annotations = coco.imgToAnns[image_id]
        assert len(annotations) <= 6
        for annotation in annotations:
            mask = mask_util.decode(annotation["segmentation"])
            rows, columns = np.nonzero(mask)
            x, y = columns.min(), rows.min()
            assert annotation["bbox"] == [x, y, columns.max() - x + 1, rows.max() - y + 1]
            assert annotation["area"] == mask.sum() > 0
            assert annotation["iscrowd"] == 0
            covered += mask
        assert covered.max(initial=0) <= 1  # visible parts do not overlap


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_truth_as_prediction_scores_one(scenes, kind):
    truth = load(scenes, "val")
    keys = ("image_id", "category_id", "bbox", "segmentation")
    predictions = [dict({key: a[key] for key in keys}, score=0.9) for a in truth.dataset["annotations"]]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(predictions), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert evaluation.stats[0] == pytest.approx(1.0)


# --------------------------------------------------------- writing, interruption


class Stop:
    """A progress callback that raises after some scenes."""

    def __init__(self, error, after=9):
        self.error, self.after = error, after

    def __call__(self, done, total):
        if done == self.after:
            raise self.error


# In the training split, and in the validation split.
@pytest.mark.parametrize("workers, after", fast([(1, 5), (2, 15)]))
def test_interruption_leaves_nothing(tmp_path, workers, after):
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "test", workers=workers, progress=Stop(KeyboardInterrupt(), after))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_replacement_keeps_the_old_set(tmp_path):
    root = make(tmp_path / "test")
    before = contents(root)
    with pytest.raises(OSError):
        make(root, seed=1, force=True, progress=Stop(OSError("disk full")))
    assert contents(tmp_path) == {f"test/{name}": data for name, data in before.items()}


def test_progress_counts_both_splits(tmp_path):
    seen = []
    make(tmp_path / "test", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 18) for done in range(1, 19)]


def test_a_whole_set_is_left_as_it_is(tmp_path):
    root = make(tmp_path / "test")
    (root / "preview.png").write_bytes(b"")
    assert make(root, progress=Stop(AssertionError("drawn again"), after=1)) == root


@pytest.mark.parametrize("change", ["seed", "spec", "photos", "lost image", "broken json"])
def test_another_set_is_replaced_only_by_force(tmp_path, change):
    root, spec, seed, photos = make(tmp_path / "test"), SPEC, 0, square_photos()
    if change == "seed":
        seed = 1
    elif change == "spec":
        spec = replace(SPEC, max_objects=5)
    elif change == "photos":
        photos.images[0, 10, 10] = 99
    elif change == "lost image":
        (root / "images" / "val" / "000000000003.png").unlink()
    else:
        (root / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(UserError, match="--force"):
        write_fashion_scenes(root, spec, photos, disc_photos(), seed=seed, workers=1)
    write_fashion_scenes(root, spec, photos, disc_photos(), seed=seed, workers=1, force=True)
    fresh = write_fashion_scenes(tmp_path / "fresh", spec, photos, disc_photos(), seed=seed, workers=1)
    assert contents(root) == contents(fresh)
    assert sorted(os.listdir(tmp_path)) == ["fresh", "test"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_never_replaced(tmp_path, force):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="thesis.tex"):
        make(tmp_path / "test", force=force)
    assert (tmp_path / "test" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("change", [{"train_images": 0}, {"val_images": 0}, {"image_size": 8}])
def test_numbers_out_of_range(tmp_path, change):
    with pytest.raises(UserError, match="at least"):
        make(tmp_path / "test", replace(SPEC, **change))


# ---------------------------------------------------------------------- drawing


def scene_of(*centers, scale=1.0):
    """Composes whole 28-pixel squares on 64 x 64, and returns the visible area of those annotated."""
    placements = [Placement(WHOLE, label, center, scale) for label, center in enumerate(centers)]
    _, objects = compose_scene(np.zeros((64, 64, 3), np.uint8), placements, min_visible=0.4)
    return {label: int(mask.sum()) for label, mask in objects}


def test_alone_and_inside_all_of_it_is_annotated():
    assert scene_of((32, 32)) == {0: pytest.approx(28 * 28, abs=60)}


@pytest.mark.parametrize(
    "centers, annotated",
    [
        ([(20, 32), (34, 32)], {0, 1}),  # the first is half hidden
        ([(20, 32), (28, 32)], {1}),  # 29 % of it shows
        ([(32, 32), (32, 32)], {1}),
        ([(0, 32)], {0}),  # half outside the image
        ([(-5, 32)], set()),  # 32 % inside
        ([(32, 69)], set()),
        ([(0, 32), (7, 32)], {1}),  # half outside, and of the rest half hidden: 25 % shows
        ([(90, 32)], set()),
    ],
)
def test_the_visible_share_decides(centers, annotated):
    assert set(scene_of(*centers)) == annotated


def test_visible_part_is_what_the_picture_shows():
    red, blue = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0)
    placements = [
        Placement(WHOLE, 3, (26, 32), 1.2, angle=20, tint=red),
        Placement(WHOLE, 7, (44, 40), 1.0, angle=-30, tint=blue),
    ]
    background = np.zeros((64, 64, 3), np.uint8)
    image, objects = compose_scene(background, placements, 0.4)
    assert [label for label, _ in objects] == [3, 7]
    for (_, mask), channel in zip(objects, (2, 0)):
        shown = image[:, :, channel] > 127
        assert (shown != mask.astype(bool)).sum() <= 0.03 * mask.sum()
    assert not background.any()


def test_flip_and_rotation_move_the_silhouette():
    half = np.zeros((28, 28), np.uint8)
    half[:, :14] = 255  # clothing in the left half

    def center_of_mass(**options):
        _, [(_, mask)] = compose_scene(
            np.zeros((64, 64, 3), np.uint8), [Placement(half, 0, (32, 32), 2.0, **options)], 0.4
        )
        return np.argwhere(mask).mean(axis=0)[::-1] - 31.5

    np.testing.assert_allclose(center_of_mass(), (-14, 0), atol=1)
    np.testing.assert_allclose(center_of_mass(flip=True), (14, 0), atol=1)
    np.testing.assert_allclose(center_of_mass(angle=90), (0, 14), atol=1)  # left turns down
    np.testing.assert_allclose(center_of_mass(flip=True, angle=90), (0, -14), atol=1)


def test_silhouette_fills_dark_cloth_but_not_a_handle():
    photo = np.zeros((28, 28), np.uint8)
    photo[6:22, 6:22] = 180
    photo[10:16, 10:16] = 0
    photo[2, 2] = 255  # a speck
    filled = np.zeros((28, 28), np.uint8)
    filled[6:22, 6:22] = 1
    np.testing.assert_array_equal(silhouette(photo, CLASS_NAMES.index("Pullover")), filled)
    filled[10:16, 10:16] = 0
    np.testing.assert_array_equal(silhouette(photo, CLASS_NAMES.index("Bag")), filled)


def test_silhouette_of_an_all_black_photo_is_empty():
    black = np.zeros((28, 28), np.uint8)
    assert not silhouette(black, 0).any()
    _, objects = compose_scene(np.zeros((64, 64, 3), np.uint8), [Placement(black, 0, (32, 32), 1.0)], 0.4)
    assert objects == []


def test_background_is_muted():
    for seed in range(10):
        image = draw_background(np.random.default_rng(seed), 128)
        assert image.shape == (128, 128, 3)
        saturation = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[:, :, 1]
        assert np.median(saturation) < 100 and image.std() > 3


# ------------------------------------------------------------------------- tool


@pytest.fixture
def photo_folder(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, photos in (("train", square_photos()), ("t10k", disc_photos())):
        for kind, array in (("images-idx3", photos.images), ("labels-idx1", photos.labels.astype(np.uint8))):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{name}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def run(tmp_path, photo_folder, *more):
    """Runs the program in this process; returns its exit status."""
    argv = ["tiny", "--root", tmp_path / "root", "--photos", photo_folder, *more]
    return programs.exit_status(prepare_fashion_scenes.main, *argv)


def test_tool_makes_a_set(tmp_path, photo_folder, capsys):
    assert run(tmp_path, photo_folder, "--train", "5", "--val", "2", "--workers", "1") == 0
    folder = tmp_path / "root" / "fashion_scenes" / "tiny"
    assert [len(list((folder / "images" / split).iterdir())) for split in ("train", "val")] == [5, 2]
    info = json.loads((folder / "annotations" / "instances_train.json").read_text())["info"]
    assert info["spec"]["image_size"] == SCENE_SPECS["tiny"].image_size
    assert cv2.imread(str(folder / "preview.png")).shape == (4 * 258, 4 * 258, 3)
    shown = capsys.readouterr().out
    assert str(folder) in shown and "Ankle boot" in shown


def test_tool_reports_a_mistake_in_one_line(tmp_path, photo_folder, capsys):
    options = ("--train", "2", "--val", "1", "--workers", "1")
    assert run(tmp_path, photo_folder, *options) == 0
    capsys.readouterr()
    assert run(tmp_path, photo_folder, *options, "--seed", "3") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--force" in errors[0]
    assert run(tmp_path, photo_folder, *options, "--seed", "3", "--force") == 0
    assert run(tmp_path, tmp_path / "nowhere") == 1
    (tmp_path / "root" / "file").write_text("")
    capsys.readouterr()
    assert run(tmp_path, photo_folder, *options, "--root", str(tmp_path / "root" / "file" / "x")) == 1
    assert f"error: --root {tmp_path}/root/file/x" in capsys.readouterr().err
