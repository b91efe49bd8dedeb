import pytest
import torch

from mgd_det.cli.yaml_setup import read_config, use_available_device
from mgd_det.errors import UserError


def gpus(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)


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
