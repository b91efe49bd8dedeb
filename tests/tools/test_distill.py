"""tools/distill.py on a toy teacher: the config that it makes, what it says, and a whole run."""

import json
import re
import subprocess
import sys

import programs
import pytest
import torch
import toy
import yaml
from detectron2.modeling import build_model
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mgd_det.checkpoint.safe_loading import load_torch_file
from mgd_det.cli import distill, train_net
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import plain_student_config
from mgd_det.data import CLASS_NAMES

SMALL = ["MODEL.WEIGHTS", "", "MODEL.MOBILENETS.NORM", "BN", "MODEL.MOBILENETS.WIDTH_MULT", "0.25"]
SMALL += ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0", "MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return toy.write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a finished training, of ten classes."""
    folder = tmp_path_factory.mktemp("teacher")
    cfg = toy.teacher_config(opts=["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"])
    (folder / "config.yaml").write_text(cfg.dump())
    toy.save_teacher(folder / "model_final.pth")
    return folder


@pytest.fixture
def program(capsys):
    """Runs the program in this process; returns (exit status, stdout, stderr)."""

    return lambda *argv, main=distill.main: (programs.exit_status(main, *argv), *capsys.readouterr())


def lines_of(output):
    """Key -> (value, reason) of the table that shows the config."""
    rows = [re.split(r"  +", line.strip()) for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if re.fullmatch(r"[A-Z]\w*(\.\w+)*", row[0])}


def test_the_config_is_shown_and_written(program, teacher, flags, tmp_path):
    argv = ["--teacher", teacher, "--student", "MobileNetV2", "--iterations", 90, "--batch", 4, *flags]
    status, out, err = program(*argv, "--output-dir", tmp_path, "--config-only", *SMALL, "SOLVER.WARMUP_ITERS", "2")
    assert status == 0, err
    assert not (tmp_path / "student.yaml").exists()  # nothing has run
    shown = lines_of(out)
    assert shown["SOLVER.BASE_LR"][0] == "0.0025" and "4/16" in shown["SOLVER.BASE_LR"][1]
    assert re.search(r"Learning rate: 0.0025 for 4 images.*0.01 for 16", out)
    assert shown["SOLVER.STEPS"][0] == "(60, 80)"
    assert shown["SOLVER.WARMUP_ITERS"] == ["2", "your override"]
    assert shown["MODEL.MGD.TEACHER.CONFIG_FILE"][0] == str(teacher / "config.yaml")
    assert all(len(row) == 2 and row[1] for row in shown.values()), shown  # each with its reason
    cfg, base = read_config(str(tmp_path / "config.yaml")), read_config("Base-RetinaNet.yaml")
    assert cfg.MODEL.MGD.STUDENT_BACKBONE == "build_retinanet_mobilenetv2_fpn_backbone"
    assert cfg.DATASETS.COCO_FOLDER.TRAIN_JSON == flags[1] and cfg.MODEL.RETINANET.NUM_CLASSES == 10
    differing = {key for key, value in leaves(cfg) if value != dict(leaves(base)).get(key)}
    assert differing == set(shown)


def test_a_light_student(program, teacher, flags, tmp_path):
    content = json.loads(open(flags[1]).read())
    content["categories"] = content["categories"][:4]
    (tmp_path / "four.json").write_text(json.dumps(content))
    argv = ["--teacher", teacher, "--student", "MobileNetV2", "--light", "--output-dir", tmp_path / "out"]
    data = ["--train-json", tmp_path / "four.json", "--train-images", flags[3]]
    status, out, err = program(*argv, *data, "--config-only", *SMALL, "MODEL.FPN.OUT_CHANNELS", "8")
    assert status == 0, err
    shown = lines_of(out)
    assert "--light" in shown["MODEL.META_ARCHITECTURE"][1]
    assert "4: " in out and "without its class layer" in out
    cfg = read_config(str(tmp_path / "out" / "config.yaml"))
    assert cfg.MODEL.META_ARCHITECTURE == "SeparableRetinaNet" and cfg.MODEL.RETINANET.NUM_CLASSES == 4
    assert cfg.MODEL.MGD.STUDENT_BACKBONE == "build_retinanet_mobilenetv2_separable_fpn_backbone"
    assert (cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.MGD.INHERIT) == (8, ["fpn", "head"])
    assert "depthwise" in str(build_model(plain_student_config(cfg)).head)


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value)  # which makes lists of tuples


def test_a_teacher_of_other_classes(program, teacher, flags, tmp_path):
    content = json.loads(open(flags[1]).read())
    content["categories"] = content["categories"][:4]
    (tmp_path / "four.json").write_text(json.dumps(content))
    argv = ["--teacher", teacher, "--student", "r18", "--output-dir", tmp_path / "out", "--config-only"]
    data = ["--train-json", tmp_path / "four.json", "--train-images", flags[3]]
    status, out, err = program(*argv, *data, *SMALL)
    assert status == 0, err
    assert re.search(r"10: .*not the data's.*\(4: .*class layer", out)
    assert lines_of(out)["MODEL.RETINANET.NUM_CLASSES"][0] == "4"
    assert lines_of(out)["DATASETS.TEST"][0] == "()"  # not the teacher's, whose classes are others
    status, _, err = program(*argv, *data, "--baseline", *SMALL)
    assert status == 1 and "--baseline" in err and "--val-json" in err


@pytest.mark.parametrize(
    "argv, texts",
    [
        (["--student", "mobilnetv2"], ["--student 'mobilnetv2'", "Did you mean mobilenetv2"]),
        (["--teacher", "COCO-Detection/retinanet_R_50_FPN_4x.yaml"], ["--teacher", "Did you mean", "_3x.yaml"]),
        (["--train-dataset", "cooc_2017_train"], ["cooc_2017_train", "Did you mean coco_2017_train"]),
        (["--train-json", "nowhere.json", "--train-images", "x"], ["nowhere.json"]),
        (["SOLVER.BASE_LRR", "1"], ["SOLVER.BASE_LRR"]),
    ],
)
def test_mistakes(program, tmp_path, argv, texts):
    usual = ["--teacher", "COCO-Detection/retinanet_R_50_FPN_3x.yaml", "--student", "mobilenetv2"]
    status, _, err = program(*usual, "--output-dir", tmp_path / "out", "--config-only", *argv)
    assert status == 1 and err.count("error: ") == 1 and "Traceback" not in err
    assert all(text in err for text in texts), err
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_under_torchrun_it_says_what_to_do(program, monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    argv = ["--teacher", "x.yaml", "--student", "r18", "--output-dir", tmp_path / "out"]
    status, _, err = program(*argv)
    assert status == 1 and "--config-only" in err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_with_the_student_alone_and_its_repetition_by_train_net(program, teacher, flags, tmp_path):
    out = tmp_path / "out"
    argv = ["--teacher", teacher, "--student", "mobilenetv2", "--iterations", 4, "--batch", 2, "--output-dir", out]
    status, printed, err = program(*argv, *flags, "--baseline", *SMALL)
    assert status == 0, err[-3000:]
    assert "The student starts from these tensors of its teacher" in (out / "log.txt").read_text()
    content = json.loads((out / "comparison.json").read_text())
    rows = {row["detector"]: row for row in content["rows"]}
    assert list(rows) == ["teacher", "student alone", "student distilled"]
    folders = {"teacher": out / "teacher", "student alone": out / "alone", "student distilled": out}
    for name, folder in folders.items():
        expected = average_precision(flags[5], folder / "inference" / "coco_instances_results.json")
        assert [rows[name][key] for key in ("AP", "AP50", "AP75")] == pytest.approx(expected, abs=1e-3), name
    student = build_model(plain_student_config(read_config(str(out / "config.yaml"))))
    count = sum(p.numel() for p in student.parameters())
    assert rows["student alone"]["parameters"] == rows["student distilled"]["parameters"] == count
    assert rows["teacher"]["parameters"] > 10 * count and rows["teacher"]["training seconds"] is None
    assert all(rows[name]["training seconds"] > 0 for name in ("student alone", "student distilled"))
    table = (out / "comparison.md").read_text()
    assert table in printed and f"| {count / 1e6:.2f} " in table

    report = (out / "report.html").read_text()  # the one after the comparison
    assert all(f">{name}<" in report for name in ("teacher", "alone", "distilled"))

    assert [category["name"] for category in json.loads((out / "categories.json").read_text())] == list(CLASS_NAMES)

    # The student alone: no teacher, the same seed, and a log of its own.
    plain = yaml.safe_load((out / "alone" / "config.yaml").read_text())
    assert plain["MODEL"]["BACKBONE"]["NAME"] == "build_retinanet_mobilenetv2_fpn_backbone"
    assert plain["SEED"] == 1 and plain["SOLVER"]["MAX_ITER"] == 4
    assert "loss_pkd_p3" in (out / "metrics.json").read_text()
    assert "loss_pkd" not in (out / "alone" / "metrics.json").read_text()
    log = (out / "log.txt").read_text()
    assert str(out / "alone") not in log and log.count("Starting training from iteration") == 1

    status, _, err = program(
        "--config-file", out / "config.yaml", "OUTPUT_DIR", tmp_path / "again", main=train_net.main
    )
    assert status == 0, err[-3000:]
    assert losses(tmp_path / "again") == losses(out) and len(losses(out)) > 5
    first, again = (load_torch_file(str(path / "model_final.pth"))["model"] for path in (out, tmp_path / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def average_precision(json_file, results):
    truth = COCO(json_file)
    evaluation = COCOeval(truth, truth.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [100 * score for score in evaluation.stats[:3]]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(row["iteration"], key, row[key]) for row in rows for key in sorted(row) if "loss" in key]


def test_the_teachers_folder_is_no_output_folder(program, teacher, flags):
    before = (teacher / "config.yaml").read_text()
    argv = ["--teacher", teacher, "--student", "resnet18", *flags, "--config-only", "--output-dir"]
    status, _, err = program(*argv, teacher, *SMALL)
    assert status == 1 and "--output-dir is the folder of the teacher's config.yaml" in err
    assert (teacher / "config.yaml").read_text() == before


def test_flags_behind_the_overrides_are_named(program, teacher, flags, tmp_path):
    argv = ["--teacher", teacher, "--student", "resnet18", *flags, "--output-dir", tmp_path, *SMALL, "--config-only"]
    status, _, err = program(*argv)
    assert status == 1 and "--config-only stands behind the overrides" in err and not any(tmp_path.iterdir())


def test_the_config_of_a_training_that_runs_stays(program, teacher, flags, tmp_path):
    """Its folder is locked by its process, which this test's child stands in for."""
    lock = (
        f"import time; from mgd_det.files.folder_lock import lock_folder; lock_folder({str(tmp_path)!r}, 'OUTPUT_DIR')"
    )
    code = f"{lock}; print('locked', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout.readline() == "locked\n"
            (tmp_path / "config.yaml").write_text("of the training that runs")
            argv = ["--teacher", teacher, "--student", "resnet18", *flags, "--output-dir", tmp_path, "--config-only"]
            status, _, err = program(*argv, *SMALL)
        finally:
            child.kill()
    assert status == 1 and f"--output-dir {tmp_path} is in use by another run, process {child.pid}" in err
    assert (tmp_path / "config.yaml").read_text() == "of the training that runs"
