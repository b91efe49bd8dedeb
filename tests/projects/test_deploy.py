"""projects/Deploy/detect.py in an environment without torch, Detectron2 and mgd_det."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import exported
import few_packages
import numpy as np
import pytest
import torch
from detectron2.data.transforms import ResizeShortestEdge
from PIL import Image
from pycocotools import mask as mask_util

from mgd_det.cli.image_files import SUFFIXES
from mgd_det.export import detector_settings
from mgd_det.export.formats import write_metadata

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
DETECT = ROOT / "projects" / "Deploy" / "detect.py"


def detect(*argv, script=DETECT, cwd=None):
    """Runs detect.py where little can be imported; returns (status, stdout, stderr)."""
    return few_packages.run(script, *argv, cwd=cwd)


@pytest.fixture(scope="module")
def model_and_images(tmp_path_factory):
    """(detector, cfg, path of the model, folder of three images of different sizes)."""
    folder = tmp_path_factory.mktemp("deploy")
    detector, cfg, core = exported.core_in_onnx("retinanet")
    cfg = cfg.clone()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 96, 130
    path = folder / "model.onnx"
    shutil.copy(core.path, path)
    ids = [3 * i + 2 for i in range(10)]
    write_metadata(str(path), detector_settings(cfg, detector, [f"name {i}" for i in ids], ids))
    images = folder / "images"
    images.mkdir()
    for name, entry in zip("cab", exported.inputs(((120, 200), (97, 60), (64, 64)))):
        Image.fromarray(entry["image"].numpy().transpose(1, 2, 0)).save(images / f"{name}.png")
    return detector, cfg, path, images


def expected_results(detector, cfg, images, image_ids, category_ids):
    """What Detectron2 finds, as its COCO evaluator writes it."""
    results = []
    for path, image_id in zip(images, image_ids):
        image = np.asarray(Image.open(path))[:, :, ::-1]
        resize = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST).get_transform(image)
        pixels = torch.as_tensor(resize.apply_image(np.ascontiguousarray(image)).transpose(2, 0, 1).copy())
        with torch.no_grad():
            (output,) = detector([{"image": pixels, "height": image.shape[0], "width": image.shape[1]}])
        found = output["instances"]
        for box, score, index in zip(found.pred_boxes.tensor.tolist(), found.scores, found.pred_classes):
            x1, y1, x2, y2 = box
            bbox = [x1, y1, x2 - x1, y2 - y1]
            results.append((image_id, category_ids[index], float(score), bbox))
    return results


def assert_results(path, expected):
    results = json.loads(path.read_text())
    assert len(results) == len(expected) > 20
    for entry, (image_id, category_id, score, bbox) in zip(results, expected):
        assert (entry["image_id"], entry["category_id"]) == (image_id, category_id)
        assert entry["score"] == pytest.approx(score, abs=1e-4)
        assert entry["bbox"] == pytest.approx(bbox, abs=0.02)


@pytest.mark.slow
def test_it_finds_what_pytorch_finds_without_pytorch(model_and_images, tmp_path):
    detector, cfg, model, images = model_and_images
    status, out, err = detect(model, images, "--json", tmp_path / "found.json", cwd=tmp_path)
    assert status == 0, err
    modules = err.splitlines()[-1]
    assert "'onnxruntime'" in modules and "'torch'" not in modules and "'mgd_det'" not in modules
    paths = sorted(images.iterdir())
    expected = expected_results(detector, cfg, paths, (1, 2, 3), [3 * i + 2 for i in range(10)])
    assert_results(tmp_path / "found.json", expected)
    assert f"{len(expected)} objects in 3 images" in out
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]


@pytest.mark.slow
def test_ids_of_an_annotation_file_and_a_copy_in_another_folder(model_and_images, tmp_path):
    detector, cfg, model, images = model_and_images
    for source in (DETECT, ROOT / "mgd_det" / "export" / "postprocessing.py"):
        (tmp_path / source.name).write_text(source.read_text())
    names = [f"name {3 * i + 2}" for i in range(10)]
    known = {
        "images": [{"id": 70 + i, "file_name": f"val/{name}.png"} for i, name in enumerate("abc")],
        "categories": [{"id": 500 + i, "name": name} for i, name in enumerate(names)],
    }
    (tmp_path / "known.json").write_text(json.dumps(known))
    argv = [model, images / "c.png", images / "a.png", "--json", tmp_path / "found.json"]
    status, _, err = detect(*argv, "--annotations", tmp_path / "known.json", script=tmp_path / "detect.py")
    assert status == 0, err
    paths = [images / "c.png", images / "a.png"]
    assert_results(
        tmp_path / "found.json", expected_results(detector, cfg, paths, (72, 70), [500 + i for i in range(10)])
    )
    known["categories"].pop()
    (tmp_path / "known.json").write_text(json.dumps(known))
    status, _, err = detect(*argv, "--annotations", tmp_path / "known.json")
    assert status == 1 and "has no name 29" in err


@pytest.mark.slow
def test_images_that_cannot_be_read_are_named_and_the_others_detected(model_and_images, tmp_path):
    detector, cfg, model, images = model_and_images
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(images / "b.png", folder / "b.png")
    (folder / "a.png").write_bytes((images / "a.png").read_bytes()[:200])
    Image.fromarray(np.full((64, 64), 40000, dtype=np.uint16)).save(folder / "deep.png")
    argv = [model, folder, images / "b.png", "--json", tmp_path / "found.json"]
    status, out, err = detect(*argv)
    assert status == 1 and "Traceback" not in err and "in 2 images" in out
    assert "a.png cannot be read" in err and "deep.png cannot be read and is left out: PIL mode 'I;16'" in err
    # The same image twice, with the ids of its places.
    paths = [images / "b.png"] * 2
    assert_results(
        tmp_path / "found.json", expected_results(detector, cfg, paths, (2, 4), [3 * i + 2 for i in range(10)])
    )


@pytest.mark.slow
def test_a_score_to_start_from(model_and_images, tmp_path):
    _, _, model, images = model_and_images
    assert detect(model, images, "--json", tmp_path / "all.json")[0] == 0
    scores = sorted(entry["score"] for entry in json.loads((tmp_path / "all.json").read_text()))
    middle = scores[len(scores) // 2]
    assert detect(model, images, "--json", tmp_path / "some.json", "--min-score", middle)[0] == 0
    kept = sorted(entry["score"] for entry in json.loads((tmp_path / "some.json").read_text()))
    assert kept == [score for score in scores if score >= middle]


@pytest.mark.slow
def test_mistakes(model_and_images, tmp_path):
    _, _, model, images = model_and_images
    status, _, err = detect(model, tmp_path / "none.png", "--json", tmp_path / "a.json")
    assert status == 1 and "none.png does not exist" in err and "Traceback" not in err
    (tmp_path / "empty").mkdir()
    status, _, err = detect(model, tmp_path / "empty", "--json", tmp_path / "a.json")
    assert status == 1 and "has no images" in err and not (tmp_path / "a.json").exists()
    known = {"images": [{"id": i, "file_name": f"{i}/a.png"} for i in (1, 2)], "categories": []}
    (tmp_path / "known.json").write_text(json.dumps(known))
    argv = [model, images / "a.png", "--json", tmp_path / "a.json", "--annotations", tmp_path / "known.json"]
    status, _, err = detect(*argv)
    assert status == 1 and "has 2 images with the name a.png" in err and not (tmp_path / "a.json").exists()
    status, _, err = detect(tmp_path / "none.onnx", images, "--json", tmp_path / "found.json")
    assert status == 1 and "none.onnx" in err and "Traceback" not in err
    status, _, err = detect(model, images, "--json", tmp_path / "found.json", "--annotations", tmp_path / "none.json")
    assert status == 1 and "none.json" in err and "Traceback" not in err
    for argv, message in (
        ([images / "a.png", images, "--json", tmp_path / "a.json"], "a.png cannot be used"),
        ([model, images, "--json", tmp_path / "no folder" / "a.json"], "--json .*a.json cannot be written"),
        ([model, images, "--json", images], "--json .* cannot be written: it is a folder"),
        ([model, images, "--json", tmp_path / "a.json", "--annotations", images / "a.png"], "not a json in COCO's"),
    ):
        status, _, err = detect(*argv)
        assert status == 1 and re.search(message, err) and "Traceback" not in err
    assert not list(tmp_path.rglob("*.partial"))


def test_folders_have_the_images_that_predict_finds():
    specification = importlib.util.spec_from_file_location("detect", DETECT)
    program = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(program)
    assert set(program.SUFFIXES) == set(SUFFIXES)


@pytest.mark.parametrize("seed", range(5))
def test_masks_as_coco_encodes_them(seed):
    spec = importlib.util.spec_from_file_location("deploy_detect", DETECT)
    module = importlib.util.module_from_spec(spec)
    saved = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = saved
    rng = np.random.default_rng(seed)
    mask = rng.uniform(size=(rng.integers(1, 90), rng.integers(1, 90))) < [0, 0.01, 0.5, 0.99, 1][seed]
    expected = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert module.compressed_rle(mask) == {"size": expected["size"], "counts": expected["counts"].decode()}
