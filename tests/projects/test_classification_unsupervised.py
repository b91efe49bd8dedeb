"""projects/Classification: the unsupervised study, a pre-training by MoCo-v2 and a linear evaluation of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accuracy_study.results import read_results
from accuracy_study.study import read_study
from classification.results import Accuracy
from classification.training import overridden, train_once
from classification.views import grey_view
from detectron2.config import instantiate
from PIL import Image
from toy_images import write_photos

from mgd_det.errors import UserError

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "projects" / "Classification"
CONFIGS = PROJECT / "configs" / "fashion"
STUDY = PROJECT / "studies" / "fashion_moco.yaml"


def program(path: Path):
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------ two stages
def toy(name: str, photos: Path, **overrides):
    """A config of two steps with narrow networks, on ten photos."""
    values = {"train.max_iter": 2, "dataloader.train.total_batch_size": 4, "model.backbone.width": 8}
    for split in ("train", "test"):
        values |= {f"dataloader.{split}.dataset.root": str(photos), f"dataloader.{split}.dataset.images": 10}
    if "moco" in name:
        values |= {"model.key_backbone.width": 8, "model.queue_size": 8}
    return overridden(str(CONFIGS / name), {**values, **overrides})


def weights(folder: Path) -> dict:
    content = torch.load(folder / "model_final.pth", weights_only=False)["model"]
    return {name: torch.as_tensor(value) for name, value in content.items()}


@pytest.mark.slow
def test_the_linear_evaluation_scores_the_backbone_learned_and_leaves_it_as_it_is(tmp_path):
    pixels = write_photos(tmp_path, 10)
    linear = toy("linear_R18.py", tmp_path)
    scores = train_once(toy("moco_R18.py", tmp_path), 1, tmp_path / "run", linear)
    learned, scored = weights(tmp_path / "run"), weights(tmp_path / "run" / "linear")
    names = [name for name in scored if name.startswith("backbone.")]
    assert len(names) > 60
    assert [name for name in names if not torch.equal(scored[name], learned[name])] == []
    # Neither the start of another training nor the key encoder would pass.
    torch.manual_seed(1)
    random = instantiate(linear.model)
    conv = "stem.conv1.weight"
    assert not torch.equal(learned[f"backbone.{conv}"], random.state_dict()[f"backbone.{conv}"])
    assert not torch.equal(learned[f"backbone.{conv}"], learned[f"key_backbone.{conv}"])
    assert scored["linear.bias"].abs().sum() > 0  # it starts at zero

    random.load_state_dict(scored)
    photos = torch.nn.functional.interpolate(torch.from_numpy(pixels)[:, None].float(), size=(32, 32), mode="bilinear")
    images = photos.round().to(torch.uint8).expand(-1, 3, -1, -1)
    with torch.no_grad():
        logits = torch.stack([x["logits"] for x in random.eval()([{"image": image} for image in images])])
    assert scores["top1"] == pytest.approx(100 * np.mean(logits.argmax(dim=1).numpy() == np.arange(10)))
    assert scores["cpu_seconds"] > 0


def test_a_linear_evaluation_of_another_backbone_is_one_message(tmp_path):
    write_photos(tmp_path, 10)
    linear = toy("linear_R18.py", tmp_path, **{"model.backbone.width": 16})
    cfg = toy("moco_R18.py", tmp_path, **{"train.max_iter": 1})
    with pytest.raises(UserError, match=r"model\.backbone .*\(16, 3, 7, 7\).*\(8, 3, 7, 7\)"):
        train_once(cfg, 1, tmp_path / "run", linear)


def test_a_training_without_labels_has_no_score_without_a_linear_evaluation(tmp_path):
    write_photos(tmp_path, 10)
    cfg = toy("moco_R18.py", tmp_path, **{"train.max_iter": 1})
    assert set(train_once(cfg, 1, tmp_path / "run")) == {"cpu_seconds"}


# ------------------------------------------------------------------ the study
class Trainings:
    """Stands in for train_once: what it was called with, and files for the teacher."""

    def __init__(self) -> None:
        self.done = []

    def __call__(self, cfg, seed: int, folder: Path, linear=None) -> dict:
        folder.mkdir(parents=True)
        if folder.name.startswith("teacher"):
            (folder / "model_final.pth").write_bytes(b"weights")
            self.done.append((folder.name, seed))
            return {"cpu_seconds": 1.0}
        teacher = cfg.model.backbone.teacher.weights if "student" in cfg.model.backbone else None
        scored = linear.train.max_iter if linear else None
        self.done.append((folder.parent.name, seed, teacher, cfg.train.init_checkpoint, scored))
        return {"top1": 50.0, "top5": 90.0, "cpu_seconds": 1.0}


def run_study(monkeypatch, tmp_path, study: Path, *flags: str) -> Trainings:
    monkeypatch.chdir(ROOT)
    module, trainings, threads = program(PROJECT / "study.py"), Trainings(), torch.get_num_threads()
    monkeypatch.setattr(module, "train_once", trainings)
    files = ["--output-dir", str(tmp_path / "output"), "--results", str(tmp_path / "toy.csv")]
    try:
        module.run(module.parse_args([str(study), *files, *flags]))
    finally:
        torch.set_num_threads(threads)
    return trainings


def test_rows_of_the_study_come_from_the_linear_evaluation(monkeypatch, tmp_path):
    trainings = run_study(monkeypatch, tmp_path, STUDY, "--seeds", "1")
    teacher = str(tmp_path / "output" / "teacher_moco_R18_wide" / "model_final.pth")
    steps = 2 * 5120 // 64
    assert trainings.done == [
        ("teacher_moco_R18_wide", 0),
        ("alone", 1, None, "", steps),
        ("mgd", 1, teacher, "", steps),
        ("mgd_random", 1, teacher, "", steps),
        ("adapter", 1, teacher, "", steps),
        ("untrained", 1, None, "", None),
        ("teacher", 1, None, teacher, None),
    ]
    rows = {row.arm: row for row in read_results(tmp_path / "toy.csv", Accuracy)}
    assert {row.evaluation_set for row in rows.values()} == {"fashion_mnist_test_2000"}
    assert {name: row.iterations for name, row in rows.items() if row.iterations != 2 * steps} == {
        "untrained": steps,
        "teacher": steps,
    }
    assert {name for name, row in rows.items() if row.teacher} == {"mgd", "mgd_random", "adapter", "teacher"}
    assert run_study(monkeypatch, tmp_path, STUDY, "--seeds", "1").done == []


def test_arms_of_the_study_differ_in_what_they_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_study(str(STUDY))
    found = {arm.name: overridden(arm.config, arm.overrides) for arm in study.arms}
    backbones = {name: found[name].model.backbone for name in ("mgd", "mgd_random", "adapter")}
    assert {node.get("matchings", "solved") for node in backbones.values()} == {"solved", "random", "adapter"}
    linear = overridden(study.linear, {}).model.backbone
    for node in (found["alone"].model.backbone, *(node.student for node in backbones.values())):
        assert (node.depth, node.width) == (linear.depth, linear.width) and linear.freeze_at == 5
    teacher = overridden(study.teacher, {})
    assert found["teacher"].train.init_checkpoint == f"{teacher.train.output_dir}/model_final.pth"
    for node in (found["teacher"].model.backbone, backbones["mgd"].teacher.network):
        assert (node.depth, node.width) == (teacher.model.backbone.depth, teacher.model.backbone.width)
    assert all(cfg.model.queue_size % cfg.dataloader.train.total_batch_size == 0 for cfg in (teacher, found["mgd"]))


@pytest.fixture
def study_with(tmp_path):
    def write(**changes) -> Path:
        content = {**yaml.safe_load(STUDY.read_text()), **changes}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}))
        return tmp_path / "study.yaml"

    return write


def test_an_arm_without_a_score_is_one_message(monkeypatch, tmp_path, study_with):
    with pytest.raises(UserError, match="'alone'.*moco_R18.py.*linear"):
        run_study(monkeypatch, tmp_path, study_with(linear=None))


def test_a_linear_that_is_no_path_is_one_message(study_with):
    with pytest.raises(UserError, match="linear is 3"):
        read_study(str(study_with(linear=3)))


def test_the_study_of_detectors_refuses_what_it_would_not_read(monkeypatch, tmp_path, study_with):
    run = program(ROOT / "projects" / "AccuracyStudy" / "run.py")
    monkeypatch.setattr(run.signal, "signal", lambda *args: None)
    with pytest.raises(UserError, match="linear.*linear_R18.py"):
        run.run(run.parse_args([str(study_with(teacher=None)), "--output-dir", str(tmp_path / "output")]))


# ------------------------------------------------------------------ views
def test_a_view_is_a_crop_of_another_brightness_or_its_mirror_image():
    ramp = Image.fromarray(np.tile(np.arange(28, dtype=np.uint8) * 9, (28, 1))).convert("RGB")
    whole = np.asarray(ramp.resize((32, 32), Image.Resampling.BILINEAR))
    torch.manual_seed(0)
    seen = {np.asarray(grey_view(32, least=1.0, jitter=0.0)(ramp)).tobytes() for _ in range(20)}
    assert seen == {whole.tobytes(), whole[:, ::-1].tobytes()}
    spans = [np.ptp(np.asarray(grey_view(32, least=0.2, jitter=0.0)(ramp)).astype(int)) for _ in range(60)]
    # A crop of a fifth of the area and of an aspect of 3/4 has a width of 0.387, and 9 for each of its columns.
    assert 9 * (28 * 0.387 - 2) <= min(spans) < 150 < max(spans)
    flat = Image.new("RGB", (28, 28), (100, 100, 100))
    shades = [int(np.asarray(grey_view(32, jitter=0.4)(flat))[0, 0, 0]) for _ in range(60)]
    assert 59 <= min(shades) < 80 and 120 < max(shades) <= 140 and shades.count(100) > 3
