"""tools/train_net.py on a data set made on the spot, sound and broken."""

import json
import re
from pathlib import Path

import coco_data
import programs
import pytest
import torch
import toy
from toy import RETINANET

SHORT = ["SOLVER.IMS_PER_BATCH", "2", "SOLVER.STEPS", "()", "SOLVER.BASE_LR", "0.001", "SOLVER.MAX_ITER", "4"]
NO_OBJECT = ["MODEL.RETINANET.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture
def flags(tmp_path):
    """Flags of a COCO folder with class names and ids of its own; 12 images to train on, 6 to evaluate on."""
    flags = []
    for split, images in (("train", 12), ("val", 6)):
        json_file, folder = coco_data.write(tmp_path / split, coco_data.content(images))
        flags += [f"--{split}-json", str(json_file), f"--{split}-images", str(folder)]
    return flags


@pytest.fixture
def train_net(capfd):
    """Runs the program in this process; returns (exit status, stdout, stderr), with those of its workers."""
    main = programs.load("tools/train_net.py").main
    return lambda *argv: (programs.exit_status(main, *argv), *capfd.readouterr())


def arguments(flags, output, *opts, workers=0):
    fixed = [*toy.plain_opts(), *SHORT, "DATALOADER.NUM_WORKERS", workers, "OUTPUT_DIR", output]
    return ["--config-file", RETINANET, *flags, *fixed, *opts]


def edit(json_file, change):
    content = json.loads(Path(json_file).read_text())
    change(content)
    Path(json_file).write_text(json.dumps(content))


def check_error(outcome, message):
    status, _, err = outcome
    assert status == 1
    assert err.count("error: ") == 1 and "Traceback" not in err
    assert re.search(message, err, re.DOTALL), err


@pytest.mark.slow
def test_distils_on_own_classes_by_flags_alone(flags, teacher, tmp_path, train_net):
    argv = arguments(flags, tmp_path / "out", *toy.distilled_opts(teacher), *NO_OBJECT)
    status, out, err = train_net(*argv)
    assert status == 0, err
    assert "loss_mgd_res5" in out and "Matching update at iteration 2 took" in out
    assert all(name in out for name in coco_data.CATEGORIES.values())
    assert out.count("Evaluation results for bbox") == 1
    results = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert results and {r["category_id"] for r in results} <= set(coco_data.CATEGORIES)
    model = torch.load(tmp_path / "out" / "model_final.pth")["model"]
    anchors = len(model["head.bbox_pred.bias"]) // 4
    assert len(model["head.cls_score.bias"]) == len(coco_data.CATEGORIES) * anchors


@pytest.mark.slow
def test_skips_broken_images_and_entries_and_says_how_many(flags, teacher, tmp_path, train_net):
    train, val = Path(flags[3]), Path(flags[7])
    coco_data.truncate(train / "2.png")
    (train / "3.png").unlink()
    coco_data.truncate(val / "1.png")
    edit(flags[1], lambda c: c["annotations"][3].update(bbox=[1, 1, -5, 5]))
    skip = [*toy.distilled_opts(teacher), "DATASETS.BROKEN_INPUT", "skip", "SOLVER.MAX_ITER", "12", *NO_OBJECT]
    status, out, err = train_net(*arguments(flags, tmp_path / "out", *skip, workers=1))
    assert status == 0, err
    assert "left out of coco_folder_train" in out and "left out of coco_folder_val" in out
    assert re.search(r"missing image +1", out) and re.search(r"invalid box +1", out)
    assert re.search(r"unreadable image +1", out)
    assert out.count("Skipped: ") == 1 and "2.png" in out.split("Skipped: ")[1]
    assert "Broken images skipped in training: 1;" in out
    results = json.loads((tmp_path / "out" / "inference" / "coco_instances_results.json").read_text())
    assert {r["image_id"] for r in results} == {2, 3, 4, 5, 6}
    datasets = tmp_path / "out" / "datasets"
    assert (datasets / "skipped_images.txt").read_text() == f"{train / '2.png'}\n"
    config = (tmp_path / "out" / "config.yaml").read_text()
    assert "coco_folder_train_without_broken" in config and "coco_folder_val_without_broken" in config
    assert "left out of coco_folder_train" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_ends_training_with_one_message(flags, tmp_path, train_net, workers):
    for image in Path(flags[3]).glob("*.png"):
        coco_data.truncate(image)
    outcome = train_net(*arguments(flags, tmp_path / "out", workers=workers))
    check_error(outcome, r"error: '[^']*\.png' cannot be read \(OSError[^\n]*BROKEN_INPUT skip[^\n]*\n$")
    assert "Traceback" not in outcome[1]


@pytest.mark.slow
def test_a_truncated_image_ends_the_matching_pass_and_the_evaluation_likewise(flags, teacher, tmp_path, train_net):
    coco_data.truncate(Path(flags[7]) / "1.png")
    plain = arguments(flags, tmp_path / "out", "SOLVER.MAX_ITER", 1)
    check_error(train_net(*plain), r"error: '[^']*val/images/1.png' cannot be read")
    assert (tmp_path / "out" / "model_final.pth").exists()  # what was trained is not lost
    for image in Path(flags[3]).glob("*.png"):
        coco_data.truncate(image)
    distilled = arguments(flags, tmp_path / "b", *toy.distilled_opts(teacher), workers=1)
    check_error(train_net(*distilled), r"error: '[^']*train/images/[^']*.png' cannot be read")


def test_refuses_broken_entries(flags, tmp_path, train_net):
    edit(flags[1], lambda c: c["annotations"][3].update(bbox=[1, 1, -5, 5]))
    outcome = train_net(*arguments(flags, tmp_path / "out"))
    check_error(outcome, "1 broken entry .*annotation 4: bbox .*tools/check_dataset.py --json .*BROKEN_INPUT skip")
    edit(flags[5], lambda c: c["annotations"][0].pop("area"))
    edit(flags[1], lambda c: c["annotations"][3].update(bbox=[1, 1, 5, 5]))
    check_error(train_net(*arguments(flags, tmp_path / "out")), "annotation 1: no 'area', and COCO's evaluator")
    assert not (tmp_path / "out" / "datasets").exists()


def test_classes_of_val_and_train(flags, tmp_path, train_net):
    edit(flags[5], lambda c: c["categories"][0].update(name="boat"))
    check_error(train_net(*arguments(flags, tmp_path / "out")), "'boat'.*'ship'")


def test_flags_to_train_alone_point_to_the_set_to_evaluate_on(flags, tmp_path, train_net):
    argv = arguments(flags[:4], tmp_path / "out", "DATASETS.TEST", "('coco_2017_val',)")
    check_error(train_net(*argv), "coco_2017_val.*--val-json and --val-images.*DATASETS.TEST")
