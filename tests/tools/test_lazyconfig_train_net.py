"""tools/lazyconfig_train_net.py as a user runs it, with a shipped LazyConfig made small."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
import toy
from detectron2.config import LazyConfig, instantiate

from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES

SCRIPT = Path(__file__).parents[2] / "tools" / "lazyconfig_train_net.py"

# One of the model zoo's configs, small and for small images.
TOY_CONFIG = """
from detectron2.layers import ShapeSpec
from mgd_det import model_zoo

_cfg = model_zoo.get_config("COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py")
model, dataloader, optimizer = _cfg.model, _cfg.dataloader, _cfg.optimizer
lr_multiplier, train = _cfg.lr_multiplier, _cfg.train

model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
model.test_score_thresh = 0.0
model.backbone.student.out_channels = 16
model.backbone.teacher.update(config_file={config_file!r}, weights={weights!r}, opts={opts!r})
model.backbone.norm_groups = 8
for _loader in (dataloader.train, dataloader.test):
    _loader.mapper.augmentations = []
    _loader.num_workers = 0
dataloader.train.total_batch_size = 2
optimizer.lr = 0.001
train.init_checkpoint = ""
train.seed = 1
train.max_iter = 3
train.log_period = 1
train.eval_period = 0
train.matching = dict(num_batches=1, periods=[2])
train.report = dict(enabled=False)  # it takes longer than such a training
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return toy.write_scenes(tmp_path_factory.mktemp("scenes") / "toy", train=8, val=4)


@pytest.fixture(scope="module")
def config(teacher, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config") / "toy.py", teacher)


def write_config(path, weights, more=""):
    text = TOY_CONFIG.format(config_file=toy.RETINANET, weights=weights, opts=toy.teacher_opts())
    path.write_text(text + more)
    return path


@pytest.fixture
def program(capsys):
    """Runs the program in this process; returns (exit status, stderr)."""
    main = programs.load("tools/lazyconfig_train_net.py").main
    return lambda *argv: (programs.exit_status(main, *argv), capsys.readouterr().err)


def output(folder):
    return f"train.output_dir={folder}"


def log(folder):
    return (folder / "log.txt").read_text()


def check_error(outcome, message):
    status, err = outcome
    assert status == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert re.search(message, err, re.DOTALL), err


@pytest.mark.slow
def test_trains_distils_evaluates_and_leaves_a_plain_student(program, config, flags, tmp_path):
    step = ["train.accumulate=2", "train.non_finite.policy=skip", "train.report.enabled=True"]
    status, err = program("--config-file", config, *flags, output(tmp_path), "train.eval_period=3", *step)
    assert status == 0, err
    text = log(tmp_path)
    assert text.count("running on the CPU") == (0 if torch.cuda.is_available() else 1)
    assert "Matching update at iteration 0 took" in text and "Matching update at iteration 2 took" in text
    assert "copypaste: AP,AP50,AP75" in text
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"loss_cls", *(f"loss_mgd_res{i}" for i in (2, 3, 4, 5)), "bbox/AP"} <= {key for x in metrics for key in x}

    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "RetinaNet, " in report and "res5" in report and report.count("data:image/png") >= 2
    assert "student.yaml" in (tmp_path / "model_card.md").read_text(encoding="utf-8")

    known = json.loads((tmp_path / "categories.json").read_text())
    assert known == [{"id": c["id"], "name": c["name"]} for c in json.loads(open(flags[1]).read())["categories"]]

    plain = LazyConfig.load(str(tmp_path / "student.yaml"))
    assert plain.train.init_checkpoint == str(tmp_path / "model_final.pth") and "matching" not in plain.train
    assert "mgd_det" not in (tmp_path / "student.yaml").read_text()
    weights = torch.load(tmp_path / "model_final.pth")["model"]
    model = instantiate(plain.model)
    assert list(weights) == list(model.state_dict())
    assert model.num_classes == 10


@pytest.mark.slow
def test_resumes_with_matching_optimizer_and_normalizer(program, config, flags, tmp_path):
    arguments = ["--config-file", config, *flags, output(tmp_path), "train.matching.periods=[3]"]
    status, err = program(*arguments, "train.max_iter=2")
    assert status == 0, err
    saved = torch.load(tmp_path / "model_final.pth")
    assert saved["iteration"] == 1
    before = log(tmp_path)

    status, err = program("--resume", *arguments, "train.max_iter=3")
    assert status == 0, err
    resumed = log(tmp_path)[len(before) :]
    assert "Starting training from iteration 2" in resumed and "Matching update" not in resumed
    after = torch.load(tmp_path / "model_final.pth")
    assert after["iteration"] == 2
    matchings = [x["trainer"]["hooks"]["MatchingUpdate"]["matchings"] for x in (saved, after)]
    for position, tensors in matchings[0].items():
        assert all(torch.equal(tensor, matchings[1][position][key]) for key, tensor in tensors.items())
    # A running mean that falls step by step towards these images' few positive anchors; a new one would have one step.
    normalizers = [x["trainer"]["hooks"]["LossNormalizer"]["loss_normalizer"] for x in (saved, after)]
    assert normalizers[1] < normalizers[0] < 100


INHERIT = "train.inherit=[fpn,head]"


def start(folder, weights):
    """What a training of one step at rate 0 saved, and the teacher's file."""
    file, saved = torch.load(weights)["model"], torch.load(folder / "model_final.pth")["model"]
    return {name: value for name, value in saved.items() if "running" not in name and "num_batches" not in name}, file


@pytest.mark.slow
def test_the_student_starts_from_its_teachers_fpn_and_head(program, config, teacher, flags, tmp_path):
    arguments = ["--config-file", config, *flags, "optimizer.lr=0", "train.max_iter=1"]
    status, err = program(*arguments, output(tmp_path / "a"), INHERIT)
    assert status == 0, err
    saved, file = start(tmp_path / "a", teacher)
    for name in ("backbone.fpn_output3.weight", "head.cls_subnet.0.weight", "head.cls_score.weight"):
        assert torch.equal(saved[name], file[name])
    assert not torch.equal(
        saved["backbone.bottom_up.stem.conv1.weight"][:16], file["backbone.bottom_up.stem.conv1.weight"]
    )
    text = log(tmp_path / "a")
    assert "backbone.fpn_lateral5.weight (16, 1024, 1, 1) in the teacher, (16, 512, 1, 1) in the student" in text
    assert "inherit" not in (tmp_path / "a" / "student.yaml").read_text()

    status, err = program("--resume", *arguments, output(tmp_path / "a"), INHERIT, "train.max_iter=2")
    assert status == 0, err
    assert log(tmp_path / "a").count("starts from these tensors") == 1

    for override, message in (
        ("train.inherit=[neck]", r"train.inherit.parts is \['neck'\]"),
        ("train.inherit={part: [fpn]}", "train.inherit is .*inherit_from_teacher does not take"),
    ):
        check_error(program(*arguments, output(tmp_path / "b"), override), message)


@pytest.mark.slow
def test_a_narrower_student_starts_from_some_of_its_teachers_channels_and_learns_from_them(
    program, teacher, flags, tmp_path
):
    more = """
model.head.input_shape = [ShapeSpec(channels=8)] * 5
model.head.conv_dims = [8]
model.backbone.student.out_channels = 8
model.backbone.positions = ["p3", "p4"]
train.inherit = dict(parts=["fpn", "head"], channels=dict(criterion="energy_weight", num_batches=1))
"""
    config = write_config(tmp_path / "narrow.py", teacher, more)
    arguments = ["--config-file", config, *flags, "optimizer.lr=0", "train.max_iter=1"]
    status, err = program(*arguments, output(tmp_path / "a"))
    assert status == 0, err
    saved, file = start(tmp_path / "a", teacher)
    state = torch.load(tmp_path / "a" / "model_final.pth")["trainer"]["hooks"]["MatchingUpdate"]["matchings"]
    channels = state["p3"]["groups"].squeeze(1)
    assert channels.shape == (8,) and torch.equal(state["p4"]["groups"].squeeze(1), channels)
    assert torch.equal(saved["backbone.top_block.p7.bias"], file["backbone.top_block.p7.bias"][channels])
    assert "fpn: 8 of 16 channels, error" in log(tmp_path / "a")
    override = "train.inherit.channels.criterion=best"
    check_error(program(*arguments, output(tmp_path / "b"), override), "train.inherit.channels.criterion is 'best'")


@pytest.mark.slow
def test_a_student_without_distillation_starts_from_a_teacher_too(program, teacher, flags, tmp_path):
    more = f"""
model.backbone = model.backbone.student
train.inherit = dict(
    parts=["head"], config_file={toy.RETINANET!r}, weights={teacher!r}, opts={toy.teacher_opts()!r}
)
"""
    config = write_config(tmp_path / "plain.py", teacher, more)
    arguments = ["--config-file", config, *flags, "optimizer.lr=0", "train.max_iter=1", output(tmp_path / "a")]
    status, err = program(*arguments)
    assert status == 0, err
    saved, file = start(tmp_path / "a", teacher)
    assert torch.equal(saved["head.cls_score.weight"], file["head.cls_score.weight"])
    assert not torch.equal(saved["backbone.fpn_output3.weight"], file["backbone.fpn_output3.weight"])
    status, err = program("--eval-only", *arguments, "train.inherit.weights=nowhere.pth")
    assert status == 0, err


@pytest.mark.slow
def test_eval_only_needs_no_teacher_and_scores_what_was_trained(program, config, flags, tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "0")  # and forget what the program sets
    status, err = program("--config-file", config, *flags, output(tmp_path / "a"), "train.eval_period=3")
    assert status == 0, err
    no_teacher = write_config(tmp_path / "no_teacher.py", "nowhere.pth")
    checkpoint = f"train.init_checkpoint={tmp_path}/a/model_final.pth"
    student = tmp_path / "a" / "student.yaml"
    check_error(program("--eval-only", "--config-file", student, output(tmp_path / "c")), "--allow-unsafe-files")
    assert f"{student}" in log(tmp_path / "a") and "--allow-unsafe-files" in log(tmp_path / "a")
    for more in (
        ["--eval-only", "--config-file", no_teacher, *flags[4:], output(tmp_path / "b"), checkpoint],
        ["--eval-only", "--resume", "--config-file", no_teacher, *flags[4:], output(tmp_path / "a")],
        ["--allow-unsafe-files", "--eval-only", "--config-file", student, *flags[4:], output(tmp_path / "c")],
    ):
        before = log(tmp_path / "a")
        status, err = program(*more)
        assert status == 0, err
        folder = Path(next(x for x in more if str(x).startswith("train.output_dir")).partition("=")[2])
        text = log(folder / "inference")
        assert log(tmp_path / "a") == before
        scores = [re.findall(r"copypaste: (\d.*)", x) for x in (before, text)]
        assert scores[0][-1] == scores[1][-1]
        assert "stay random" not in text


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--config-file", "COCO-Detection/retinanet_R_18_FPN_mgd_R50_2x.py"], "Did you mean .*mgd_R50_1x.py"),
        (["--config-file", toy.RETINANET], "tools/train_net.py.*--allow-unsafe-files"),
        (["--config-file", "TOY", "train.max_iter"], "the override 'train.max_iter'"),
        (["--config-file", "TOY", "train.max_iter.x=3"], "the override 'train.max_iter.x=3'"),
        (["--config-file", "TOY", "--eval-teacher"], "--eval-teacher: tools/train_net.py"),
        (["--config-file", "TOY", "--train-json", "a.json"], "--train-json and --train-images go together"),
        (["--config-file", "TOY", "dataloader.train.dataset.names=cooc_2017_train"], "cooc_2017.*coco_2017_train"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line(program, config, tmp_path, argv, message):
    check_error(program(*[config if x == "TOY" else x for x in argv]), message)


@pytest.mark.slow
def test_mistakes_in_the_config(program, teacher, flags, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("model = (\n")
    check_error(program("--config-file", broken), "broken.py: .*never closed|broken.py: .*EOF")
    config = write_config(tmp_path / "a.py", teacher, "del train.matching\n")
    check_error(program("--config-file", config, *flags, output(tmp_path / "a")), "train.matching is not in the config")
    wrong = ["train.accumulate=0", "train.non_finite.policy=hope", "model.backbone.reducer=mean"]
    config = write_config(tmp_path / "good.py", teacher)
    said = ("train.accumulate is 0", "train.non_finite.policy is 'hope'", "model.backbone.reducer is 'mean'")
    for override, message in zip(wrong, said):
        check_error(program("--config-file", config, *flags, output(tmp_path / "a"), override), message)
    for key, message in (
        ("norm=XX", "model.backbone.norm is 'XX'"),
        ("logits={weight: -1}", "backbone.logits.weight is -1"),
        ("cross_kd={weight: 1, layer: -2}", "backbone.cross_kd.layer is -2"),
    ):
        check_error(program("--config-file", config, *flags, output(tmp_path / "n"), f"model.backbone.{key}"), message)
    config = write_config(tmp_path / "b.py", "nowhere.pth")
    check_error(program("--config-file", config, *flags, output(tmp_path / "b")), "nowhere.pth: there is no such file")


def test_classes_of_data_and_config(program, config, flags, tmp_path):
    from mgd_det.data import register_coco_folder

    register_coco_folder("lazy_shapes", flags[5], flags[7])
    names = "dataloader.test.dataset.names=lazy_shapes"
    outcome = program("--eval-only", "--config-file", config, names, output(tmp_path))
    check_error(outcome, "lazy_shapes has 10 classes, but the config's num_classes is 80: set it to 10")


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_one_message(program, config, flags, tmp_path):
    outcome = program("--config-file", config, *flags, output(tmp_path), "optimizer.lr=1e18", "train.max_iter=9")
    check_error(outcome, "infinite or NaN at iteration=.*no checkpoint yet.*Lower optimizer.lr")
    assert not (tmp_path / "model_final.pth").exists()


def test_masks_of_another_format_are_found_before_training(flags):
    from mgd_det import model_zoo
    from mgd_det.cli import lazy_setup
    from mgd_det.data import register_coco_folder

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_MobileNetV3L_FPN_mgd_R50_1x.py")
    register_coco_folder("lazy_masks", flags[1], flags[3])
    cfg.dataloader.train.dataset.names, cfg.dataloader.test.dataset.names = "lazy_masks", ()
    with pytest.raises(UserError, match="is an RLE.*instance_mask_format.*'bitmask'"):
        lazy_setup._check_data(cfg, train=True)
    cfg.dataloader.train.mapper.instance_mask_format = "bitmask"
    lazy_setup._check_data(cfg, train=True)


def test_a_broken_image_is_one_message(program, teacher, tmp_path):
    flags = toy.write_scenes(tmp_path / "toy", train=8, val=4)
    for image in (tmp_path / "toy" / "images" / "train").iterdir():
        image.write_bytes(image.read_bytes()[:100])
    config = write_config(tmp_path / "c.py", teacher)
    check_error(program("--config-file", config, *flags, output(tmp_path)), r"train/[^']*' cannot be read")


@pytest.mark.slow
def test_the_program_itself_ends_with_a_message_and_status_1():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--num-gpus", "2", "--config-file", "no.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=120,
        check=False,
    )
    check_error((result.returncode, result.stderr), "--config-file 'no.py' is neither")
    assert "there is no GPU: one process on the CPU" in result.stderr
    assert "Warning" not in result.stderr  # Detectron2's import gives some
