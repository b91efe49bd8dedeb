"""report.html and model_card.md: every section, nothing from elsewhere, pictures that are there."""

import base64
import io
import json
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import coco_data
import matplotlib.image
import numpy as np
import pytest
import torch
from detectron2.data.datasets import register_coco_instances

from mgd_det.errors import UserError
from mgd_det.visualization import report
from mgd_det.visualization.matching_record import record_matching
from mgd_det.visualization.report import Run, write_report
from mgd_det.visualization.scores import write_scores

pytestmark = pytest.mark.slow

NAME = "test_report"
SECTIONS = ["results", "classes", "curves", "matching", "examples", "time", "config"]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(report, "collect_env_info", lambda: "torch of the environment")
    yield
    coco_data.forget(NAME)


class Page(HTMLParser):
    """The text of each section, its tables, and everything that a browser would load."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.sections, self.tables, self.pictures, self.loaded = {}, [], {}, []
        self._open, self._section, self._cell = [], None, None
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ("meta", "img", "link", "br"):
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["id"]
            self.sections[self._section] = ""
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self._cell = tag in ("td", "th")
        for key in ("src", "href", "srcset", "data", "action"):
            if key in attributes:
                self.loaded.append((tag, attributes[key]))
        if tag == "img":
            assert attributes["alt"]
            self.pictures.setdefault(self._section, []).append(attributes["src"])

    def handle_endtag(self, tag):
        assert self._open.pop() == tag
        self._cell = False
        if tag == "section":
            self._section = None

    def handle_data(self, data):
        if self._section:
            self.sections[self._section] += data
        if self._cell:
            self.tables[-1][-1][-1] += data


def write_metrics(folder, scale, iterations=(19, 39, 59, 79), costs=True):
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for iteration in iterations:
        row = {"iteration": iteration, "time": 0.5, "data_time": 0.1, "total_loss": 3 - iteration / 40}
        row |= {"loss_cls": 1.0, "loss_mgd_res3": 0.5}
        if iteration in (39, 79):
            row |= {"bbox/AP": scale * iteration / 8, "bbox/AP50": scale * 20, "bbox/APl": float("nan")}
            row |= {"bbox/AP-<b>ship</b>": scale * 3, "bbox/AP-a/b": scale * 2}
            row |= {"mgd/cost_res3": 1.5 - iteration / 100} if costs else {}
        rows.append(row)
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def full_run(tmp_path):
    """A run of which everything is known."""
    folder = write_metrics(tmp_path / "run", 2)
    (folder / "config.yaml").write_text("SOLVER: {BASE_LR: 0.0125}  # <script>")
    write_scores({"bbox": {"AP": 25.0, "AP50": 45.0, "AP-a/b": 9.0}}, _folder(folder / "teacher") / "scores.json")
    for first in (True, False):
        cost = 4 * torch.rand(4, 8, dtype=torch.float64)
        record_matching(str(folder), {"res3": (cost, torch.randperm(8).reshape(4, 2))}, first)
    json_file, images = coco_data.write(tmp_path / "data", coco_data.content())
    register_coco_instances(NAME, {}, str(json_file), str(images))
    student = tmp_path / "student.json"
    student.write_text("[]")
    return Run(
        folder=str(folder),
        model="RetinaNet, ResNet-18",
        trained_on=["my_train"],
        tested_on=[NAME],
        classes=["<b>ship</b>", "a/b"],
        teacher="zoo/teacher.yaml",
        teacher_weights="teacher.pth",
        teacher_licence="CC BY 4.0",
        alone=str(write_metrics(tmp_path / "alone", 1.5, costs=False)),
        how_to_load="load()",
        student_detections={NAME: str(student)},
        run_teacher=lambda records: {
            record["image_id"]: [{"bbox": [8, 10, 20, 12], "category_id": c, "score": 0.9} for c in range(3)]
            for record in records
        },
        memory={"GPU": 3 * 2**30},
    )


def _folder(path):
    path.mkdir()
    return path


def decoded(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(data, validate=True)))


def test_sets_are_called_by_their_titles(tmp_path):
    run = replace(full_run(tmp_path), titles={"my_train": "boats_train.json", NAME: "boats_val.json"})
    for path in write_report(run):
        text = Path(path).read_text()
        assert "boats_train.json" in text and "boats_val.json" in text and "my_train" not in text


def test_a_report_of_everything(tmp_path):
    run = full_run(tmp_path)
    paths = write_report(run)
    assert paths == [f"{run.folder}/report.html", f"{run.folder}/model_card.md"]
    text = open(paths[0], encoding="utf-8").read()
    page = Page(text)
    assert list(page.sections) == SECTIONS
    assert all(of_section.strip() for of_section in page.sections.values())

    # One self-contained file: a browser loads nothing but what is in it.
    assert {tag for tag, _ in page.loaded} == {"img"} and "url(" not in text and "<script" not in text
    assert set(page.pictures) == {"curves", "matching", "examples"} and len(page.pictures["matching"]) == 2
    for uri in sum(page.pictures.values(), []):
        picture = decoded(uri)
        assert min(picture.shape[:2]) > 100 and np.ptp(picture[..., :3]) > 0.5

    results, classes, costs = page.tables
    # 2 * 79 / 8, and of the student alone 1.5 * 79 / 8.
    assert results[:2] == [["", "teacher", "alone", "distilled", "gain"], ["AP", "25.00", "14.81", "19.75", "+4.94"]]
    assert results[-1] == ["APl", "–", "–", "–", "–"]
    assert classes[1:] == [
        ["<b>ship</b>", "–", "4.50", "6.00", "+1.50"],
        ["a/b", "9.00", "3.00", "4.00", "+1.00"],
    ]
    assert costs[1] == ["res3", "1.1100", "0.7100", "2"]
    assert all(part in text for part in ("19.75", "+4.94", "79%"))  # at the top: 19.75 / 25
    time = page.sections["time"]
    assert "80" in time and "0.500 s" in time and "0:00:40" in time and "3,072 MiB" in time
    config = page.sections["config"]
    assert "BASE_LR: 0.0125}  # <script>" in config and "torch of the environment" in config and "CC BY 4.0" in config
    assert "1.png" in page.sections["examples"] and "not known" not in page.sections["results"]

    card = open(paths[1], encoding="utf-8").read()
    assert "| AP | 25.00 | 14.81 | 19.75 |" in card and "| AP, <b>ship</b> | – | 4.50 | 6.00 |" in card
    for part in ("my_train", NAME, "zoo/teacher.yaml", "CC BY 4.0", "load()", "## Limits", "80 iterations"):
        assert part in card


def test_a_report_of_a_plain_training_without_evaluation(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps({"iteration": 4, "total_loss": 1.0, "loss_cls": 1.0}) + "\n")
    html, card = (open(path, encoding="utf-8").read() for path in write_report(Run(str(folder), "RetinaNet")))
    page = Page(html)
    assert list(page.sections) == SECTIONS and list(page.pictures) == ["curves"] and page.tables == []
    assert "no evaluation" in page.sections["results"] and "no distillation" in page.sections["matching"]
    assert "Teacher" not in card and "no evaluation" in card


def test_what_is_missing_is_said(tmp_path):
    run = Run(
        str(write_metrics(tmp_path / "run", 2, costs=False)),
        "RetinaNet",
        tested_on=["a_set"],
        teacher="teacher.yaml",
        no_teacher="The teacher has no head.",
    )
    html, card = (open(path, encoding="utf-8").read() for path in write_report(run))
    page = Page(html)
    assert "--eval-teacher" in page.sections["results"] and "REPORT.ALONE" in page.sections["results"]
    assert "one to one" in page.sections["matching"] and "The teacher has no head." in page.sections["examples"]
    assert page.tables[0][0] == ["", "distilled"] and "not stated" in card and "not stated" in page.sections["config"]


@pytest.mark.parametrize(
    "teacher_ap, stopped, is_said",
    [(9.0, False, True), (9.0, True, False), (10.0, False, False), (float("nan"), False, False), (19.0, False, False)],
)
def test_a_teacher_that_is_overtaken_before_the_end_is_said(tmp_path, teacher_ap, stopped, is_said):
    folder = write_metrics(tmp_path / "run", 2)  # 9.75 AP after 40 iterations, 19.75 after 80
    if stopped:
        rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        for row in rows[2:]:
            del row["loss_mgd_res3"]
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_scores({"bbox": {"AP": teacher_ap}}, _folder(folder / "teacher") / "scores.json")
    page = Page(open(write_report(Run(str(folder), "m", teacher="t"))[0], encoding="utf-8").read())
    advice = "had the AP of its teacher (9.00) after 40 iterations"
    assert (advice in page.sections["results"]) == is_said
    assert ("MODEL.MGD.STOP_ITER 40 " in page.sections["results"]) == is_said


def test_a_resumed_training_is_covered_as_a_whole(tmp_path):
    folder = write_metrics(tmp_path / "run", 2)
    with open(folder / "metrics.json", "a") as file:  # killed after 79, resumed at 60
        for iteration in (79, 99):
            file.write(json.dumps({"iteration": iteration, "total_loss": 0.5, "time": 1.5}) + "\n")
    page = Page(open(write_report(Run(str(folder), "RetinaNet"))[0], encoding="utf-8").read())
    # Steps 0 to 59 of 0.5 s and 60 to 99 of 1.5 s.
    assert "100" in page.sections["time"] and "0:01:30" in page.sections["time"]


def test_files_that_the_user_names_must_be_there(tmp_path):
    folder = write_metrics(tmp_path / "run", 2)
    for run in (
        Run(str(folder), "m", alone=str(tmp_path / "nothing")),
        Run(str(folder), "m", teacher="t", teacher_scores=str(tmp_path / "nothing")),
    ):
        with pytest.raises(UserError, match="nothing"):
            write_report(run)
    assert not (folder / "report.html").exists()


def test_a_browser_shows_it_without_network(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    path = write_report(full_run(tmp_path))[0]
    # The page reports on itself: how many pictures it has, and how many are loaded.
    script = "<script>addEventListener('load', () => { const all = [...document.images];"
    script += "document.title = `${all.length} of ${all.filter(i => i.complete && i.naturalWidth > 100).length}`; })"
    with open(path, "a", encoding="utf-8") as file:
        file.write(script + "</script>")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--proxy-server=127.0.0.1:9", "--virtual-time-budget=5000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
    shown = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "<title>4 of 4</title>" in shown and "AP of boxes, distilled" in shown
