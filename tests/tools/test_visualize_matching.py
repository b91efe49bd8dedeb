"""tools/visualize_matching.py on a toy teacher and student."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from detectron2.modeling import build_model
from matplotlib.image import imread

from mgd_det.cli import visualize_matching as program
from mgd_det.data import register_coco_folder
from mgd_det.modeling import find_distillation

SCRIPT = Path(__file__).parents[2] / "tools" / "visualize_matching.py"
POSITIONS = {"res2": (64, 128), "res3": (128, 256), "res4": (256, 512), "res5": (512, 1024)}
DATASET = "visualize_matching_toy"


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with the smallest fashion_scenes_tiny."""
    root = tmp_path_factory.mktemp("datasets")
    toy.write_scenes(root / "fashion_scenes" / "tiny", train=8, val=1)
    return root


@pytest.fixture(scope="module")
def checkpoint(teacher, tmp_path_factory):
    """A checkpoint of a student, matched by index."""
    torch.manual_seed(3)
    detector = build_model(toy.distilled_config(teacher))
    distiller = find_distillation(detector).distiller
    for p in distiller.positions:
        groups = torch.arange(p.teacher_channels).view(p.student_channels, -1)
        margin = torch.full((p.teacher_channels,), -0.2)
        distiller.set_matching(p, groups=groups, margin=margin, mean_square=torch.ones(()))
    hooks = {"MatchingUpdate": {"updates": 1, **distiller.distillation_state()}}
    path = tmp_path_factory.mktemp("checkpoint") / "model_0000009.pth"
    torch.save({"model": detector.state_dict(), "trainer": {"iteration": 9, "hooks": hooks}, "iteration": 9}, path)
    return path


def opts(teacher, dataset, output_dir):
    run = ["DATASETS.TRAIN", f"('{dataset}',)", "OUTPUT_DIR", str(output_dir), "MODEL.DEVICE", "cpu"]
    run += ["SOLVER.IMS_PER_BATCH", "4", "DATALOADER.NUM_WORKERS", "0"]
    return [*toy.plain_opts(), *toy.distilled_opts(teacher), *run]


def rows_of(text):
    """The printed table: position -> its other cells."""
    return {m.group(1): m.group(2).split() for m in re.finditer(r"^(res\d)\s+(.*)$", text, re.MULTILINE)}


@pytest.fixture
def toy_dataset(datasets):
    folder = datasets / "fashion_scenes" / "tiny"
    register_coco_folder(DATASET, folder / "annotations" / "instances_train.json", folder / "images" / "train")
    return DATASET


def run_in_process(*argv):
    program.main(["--config-file", toy.RETINANET, *map(str, argv)])


@pytest.mark.slow
def test_end_to_end(teacher, datasets, checkpoint, tmp_path):
    command = [sys.executable, str(SCRIPT), "--config-file", toy.RETINANET, "--checkpoint", str(checkpoint)]
    command += ["--batches", "2", "--channels", "3", "--output-dir", str(tmp_path / "pictures")]
    command += opts(teacher, "fashion_scenes_tiny_train", tmp_path / "run")
    env = {**os.environ, "DETECTRON2_DATASETS": str(datasets), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "model_0000009.pth. Measured on 8 images of fashion_scenes_tiny_train" in done.stdout
    assert "measuring: 100%" in done.stderr

    rows = rows_of(done.stdout)
    assert list(rows) == list(POSITIONS)
    for name, (students, teachers) in POSITIONS.items():
        cells = rows[name]
        assert [int(cell) for cell in cells[:3]] == [students, teachers, 2]
        random, former, optimum = map(float, cells[3:6])
        assert 0 < optimum < former - 0.2 and abs(former - random) < 0.5  # matched by index: no better than random
        assert cells[6] == "0"
    pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert pictures == ["channels_res2.png", "channels_res3.png", "channels_res4.png", "channels_res5.png"] + [
        "matching.png"
    ]
    for picture in pictures:
        assert imread(tmp_path / "pictures" / picture)[..., :3].std() > 0.05, f"{picture} is blank"
    # 3 channels; image, student, 2 members, AMP and target.
    assert imread(tmp_path / "pictures" / "channels_res4.png").shape[:2] == (566, 990)
    assert not (tmp_path / "run").exists(), "the training's own folder is not touched"


@pytest.mark.slow
def test_untrained_then_its_own_optimum(teacher, toy_dataset, tmp_path, capsys, monkeypatch):
    """Where there is no checkpoint, the student is untrained; with its optimum saved, that is what is shown."""
    run_opts = opts(teacher, toy_dataset, tmp_path / "run") + ["MODEL.MGD.POSITIONS", "['res3']", "SEED", "5"]
    argv = ["--batches", "1", "--channels", "2", "--output-dir", tmp_path / "pictures"]
    torch.manual_seed(0)
    saved = {}
    original = program.matched_positions

    def keep(measurement, distiller, loaded):
        saved["matched"], saved["state"] = original(measurement, distiller, loaded), distiller.distillation_state()
        return saved["matched"]

    monkeypatch.setattr(program, "matched_positions", keep)
    original_load = program.load_student

    def keep_detector(cfg, detector, backbone, checkpoint):
        saved["model"] = detector.state_dict()
        return original_load(cfg, detector, backbone, checkpoint)

    monkeypatch.setattr(program, "load_student", keep_detector)
    run_in_process(*argv, *run_opts)
    text = capsys.readouterr().out
    assert "no checkpoint" in text and "untrained student" in text
    assert rows_of(text)["res3"][4] == "-"
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["channels_res3.png", "matching.png"]

    # Exactly the groups that the training's own measurement puts in force.
    assert torch.equal(saved["state"]["matchings"]["res3"]["groups"], saved["matched"][0].groups)
    assert (saved["state"]["matchings"]["res3"]["margin"] < 0).any()

    (tmp_path / "run").mkdir()
    hooks = {"MatchingUpdate": {"updates": 1, **saved["state"]}}
    torch.save({"model": saved["model"], "trainer": {"hooks": hooks}}, tmp_path / "run" / "model_0000001.pth")
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000001.pth")
    run_in_process(*argv, *run_opts)
    text = capsys.readouterr().out
    cells = rows_of(text)["res3"]
    assert "Student: model_0000001.pth" in text
    assert cells[4] == cells[5]
    assert saved["matched"][0].moved == 0


@pytest.mark.slow
def test_checkpoint_of_a_training_without_distillation(teacher, toy_dataset, tmp_path, capsys):
    path = tmp_path / "plain.pth"
    torch.save({"model": build_model(toy.plain_config()).state_dict()}, path)
    argv = ["--checkpoint", path, "--batches", "1", "--output-dir", tmp_path / "pictures", "--position", "res2"]
    run_in_process(*argv, *opts(teacher, toy_dataset, tmp_path / "run"))
    text = capsys.readouterr().out
    assert "has no matching" in text
    assert all(cells[4] == "-" for cells in rows_of(text).values())
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == ["channels_res2.png", "matching.png"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--position", "res9"], "--position 'res9' .*res2, res3, res4, res5"),
        (["--image", "8"], "--image is 8, but the training set has images 0 to 7"),
        (["--checkpoint", "nothing.pth"], "there is no such file"),
        (["DATASETS.TRAIN", "('nothing',)"], "no data set named 'nothing'"),
        (["MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"], "has no distillation"),
    ],
)
def test_mistakes(teacher, toy_dataset, tmp_path, capsys, flags, message):
    given, overrides = (flags, []) if flags[0].startswith("-") else ([], flags)
    argv = ["--output-dir", tmp_path, *given, *opts(teacher, toy_dataset, tmp_path / "run"), *overrides]
    with pytest.raises(SystemExit) as error:
        run_in_process(*argv)
    assert error.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


def test_an_output_folder_that_cannot_be_written_ends_it_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        run_in_process("--output-dir", tmp_path / "file" / "pictures", "DATASETS.TRAIN", "('nothing',)")
    assert error.value.code == 1
    message = capsys.readouterr().err
    assert f"--output-dir {tmp_path}/file/pictures" in message and "nothing" not in message


@pytest.mark.slow
def test_channels_are_limited(teacher, toy_dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program, "MOST_CHANNELS", 3)
    argv = ["--channels", "9999", "--batches", "1", "--output-dir", tmp_path, "--position", "res2"]
    run_in_process(*argv, *opts(teacher, toy_dataset, tmp_path / "run"))
    text = capsys.readouterr().out
    assert "--channels is 9999" in text and "3" in text
    assert imread(tmp_path / "channels_res2.png").shape[0] == round(100 * (1.62 * 3 + 0.8))
