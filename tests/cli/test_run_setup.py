"""Set-up that yaml configs and LazyConfigs share, and the checks of each before training."""

import multiprocessing
import os
import time

import pytest
import toy

from mgd_det.cli import lazy_setup, yaml_setup
from mgd_det.cli.yaml_setup import argument_parser
from mgd_det.errors import UserError
from mgd_det.files.folder_lock import lock_folder

LAZY = "COCO-Detection/retinanet_R_18_FPN_mgd_R50_1x.py"


def hold(folder, pipe):
    lock_folder(folder, "OUTPUT_DIR")
    pipe.send("locked")
    time.sleep(60)


@pytest.fixture
def other(tmp_path):
    """Another process, which trains in tmp_path."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=hold, args=(str(tmp_path), theirs))
    process.start()
    assert ours.recv() == "locked"
    yield process
    process.kill()
    process.join()


def set_up(module, *argv):
    return module.setup(argument_parser().parse_args([str(x) for x in argv]))


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(lazy_setup, "_check_data", lambda *args, **options: None)
    monkeypatch.setattr(yaml_setup, "check_datasets", lambda *args, **options: None)


def test_a_second_training_in_the_folder_is_refused_before_it_writes(tmp_path, other, no_data):
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=rf"^OUTPUT_DIR {tmp_path} .*process {other.pid} "):
        set_up(yaml_setup, "--config-file", toy.RETINANET, "OUTPUT_DIR", tmp_path)
    with pytest.raises(UserError, match=rf"^train.output_dir {tmp_path} .*process {other.pid} "):
        set_up(lazy_setup, "--config-file", LAZY, f"train.output_dir={tmp_path}")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("module", [yaml_setup, lazy_setup], ids=["yaml", "lazy"])
def test_an_evaluation_leaves_the_config_and_the_log_of_the_training(tmp_path, no_data, module):
    key, config = ("OUTPUT_DIR", toy.RETINANET) if module is yaml_setup else ("train.output_dir", LAZY)
    folder = [key, tmp_path] if module is yaml_setup else [f"{key}={tmp_path}"]
    for name in ("config.yaml", "log.txt"):
        (tmp_path / name).write_text("of the training")
    cfg = set_up(module, "--eval-only", "--config-file", config, *folder)
    assert str(tmp_path) in (cfg.get("OUTPUT_DIR"), cfg.get("train", {}).get("output_dir"))
    for name in ("config.yaml", "log.txt"):
        assert (tmp_path / name).read_text() == "of the training"
        assert (tmp_path / "inference" / name).stat().st_size > 100


def test_an_evaluation_may_run_beside_the_training(tmp_path, other, no_data):
    cfg = set_up(yaml_setup, "--eval-only", "--config-file", toy.RETINANET, "OUTPUT_DIR", tmp_path)
    assert cfg.OUTPUT_DIR == str(tmp_path)


@pytest.mark.parametrize(
    "override, said",
    [
        ("dataloader.test.dataset.names=[one,two]", "dataset_name is .*one.*two"),
        ("dataloader.evaluator.dataset_name=one", "dataset_name is one, .*names is coco_2017_val"),
    ],
)
def test_a_lazy_evaluator_scores_the_one_set_that_is_tested(tmp_path, no_data, override, said):
    with pytest.raises(UserError, match=f"dataloader.evaluator.{said}"):
        set_up(lazy_setup, "--config-file", LAZY, f"train.output_dir={tmp_path}", override)
