from argparse import Namespace

import pytest
import torch

from mgd_det.engine import check_gpus, read_config
from mgd_det.engine.setup import use_available_device
from mgd_det.errors import UserError


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


@pytest.mark.parametrize("there, asked, left", [(0, 1, 1), (0, 8, 1), (8, 8, 8), (8, 2, 2), (1, 1, 1)])
def test_number_of_gpus(monkeypatch, capsys, there, asked, left):
    gpus(monkeypatch, there)
    args = Namespace(num_gpus=asked, num_machines=1)
    check_gpus(args)
    assert args.num_gpus == left
    assert ("one process on the CPU" in capsys.readouterr().err) == (asked != left)


def test_too_few_gpus(monkeypatch):
    gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="--num-gpus is 8, but this machine has 2"):
        check_gpus(Namespace(num_gpus=8, num_machines=1))


def test_the_cpu_stands_in_for_a_gpu_that_is_not_there(monkeypatch):
    cfg = read_config("")
    cfg.SOLVER.AMP.ENABLED = True
    gpus(monkeypatch, 1)
    assert use_available_device(cfg) == "" and cfg.MODEL.DEVICE == "cuda" and cfg.SOLVER.AMP.ENABLED
    gpus(monkeypatch, 0)
    warning = use_available_device(cfg)
    assert "'cuda'" in warning and "running on the CPU" in warning and "\n" not in warning
    assert cfg.MODEL.DEVICE == "cpu" and not cfg.SOLVER.AMP.ENABLED
    assert use_available_device(cfg) == ""


@pytest.mark.parametrize(
    "content, message",
    [
        ("MODEL: [1", "config .*bad.yaml: while parsing"),
        ('_BASE_: "nothing.yaml"', "config .*bad.yaml: .*nothing.yaml"),
    ],
)
def test_broken_config_files(tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(UserError, match=message):
        read_config(str(tmp_path / "bad.yaml"))
