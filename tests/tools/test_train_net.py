"""tools/train_net.py as a user runs it: what it leaves behind, and what it says of mistakes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import programs
import pytest
import torch
import toy
from saved_state import equal
from toy import RCNN, RETINANET

from mgd_det.cli.yaml_setup import argument_parser

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "train_net.py"
SHORT = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "DATALOADER.NUM_WORKERS", "0"]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A COCO folder with names and ids of its own, ids neither from 1 nor contiguous."""
    root = tmp_path_factory.mktemp("folder") / "toy"
    flags = toy.write_scenes(root)
    for split in ("train", "val"):
        path = root / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        ids = {1: 7, 2: 90, 3: 12, 4: 55}
        content["categories"] = [{"id": ids[i], "name": f"shape {i}"} for i in ids]
        for annotation in content["annotations"]:
            annotation["category_id"] = ids[annotation["category_id"]]
        path.write_text(json.dumps(content))
    return flags


@pytest.fixture
def train_net(capsys):
    """Runs the program in this process; returns (exit status, stderr)."""
    main = programs.load("tools/train_net.py").main
    return lambda *argv: (programs.exit_status(main, *argv), capsys.readouterr().err)


def command(*argv, code=None):
    return [sys.executable, *([str(SCRIPT)] if code is None else ["-c", code]), *(str(x) for x in argv)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def run_process(*argv, code=None):
    result = subprocess.run(
        command(*argv, code=code), capture_output=True, text=True, env=environment(), timeout=240, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def distil(flags, teacher, output, iterations, *more, resume=False):
    opts = [*toy.plain_opts(), *toy.distilled_opts(teacher), *SHORT, "SOLVER.MAX_ITER", iterations]
    head = ["--config-file", RETINANET, *flags, *(["--resume"] if resume else [])]
    return [*head, *opts, "OUTPUT_DIR", output, *more]


# What a plain Detectron2 user does with the result. It prints the detections on the images that it is given.
PLAIN_DETECTRON2 = """
import json, sys
import cv2, torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
cfg = get_cfg()
cfg.merge_from_file(sys.argv[1])
model = build_model(cfg).eval()
weights = torch.load(cfg.MODEL.WEIGHTS)["model"]
assert list(weights) == list(model.state_dict()), "other keys"
class Checkpointer(DetectionCheckpointer):
    def _log_incompatible_keys(self, incompatible):
        raise SystemExit(str(incompatible))
    def _load_model(self, checkpoint):
        incompatible = super()._load_model(checkpoint)
        return incompatible if any(incompatible) else None
Checkpointer(model).load(cfg.MODEL.WEIGHTS)
assert "mgd_det" not in sys.modules
boxes = []
for path in sys.argv[2:]:
    image = torch.from_numpy(cv2.imread(path).transpose(2, 0, 1).copy())
    with torch.no_grad():
        instances = model([{"image": image}])[0]["instances"]
    boxes.append([instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()])
print("RESULT" + json.dumps(boxes))
"""


@pytest.mark.slow
def test_a_distilled_student_is_a_plain_detectron2_detector(flags, teacher, tmp_path):
    more = ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "REPORT.ENABLED", "True"]
    output = run_process(*distil(flags, teacher, tmp_path, 3, *more))
    assert output.count("running on the CPU") == 1
    assert "Warning:" not in output  # Detectron2's import and torch.meshgrid give some
    assert "loss_mgd_res5" in output and "Matching update at iteration 2 took" in output
    assert "'shape 1'" in output or "shape 1" in output  # classes by the names of the json

    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "shape 1" in report and "res5" in report and report.count("data:image/png") >= 2
    assert "student.yaml" in (tmp_path / "model_card.md").read_text(encoding="utf-8")
    assert (tmp_path / "matching.npz").exists()

    images = sorted(Path(flags[-1]).glob("*.png"))[:3]
    printed = run_process(tmp_path / "student.yaml", *images, code=PLAIN_DETECTRON2)
    plain = json.loads(printed.split("RESULT")[1].splitlines()[0])
    assert len(plain[0][1]) > 0

    # The same images through the distilled model of this project.
    from detectron2.modeling import build_model
    from detectron2.utils.file_io import PathManager

    from mgd_det.checkpoint import WeightsCheckpointer

    cfg = toy.distilled_config(teacher, opts=["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0])
    cfg.MODEL.RETINANET.NUM_CLASSES = 4
    model = build_model(cfg).eval()
    WeightsCheckpointer(model).load(str(tmp_path / "model_final.pth"))
    import cv2

    assert PathManager.isfile(str(tmp_path / "student.yaml"))
    for path, (boxes, scores, classes) in zip(images, plain):
        image = torch.from_numpy(cv2.imread(str(path)).transpose(2, 0, 1).copy())
        with torch.no_grad():
            instances = model([{"image": image}])[0]["instances"]
        torch.testing.assert_close(instances.pred_boxes.tensor, torch.tensor(boxes))
        torch.testing.assert_close(instances.scores, torch.tensor(scores))
        assert instances.pred_classes.tolist() == classes


@pytest.mark.slow
def test_killed_training_resumes_from_the_last_checkpoint(flags, teacher, tmp_path):
    arguments = distil(flags, teacher, tmp_path, 200, "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
    arguments = [a for a in arguments if a not in flags[4:]]
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.time() + 120
    while not (tmp_path / "model_0000005.pth").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The one that was being written may be torn: resuming must start from the last that was named.
    name = (tmp_path / "last_checkpoint").read_text()
    checkpoint = torch.load(tmp_path / name)
    done = checkpoint["iteration"] + 1

    from mgd_det.cli.yaml_setup import setup
    from mgd_det.engine import MatchingUpdate, Trainer

    resumed_arguments = [*arguments, "SOLVER.MAX_ITER", done + 1]
    copy = tmp_path.with_name(tmp_path.name + "_copy")  # this process locks its output folder until it ends
    shutil.copytree(tmp_path, copy)
    args = argument_parser().parse_args([str(a) for a in ["--resume", *resumed_arguments, "OUTPUT_DIR", copy]])
    trainer = Trainer(setup(args))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == done
    hook = next(h for h in trainer._hooks if isinstance(h, MatchingUpdate))
    saved = checkpoint["trainer"]
    assert equal(hook.state_dict(), saved["hooks"]["MatchingUpdate"])
    assert equal(trainer.optimizer.state_dict(), saved["_trainer"]["optimizer"])
    assert equal(trainer.model.state_dict(), checkpoint["model"])
    assert equal(trainer.scheduler.state_dict(), saved["hooks"]["LRScheduler"])

    output = run_process("--resume", *resumed_arguments)
    assert f"Starting training from iteration {done}" in output
    assert f"Matching update at iteration {done}:" not in output
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == done


@pytest.mark.slow
def test_the_teacher_is_scored_by_the_same_evaluator(flags, tmp_path, train_net):
    weights = toy.save_teacher(tmp_path / "teacher.pth")  # of ten classes
    opts = [*toy.plain_opts(), *toy.distilled_opts(weights), *SHORT, "OUTPUT_DIR", tmp_path / "out"]
    opts += ["MODEL.MGD.TEACHER.OPTS", str([*toy.teacher_opts(), "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0])]
    ten_classes = toy.write_scenes(tmp_path / "scenes")
    output = run_process("--config-file", RETINANET, *ten_classes[4:], "--eval-teacher", *opts)
    assert "Evaluation results for bbox" in output and "copypaste: AP,AP50,AP75" in output
    assert (tmp_path / "out" / "teacher" / "inference" / "coco_instances_results.json").exists()
    scores = json.loads((tmp_path / "out" / "teacher" / "scores.json").read_text())  # which the report reads
    assert 0 <= scores["bbox/AP"] <= 100 and "bbox/AP50" in scores

    outcome = train_net("--config-file", RETINANET, *flags[4:], "--eval-teacher", *opts)
    check_error(outcome, "coco_folder_val has 4 classes, but the RetinaNet of the config has 10")


@pytest.mark.slow
def test_instance_segmentation_trains_distils_and_evaluates_masks(flags, tmp_path):
    weights = toy.save_teacher(tmp_path / "teacher.pth", RCNN)
    opts = [*toy.plain_opts(RCNN, "mobilenetv2"), *toy.distilled_opts(weights, RCNN, "mobilenetv2"), *SHORT]
    output = run_process("--config-file", RCNN, *flags, *opts, "SOLVER.MAX_ITER", 3, "OUTPUT_DIR", tmp_path / "out")
    assert "loss_mask" in output and "loss_mgd_res2" in output
    assert "Evaluation results for segm" in output


@pytest.mark.slow
def test_eval_only_needs_no_teacher(flags, teacher, tmp_path, train_net):
    model = toy.plain_config()
    model.MODEL.RETINANET.NUM_CLASSES = 4
    from detectron2.modeling import build_model

    torch.save({"model": build_model(model).state_dict()}, tmp_path / "student.pth")
    arguments = distil(flags, "nowhere.pth", tmp_path, 1, "MODEL.WEIGHTS", tmp_path / "student.pth")
    status, err = train_net("--eval-only", *arguments)
    assert status == 0, err
    assert (tmp_path / "inference" / "coco_instances_results.json").exists()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config-file", "COCO-Detection/retinanet_R_18_FPN_mgd_R50_2x.yaml"], "Did you mean .*mgd_R50_1x"),
        (["--config-file", RETINANET, "MODEL.NO_SUCH_KEY", "1"], "MODEL.NO_SUCH_KEY"),
        (["--config-file", RETINANET, "MODEL.MASK_ON"], "MODEL.MASK_ON"),
        (["--config-file", RETINANET, "--train-json", "a.json"], "--train-json and --train-images go together"),
        (["--config-file", RETINANET, "--train-json", "a.json", "--train-images", "b"], "a.json"),
        (["--config-file", RETINANET, "DATASETS.TRAIN", "('cooc_2017_train',)"], "cooc_2017_train.*coco_2017_train"),
        (["--config-file", RETINANET, "--eval-teacher"], "--eval-teacher: .* has no teacher"),
        (["--config-file", RETINANET, "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"], "DATASETS.TRAIN is empty"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line(train_net, tmp_path, argv, message):
    check_error(train_net(*argv, *([] if argv[-1] == "MODEL.MASK_ON" else ["OUTPUT_DIR", tmp_path])), message)


def check_error(outcome, message):
    status, err = outcome
    assert status == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert re.search(message, err, re.DOTALL), err


def test_data_that_is_not_there(flags, teacher, tmp_path, train_net):
    missing_images = [*flags[:3], str(tmp_path), *flags[4:]]
    check_error(train_net(*distil(missing_images, teacher, tmp_path / "a", 1)), "16 .*000000000001.png")
    outcome = train_net("--config-file", "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.yaml", "OUTPUT_DIR", tmp_path)
    check_error(outcome, "coco_2017_train.*DETECTRON2_DATASETS")


def test_more_classes_in_the_data_than_in_the_config(flags, teacher, tmp_path, train_net):
    from mgd_det.data import register_coco_folder

    register_coco_folder("four_shapes", flags[1], flags[3])
    arguments = distil([], teacher, tmp_path, 1, "DATASETS.TRAIN", "('four_shapes',)", "DATASETS.TEST", "()")
    check_error(train_net(*arguments, "MODEL.RETINANET.NUM_CLASSES", 3), "four_shapes has 4 classes.*has 3.*to 4")


@pytest.mark.slow
def test_teachers_that_are_not_there(flags, tmp_path, train_net):
    check_error(train_net(*distil(flags, "nowhere.pth", tmp_path, 1)), "nowhere.pth: there is no such file")
    outcome = train_net(*distil(flags, "x", tmp_path, 1, "MODEL.MGD.TEACHER.CONFIG_FILE", "retinanet.yaml"))
    check_error(outcome, "MODEL.MGD.TEACHER.CONFIG_FILE 'retinanet.yaml' is neither")


@pytest.mark.slow
def test_weights_of_another_kind(flags, teacher, tmp_path, train_net):
    torch.save({"model": {"classifier.weight": torch.zeros(3)}}, tmp_path / "foreign.pth")
    (tmp_path / "corrupt.pth").write_bytes(b"\x00not a checkpoint")
    for name, message in (("foreign", "fit none of the model's"), ("corrupt", "cannot be read as a checkpoint")):
        arguments = distil(flags, teacher, tmp_path / "out", 1, "MODEL.WEIGHTS", tmp_path / f"{name}.pth")
        check_error(train_net(*arguments), message)


@pytest.mark.slow
def test_a_corrupt_checkpoint_on_resume_names_the_others_and_loses_nothing(flags, teacher, tmp_path, train_net):
    for name, content in (
        ("model_0000001.pth", b"good"),
        ("model_0000003.pth", b"torn"),
        ("last_checkpoint", b"model_0000003.pth"),
    ):
        (tmp_path / name).write_bytes(content)
    outcome = train_net(*distil(flags, teacher, tmp_path, 9, resume=True))
    check_error(outcome, "model_0000003.pth: cannot be read.*last_checkpoint.*model_0000001.pth")
    assert (tmp_path / "model_0000001.pth").read_bytes() == b"good"
    assert (tmp_path / "model_0000003.pth").read_bytes() == b"torn"


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(flags, teacher, tmp_path, train_net):
    arguments = distil(flags, teacher, tmp_path, 9, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.BASE_LR", "1e18")
    outcome = train_net(*arguments, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    check_error(outcome, "infinite or NaN at iteration=.*The last checkpoint is .*Lower SOLVER.BASE_LR")
    assert not (tmp_path / "model_final.pth").exists()


def test_an_output_folder_that_cannot_be_written(flags, teacher, tmp_path, train_net):
    (tmp_path / "file").write_text("")
    check_error(
        train_net(*distil(flags, teacher, tmp_path / "file" / "out", 1)), "OUTPUT_DIR .*file/out cannot be written"
    )


@pytest.mark.slow
def test_the_program_itself_ends_with_a_message_and_status_1():
    result = subprocess.run(
        command("--num-gpus", 2, "--config-file", "no.yaml"),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    check_error((result.returncode, result.stderr), "--config-file 'no.yaml' is neither")
    assert "there is no GPU: one process on the CPU" in result.stderr
    assert "Warning" not in result.stderr  # Detectron2's import gives some
