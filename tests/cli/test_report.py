"""mgd-report: the folder that it writes to."""

import pytest
import toy

from mgd_det.cli import report
from mgd_det.cli.yaml_setup import use_folder_of_training
from mgd_det.errors import UserError


@pytest.fixture
def folder_of_report(monkeypatch, tmp_path):
    """Runs the program with the config.yaml of a training in "trained", in another folder; returns where it writes."""
    monkeypatch.setattr(report, "yaml_run", lambda cfg: cfg)
    monkeypatch.setattr(report, "write_report", lambda cfg: folders.append(cfg.OUTPUT_DIR) or [])
    folders = []
    (tmp_path / "copy").mkdir()
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(toy.plain_config(opts=["OUTPUT_DIR", str(tmp_path / "trained")]).dump())

    def run():
        report.run(report.parse_args(["--config-file", str(config)]))
        return folders.pop()

    return run


def test_the_folder_of_the_config_where_the_training_is_there(folder_of_report, tmp_path):
    (tmp_path / "trained").mkdir()
    assert folder_of_report() == str(tmp_path / "trained")
    (tmp_path / "copy" / "metrics.json").write_text("")
    assert folder_of_report() == str(tmp_path / "copy")


def test_the_folder_of_the_config_where_its_output_dir_is_gone(folder_of_report, tmp_path):
    assert folder_of_report() == str(tmp_path / "copy")


def test_an_override_names_the_folder(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    for opts, expected in (([], tmp_path), (["OUTPUT_DIR", "mine"], "mine")):
        cfg = toy.plain_config(opts=["OUTPUT_DIR", "mine"])
        use_folder_of_training(cfg, str(tmp_path / "config.yaml"), opts)
        assert cfg.OUTPUT_DIR == str(expected)


def test_the_students_config_is_refused(tmp_path):
    with pytest.raises(UserError, match="student.yaml is the plain student's config.*: give config.yaml"):
        report.run(report.parse_args(["--config-file", str(tmp_path / "student.yaml")]))
