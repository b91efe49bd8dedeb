"""projects/Classification: the programs of its README."""

from pathlib import Path

import pytest
import torch
import torchvision
from classification.classifier import Classifier
from classification.networks import resnet
from detectron2.config import instantiate
from programs import exit_status, load
from toy_images import write_photos

from mgd_det.engine.lazy_config import read_config
from mgd_det.errors import UserError

PROJECT = Path(__file__).parents[2] / "projects" / "Classification"


def test_the_program_distils_and_scores_the_best_checkpoint(tmp_path):
    write_photos(tmp_path / "photos", 8)
    teacher = instantiate(read_config(str(PROJECT / "configs/fashion/R50.py"), []).model)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    argv = ["--config-file", PROJECT / "configs/fashion/ShuffleNetV2_mgd_R50.py", "train.max_iter=1"]
    for split in ("train", "test"):
        argv += [f"dataloader.{split}.dataset.{key}" for key in (f"root={tmp_path / 'photos'}", "images=4")]
    argv += ["dataloader.train.total_batch_size=2", f"model.backbone.teacher.weights={tmp_path / 'teacher.pth'}"]
    main = load("projects/Classification/train.py").main
    best = "train.best={metric: accuracy/top1}"
    assert exit_status(main, *argv, best, f"train.output_dir={tmp_path / 'run'}") == 0
    metrics = (tmp_path / "run" / "metrics.json").read_text()
    assert "accuracy/top1" in metrics and "loss_mgd_res5" in metrics
    argv += [f"train.init_checkpoint={tmp_path / 'run' / 'model_best.pth'}", f"train.output_dir={tmp_path / 'scored'}"]
    (tmp_path / "teacher.pth").unlink()  # evaluation needs none
    assert exit_status(main, "--eval-only", *argv) == 0


def test_imported_weights_are_a_checkpoint(tmp_path):
    program = load("projects/Classification/import_weights.py")
    torch.save(torchvision.models.resnet18(num_classes=4).state_dict(), tmp_path / "theirs.pth")
    output = tmp_path / "new" / "ours.pth"
    program.run(program.parse_args([str(tmp_path / "theirs.pth"), str(output)]))
    pixels = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3}
    model = Classifier(backbone=resnet(depth=18), num_classes=4, **pixels)
    model.load_state_dict(torch.load(output)["model"])
    with pytest.raises(UserError, match=r"nothing\.pth"):
        program.run(program.parse_args([str(tmp_path / "nothing.pth"), str(output)]))
