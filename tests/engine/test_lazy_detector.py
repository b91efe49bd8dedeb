"""The trained detector of a LazyConfig, for predictions and exports."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper
from PIL import Image

from mgd_det.cli import export
from mgd_det.engine import load_predictor
from mgd_det.engine.lazy_detector import read_lazy_detector
from mgd_det.engine.lazy_trainer import student_config
from mgd_det.engine.trained_detector import read_trained_detector
from mgd_det.errors import UserError
from mgd_det.export import ExportedDetector
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES
from mgd_det.model_zoo import is_lazy_config
from mgd_det.recipe import find_teacher

CONFIG = """
import detectron2.data.transforms as T
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from mgd_det import model_zoo

_cfg = model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py")
model, dataloader, optimizer = _cfg.model, _cfg.dataloader, _cfg.optimizer
lr_multiplier, train = _cfg.lr_multiplier, _cfg.train

model.num_classes = 3
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
model.backbone.student.out_channels = 16
model.test_score_thresh = 0.0
model.max_detections_per_image = 20
dataloader.test.mapper.augmentations = [L(T.ResizeShortestEdge)(short_edge_length=64, max_size=110)]
train.init_checkpoint = ""
train.device = "cpu"
"""


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    monkeypatch.delenv(ALLOW_UNSAFE_FILES, raising=False)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """(a LazyConfig in Python, the folder of its training, its detector)."""
    folder = tmp_path_factory.mktemp("lazy")
    (folder / "toy.py").write_text(CONFIG)
    cfg = LazyConfig.load(str(folder / "toy.py"))
    torch.manual_seed(2)
    model = instantiate(student_config(cfg).model).eval()
    with torch.no_grad():
        model.head.cls_score.weight *= 40
    run = folder / "run"
    run.mkdir()
    torch.save({"model": model.state_dict()}, run / "model_final.pth")
    LazyConfig.save(cfg, str(run / "config.yaml"))  # as Detectron2's default_setup does
    (run / "categories.json").write_text(json.dumps([{"id": i, "name": f"name {i}"} for i in (7, 3, 9)]))
    return folder / "toy.py", run, model


def expected(model, path):
    """What Detectron2 itself finds with the config's own loader of images."""
    cfg = LazyConfig.load(str(path))
    mapper = instantiate(cfg.dataloader.test.mapper)
    assert isinstance(mapper, DatasetMapper)
    image = path.parent / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (70, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    mapped = mapper({"file_name": str(image), "height": 70, "width": 140})
    assert mapped["image"].shape == (3, 55, 110)
    with torch.no_grad():
        return pixels, model([mapped])[0]["instances"]


def assert_same(found, wanted):
    assert len(found) == len(wanted) == 20
    torch.testing.assert_close(found.pred_boxes.tensor, wanted.pred_boxes.tensor, atol=0.01, rtol=0)
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-4, rtol=0)
    assert found.pred_classes.tolist() == wanted.pred_classes.tolist()


@pytest.mark.slow
def test_a_config_in_python_with_weights_and_overrides(training):
    path, run, model = training
    pixels, wanted = expected(model, path)
    weights = f"train.init_checkpoint={run / 'model_final.pth'}"
    predictor = load_predictor(str(path), [weights])
    assert_same(predictor(pixels), wanted)
    assert [entry["id"] for entry in predictor.categories] == [1, 2, 3]
    assert len(load_predictor(str(path), [weights, "model.max_detections_per_image=4"])(pixels)) == 4


@pytest.mark.slow
def test_the_folder_of_a_training_needs_permission(training, monkeypatch):
    path, run, model = training
    with pytest.raises(UserError, match="--model .*config.yaml.*--allow-unsafe-files"):
        load_predictor(str(run))
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    pixels, wanted = expected(model, path)
    predictor = load_predictor(str(run))
    assert_same(predictor(pixels), wanted)
    assert predictor.categories == [{"id": i, "name": f"name {i}"} for i in (7, 3, 9)]


@pytest.mark.slow
def test_an_export_of_the_folder(training, tmp_path, monkeypatch, capsys):
    pytest.importorskip("onnxscript", reason="torch.export of the oldest torch fails on sizes that change")
    path, run, model = training
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "0")
    pixels, wanted = expected(model, path)
    argv = ["--model", str(run), "--format", "torch", "--output", str(tmp_path / "a.pt2"), "--verify", "2"]
    export.main([*argv, "--allow-unsafe-files", "--verify-images", str(path.parent / "image.png")])
    assert "on 1 images of --verify-images" in capsys.readouterr().out
    exported = ExportedDetector(str(tmp_path / "a.pt2"))
    assert exported.settings["classes"] == ["name 7", "name 3", "name 9"]
    assert (exported.settings["min_size"], exported.settings["max_size"]) == (64, 110)
    assert (exported.settings["channel_order"], exported.settings["detector"]) == ("RGB", "RetinaNet")
    assert exported.settings["score_threshold"] == 0.0 and exported.settings["max_detections"] == 20
    found = exported.predict(pixels)
    np.testing.assert_allclose(found.boxes, wanted.pred_boxes.tensor.numpy(), atol=0.01)


def test_what_the_yaml_keys_are(training):
    path, run, _ = training
    masks = "detectron2.modeling.roi_heads.MaskRCNNConvUpsampleHead"
    opts = ["dataloader.train.dataset.names=[coco_2017_train,nobody_knows]", f"+model.roi_heads.mask_head={masks}"]
    cfg, _ = read_lazy_detector(str(path), "w.pth", opts, "--model")
    assert (cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE) == ("w.pth", "cpu", "RetinaNet")
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.MODEL.MASK_ON and not cfg.MODEL.KEYPOINT_ON
    no_resize = ["dataloader.test.mapper.augmentations=[]"]
    cfg, _ = read_lazy_detector(str(path), "w.pth", no_resize, "--model")
    assert cfg.INPUT.MIN_SIZE_TEST == 0
    assert read_trained_detector(str(path), ["train.init_checkpoint=w.pth"], device="cuda").cfg.MODEL.DEVICE == "cuda"


@pytest.mark.parametrize(
    "opts, texts",
    [
        ([], ["toy.py", "train.init_checkpoint"]),
        (["MODEL.WEIGHTS", "w.pth"], ["MODEL.WEIGHTS", "KEY=VALUE", "train.init_checkpoint"]),
        (["train.init_checkpoint=w.pth", "train.device.x=1"], ["train.device.x=1"]),
        (
            ["dataloader.test.mapper.augmentations.0.short_edge_length=[64,80]"],
            ["dataloader.test.mapper.augmentations", "toy.py", "64"],
        ),
        (["~dataloader.test.mapper.image_format"], ["dataloader.test.mapper"]),
    ],
)
def test_what_cannot_be_used_is_one_message(training, opts, texts):
    with pytest.raises(UserError) as error:
        load_predictor(str(training[0]), opts)
    assert all(text in str(error.value) for text in texts)


def test_a_lazyconfig_is_no_teacher(training):
    with pytest.raises(UserError, match="--teacher .*config.yaml is a LazyConfig"):
        find_teacher(str(training[1]))


@pytest.mark.parametrize(
    "text, lazy",
    [
        ("model: {_target_: os.mkdir}", True),
        ("MODEL: {}", False),
        ("!!python/object/apply:os.mkdir [MARKER]", False),
        ("model: !!python/object/apply:os.mkdir [MARKER]", True),
        ("[1]", False),
        ("a: [", False),
    ],
)
def test_telling_a_lazyconfig_runs_nothing(text, lazy, tmp_path):
    (tmp_path / "a.yaml").write_text(text.replace("MARKER", str(tmp_path / "marker")))
    assert is_lazy_config(str(tmp_path / "a.yaml")) is lazy
    assert not (tmp_path / "marker").exists()
    assert not is_lazy_config(str(tmp_path / "nowhere.yaml"))
