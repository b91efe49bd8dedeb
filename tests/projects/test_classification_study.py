"""projects/Classification: the study's runner, its rows, and its table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accuracy_study.results import ResultsFile, read_results
from accuracy_study.study import read_study
from classification.results import NO_RESULTS, Accuracy, accuracy_table, filled
from classification.training import overridden, train_once
from detectron2.config import instantiate
from programs import load
from scipy.stats import ttest_rel
from toy_images import write_photos

from mgd_det.errors import UserError

PROJECT = Path(__file__).parents[2] / "projects" / "Classification"
STUDIES = sorted((PROJECT / "studies").glob("fashion_*NetV2.yaml"))


def row(arm: str, seed: int, top1: float, **columns) -> Accuracy:
    values = {field: "" for field in ("study", "config", "overrides", "teacher", "commit", "torch", "hardware")}
    values |= {"evaluation_set": "toy_test_all", "top5": 99.0, "iterations": 3, "cpu_seconds": 2.0}
    return Accuracy(**{**values, "arm": arm, "seed": seed, "top1": top1, **columns})


# ------------------------------------------------------------------ rows and table
def test_rows_come_back_from_the_csv(tmp_path):
    file = ResultsFile(tmp_path / "toy.csv", Accuracy)
    rows = [row("alone", 1, 70.25, overrides="a '[1, 2]'"), row("kd", 2, 71.5, teacher="abc")]
    for one in rows:
        file.append(one)
    assert read_results(tmp_path / "toy.csv", Accuracy) == rows
    assert ResultsFile(tmp_path / "toy.csv", Accuracy).find("kd", 2, "toy_test_all") == rows[1]
    with pytest.raises(UserError, match="columns"):
        read_results(tmp_path / "toy.csv")  # an AccuracyStudy's rows have others


def test_table_has_means_paired_differences_and_p():
    alone, kd = [70.0, 71.0, 73.5], [71.0, 73.0, 74.0]
    rows = [row(arm, seed, top1) for arm, scores in (("alone", alone), ("kd", kd)) for seed, top1 in enumerate(scores)]
    table = accuracy_table([*rows, row("ab", 1, 60.0)])
    lines = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table.splitlines()
    }
    difference = np.subtract(kd, alone)
    error = difference.std(ddof=1) / np.sqrt(3)
    assert lines["kd"][2] == f"{difference.mean():+.2f} ± {error:.2f}"
    assert lines["kd"][3] == f"{ttest_rel(kd, alone).pvalue:.3f}"
    assert lines["kd"][1] == f"{np.mean(kd):.2f} ± {np.std(kd, ddof=1) / np.sqrt(3):.2f}"
    assert lines["alone"][2:4] == ["", ""] and lines["ab"] == ["1", "60.00", "-11.00", "-", "2"]


def test_a_page_gets_the_tables_between_its_markers():
    end = "<!-- end of results -->"
    page = f"top\n<!-- results: one -->\nold\n{end}\nmiddle\n<!-- results: two -->\n{end}\nend\n"
    made = filled(page, {"one": [row("alone", 1, 70.0)]})
    assert made.startswith("top\n<!-- results: one -->\n|  | seeds") and "old" not in made
    assert f"<!-- results: two -->\n{NO_RESULTS}<!-- end of results -->\nend\n" in made
    assert filled(made, {"one": [row("alone", 1, 70.0)]}) == made
    with pytest.raises(ValueError, match="'one'"):
        filled("<!-- results: one -->\n", {})


def test_the_readme_is_what_the_csv_files_give():
    report = load("projects/Classification/report.py")
    report.run(report.parse_args(["--check"]))


def test_a_page_that_is_not_current_is_one_message(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- results: toy -->\nold\n<!-- end of results -->\n")
    report = load("projects/Classification/report.py")
    with pytest.raises(UserError, match=re.escape(str(page))):
        report.run(report.parse_args(["--page", str(page), "--results", str(tmp_path), "--check"]))
    assert "old" in page.read_text()
    report.run(report.parse_args(["--page", str(page), "--results", str(tmp_path)]))
    assert "old" not in page.read_text()


# ------------------------------------------------------------------ the studies
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_arm_of_a_study_has_a_config(path, monkeypatch):
    monkeypatch.chdir(PROJECT.parents[1])
    study = read_study(str(path))
    assert len(study.seeds) == 5 and len(study.arms) == 11 and study.name == path.stem
    distilled = {arm.name: overridden(arm.config, arm.overrides).model.backbone for arm in study.arms}
    assert "student" not in distilled.pop("alone")
    losses = {name: (sorted(node.losses), node.logits is not None) for name, node in distilled.items()}
    expected = {
        name: (["partial_l2"], name == "mgd_kd") for name in ("mgd_amp", "mgd_rd", "mgd_sm", "mgd_random", "adapter")
    }
    expected |= {"mgd_kd": (["partial_l2"], True), "kd": ([], True), "mgd_authors": (["partial_l2_sum"], False)}
    assert losses == {**expected, "at": (["at"], False), "ab": (["ab"], False)}
    assert {name: distilled[name].reducer for name in ("mgd_rd", "mgd_sm")} == {"mgd_rd": "rd", "mgd_sm": "sm"}
    assert {name: distilled[name].matchings for name in ("mgd_random", "adapter")} == {
        "mgd_random": "random",
        "adapter": "adapter",
    }


def test_an_override_of_nothing_is_one_message():
    with pytest.raises(UserError, match=r"model\.backbon\.reducer"):
        overridden(str(PROJECT / "configs/fashion/ShuffleNetV2.py"), {"model.backbon.reducer": "rd"})


class Trainings:
    """Stands in for train_once: a score for each training, and a teacher's file."""

    def __init__(self, stop_after: int = 99) -> None:
        self.done, self._stop_after = [], stop_after

    def __call__(self, cfg, seed: int, folder: Path, linear=None) -> dict:
        assert linear is None  # the arms have labels
        if len(self.done) == self._stop_after:
            raise KeyboardInterrupt
        folder.mkdir(parents=True)
        if folder.name == "teacher":
            (folder / "model_final.pth").write_bytes(b"weights")
        weights = cfg.model.backbone.teacher.weights if "student" in cfg.model.backbone else None
        self.done.append((folder.parent.name if folder.name != "teacher" else "teacher", seed, weights))
        return {"top1": 50.0 + len(self.done), "top5": 90.0, "cpu_seconds": 1.0}


def run_study(monkeypatch, tmp_path, trainings: Trainings, *flags: str, study: Path = STUDIES[0]) -> None:
    monkeypatch.chdir(PROJECT.parents[1])
    module = load("projects/Classification/study.py")
    monkeypatch.setattr(module, "train_once", trainings)
    output = ["--output-dir", str(tmp_path / "output"), "--results", str(tmp_path / "toy.csv")]
    threads = torch.get_num_threads()
    try:
        module.run(module.parse_args([str(study), *output, *flags]))
    finally:
        torch.set_num_threads(threads)


def test_a_study_goes_on_where_it_stopped(monkeypatch, tmp_path):
    flags = ["--arms", "alone", "mgd_amp", "--seeds", "1", "2"]
    first = Trainings(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        run_study(monkeypatch, tmp_path, first, *flags)
    weights = str(tmp_path / "output" / "teacher" / "model_final.pth")
    assert first.done == [("teacher", 0, None), ("alone", 1, None), ("mgd_amp", 1, weights)]
    second = Trainings()
    run_study(monkeypatch, tmp_path, second, *flags)
    assert second.done == [("alone", 2, None), ("mgd_amp", 2, weights)]
    rows = read_results(tmp_path / "toy.csv", Accuracy)
    assert [(r.arm, r.seed, r.top1) for r in rows] == [
        ("alone", 1, 52.0),
        ("mgd_amp", 1, 53.0),
        ("alone", 2, 51.0),
        ("mgd_amp", 2, 52.0),
    ]
    assert rows[0].teacher == "" and len(rows[1].teacher) == 12
    assert rows[0].evaluation_set == "fashion_mnist_test_2000"
    third = Trainings()
    run_study(monkeypatch, tmp_path, third, *flags)
    assert third.done == []


def test_rows_of_other_trainings_are_refused(monkeypatch, tmp_path):
    flags = ["--arms", "mgd_amp", "--seeds", "1"]
    run_study(monkeypatch, tmp_path, Trainings(), *flags)
    weights = tmp_path / "output" / "teacher" / "model_final.pth"
    weights.unlink()
    with pytest.raises(UserError, match="toy.csv.*teacher.*--results"):  # before another is trained
        run_study(monkeypatch, tmp_path, trainings := Trainings(), *flags)
    assert trainings.done == []
    weights.write_bytes(b"others")
    with pytest.raises(UserError, match="mgd_amp.*teacher"):
        run_study(monkeypatch, tmp_path, Trainings(), *flags)
    with pytest.raises(UserError, match="fashion_MobileNetV2"):
        run_study(monkeypatch, tmp_path, Trainings(), *flags, study=STUDIES[1])
    with pytest.raises(UserError, match="--arms 'mgd_ampp'.*mgd_amp"):
        run_study(monkeypatch, tmp_path, Trainings(), "--arms", "mgd_ampp")


def test_a_teacher_of_another_config_is_refused(monkeypatch, tmp_path):
    flags = ["--arms", "alone", "--seeds", "1"]
    run_study(monkeypatch, tmp_path, Trainings(), *flags)
    again = Trainings()
    run_study(monkeypatch, tmp_path, again, "--arms", "alone", "--seeds", "2")
    assert again.done == [("alone", 2, None)]  # the same config: the teacher stays
    record = tmp_path / "output" / "teacher" / "config.txt"
    record.write_text(record.read_text().replace("depth=50", "depth=34"))
    with pytest.raises(UserError, match="teacher.*R50.py.*config.txt.*--output-dir"):
        run_study(monkeypatch, tmp_path, Trainings(), *flags)


@pytest.mark.slow
def test_all_arms_of_a_seed_start_with_the_same_weights(tmp_path):
    write_photos(tmp_path / "photos", 6)
    teacher = instantiate(overridden(str(PROJECT / "configs/fashion/R50.py"), {}).model)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher.pth")
    distilled = {"model.backbone.teacher.weights": str(tmp_path / "teacher.pth"), "model.backbone.matchings": "random"}
    found = []
    for name, overrides in (("ShuffleNetV2", {}), ("ShuffleNetV2_mgd_R50", distilled)):
        overrides = {**overrides, "train.max_iter": 1, "optimizer.lr": 0.0, "dataloader.train.total_batch_size": 2}
        for split in ("train", "test"):
            overrides[f"dataloader.{split}.dataset.root"] = str(tmp_path / "photos")
            overrides[f"dataloader.{split}.dataset.images"] = 4
        train_once(overridden(str(PROJECT / f"configs/fashion/{name}.py"), overrides), 3, tmp_path / name)
        found.append(torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"])
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        if name.endswith(("weight", "bias")):
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(found[1][name])), name


@pytest.mark.slow
def test_a_training_of_the_study_gives_its_scores_and_depends_on_the_seed_alone(tmp_path):
    write_photos(tmp_path / "photos", 12)
    found = []
    for number, seed in enumerate((1, 1, 2)):
        overrides = {"train.max_iter": 2, "dataloader.train.total_batch_size": 4}
        for split in ("train", "test"):
            overrides |= {
                f"dataloader.{split}.dataset.root": str(tmp_path / "photos"),
                f"dataloader.{split}.dataset.images": 10,
            }
        cfg = overridden(str(PROJECT / "configs/fashion/ShuffleNetV2.py"), overrides)
        scores = train_once(cfg, seed, tmp_path / str(number))
        assert set(scores) == {"top1", "top5", "cpu_seconds"} and scores["cpu_seconds"] > 0
        assert 0 <= scores["top1"] <= scores["top5"] <= 100
        lines = (tmp_path / str(number) / "metrics.json").read_text().splitlines()
        found.append(
            torch.load(tmp_path / str(number) / "model_final.pth", weights_only=False)["model"]["linear.weight"]
        )
        assert json.loads(lines[-1])["iteration"] == 2  # the evaluation at the end
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[1]))
    assert not torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[2]))
