"""report.html and model_card.md of a training: what it was, what came out, and how to use it.

Both are made from files of OUTPUT_DIR (metrics.json above all), so that they cover a resumed training as a whole and
can be made again at any time.
"""

from __future__ import annotations

import base64
import datetime
import io
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from detectron2.utils.collect_env import collect_env_info

from mgd_det import __version__
from mgd_det.distillation.weighted_losses import is_distillation_loss
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.visualization.curves import Series, plot_curves, read_metrics
from mgd_det.visualization.matching import plot_matching
from mgd_det.visualization.matching_costs import matching_costs, plot_matching_costs
from mgd_det.visualization.matching_record import read_matchings
from mgd_det.visualization.misses import NoExamples, draw_misses
from mgd_det.visualization.scores import SCORES_FILE, ScoreTable, last_scores, main_score, read_scores, score_tables

if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

REPORT_FILE, MODEL_CARD_FILE = "report.html", "model_card.md"

_WITHOUT_ANSWER = "not stated"


@dataclass(frozen=True)
class Run:
    """A training to report on.

    Attributes:
        folder: OUTPUT_DIR. It has metrics.json, and usually config.yaml.
        model: what was trained, in a few words ("RetinaNet, MobileNetV2").
        trained_on, tested_on: names of data sets.
        titles: what the report calls them, for those whose name says little.
        classes: names by class index; [] if they are not known.
        teacher: its config; "" for a training without distillation.
        teacher_weights: their path or URL.
        teacher_licence: as the user states it; "" if not stated.
        teacher_scores: scores.json of its evaluation; "" for that in OUTPUT_DIR/teacher, if there is one.
        alone: OUTPUT_DIR or metrics.json of the same student without distillation; "" if there is none.
        how_to_load: the lines of code, or of a shell, that load the result.
        examples: pictures of missed objects, >= 0.
        student_detections, teacher_detections: by set, coco_instances_results.json of each. A file may be absent.
        run_teacher: see :func:`mgd_det.visualization.misses.draw_misses`; None if it cannot run.
        no_teacher: why ``run_teacher`` is None, as a whole sentence.
        memory: peak memory in bytes, by what it is ("process", "GPU").
    """

    folder: str
    model: str
    trained_on: Sequence[str] = ()
    tested_on: Sequence[str] = ()
    titles: Mapping[str, str] = field(default_factory=dict)
    classes: Sequence[str] = ()
    teacher: str = ""
    teacher_weights: str = ""
    teacher_licence: str = ""
    teacher_scores: str = ""
    alone: str = ""
    how_to_load: str = ""
    examples: int = 4
    student_detections: Mapping[str, str] = field(default_factory=dict)
    teacher_detections: Mapping[str, str] = field(default_factory=dict)
    run_teacher: Optional[Callable[[Any], Any]] = None
    no_teacher: str = ""
    memory: Mapping[str, int] = field(default_factory=dict)


class Picture(NamedTuple):
    """A picture of the report, or why there is none.

    Attributes:
        uri: "data:image/png;base64,...", or "".
        note: a sentence below the picture, or instead of it.
    """

    uri: str
    note: str


@dataclass(frozen=True)
class _Model:
    name: str
    scores: Mapping[str, float]
    iterations: Optional[int] = None


def write_report(run: Run) -> List[str]:
    """Write report.html and model_card.md into the run's folder, and return their paths.

    Raises:
        UserError: metrics.json, or a file that the run names, cannot be read.
        OSError: a file cannot be written.
    """
    metrics_file = os.path.join(run.folder, "metrics.json")
    metrics = read_metrics(metrics_file)
    others = [_teacher(run), _alone(run)]
    models = [model for model in others if model is not None]
    models.append(_Model("distilled" if run.teacher else "this model", last_scores(metrics), _iterations(metrics)))
    curves = {model.name: _metrics_file(run.alone) for model in models if model.name == "alone"}
    curves[models[-1].name] = metrics_file
    tables = score_tables([model.scores for model in models])
    content: Dict[str, Any] = {
        "run": run,
        "trained_on": [run.titles.get(name, name) for name in run.trained_on],
        "tested_on": [run.titles.get(name, name) for name in run.tested_on],
        "version": __version__,
        "date": datetime.date.today().isoformat(),
        "licence": run.teacher_licence or _WITHOUT_ANSWER,
        "models": models,
        "tables": tables,
        "headline": _headline(models),
        "weakest": _weakest(tables, len(models) - 1),
        "times": _times(metrics, run.memory),
        "costs": _cost_rows(matching_costs(metrics)),
        "notes": _missing(run, models) + _overtaken(models, metrics),
    }
    pictures = {
        "curves": _picture(lambda file: plot_curves(curves, file, main_score(models[-1].scores) or "bbox/AP", "")),
        "costs_picture": _costs(run, metrics),
        "matching": _matching(run),
        "examples": [(name, *_examples(run, name)) for name in run.tested_on],
        "config": _read_text(os.path.join(run.folder, "config.yaml")),
        "environment": collect_env_info(),
    }
    paths = []
    for name, values in ((REPORT_FILE, {**content, **pictures}), (MODEL_CARD_FILE, content)):
        text = _templates(name.endswith(".html")).get_template(name).render(values)
        paths.append(os.path.join(run.folder, name))
        write_text_atomically(paths[-1], text)
    return paths


def _templates(escape: bool) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # here: see mgd_det/visualization/figures.py

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["score"] = lambda value: "–" if value is None else f"{value:.2f}"
    templates.filters["signed"] = lambda value: "–" if value is None else f"{value:+.2f}".replace("-", "−")
    return templates


# ---------------------------------------------------------------------- numbers
def _teacher(run: Run) -> Optional[_Model]:
    path = run.teacher_scores or os.path.join(run.folder, "teacher", SCORES_FILE)
    if not run.teacher or not (run.teacher_scores or os.path.exists(path)):
        return None
    return _Model("teacher", read_scores(path))


def _alone(run: Run) -> Optional[_Model]:
    if not run.alone:
        return None
    metrics = read_metrics(_metrics_file(run.alone))
    return _Model("alone", last_scores(metrics), _iterations(metrics))


def _metrics_file(path: str) -> str:
    return os.path.join(path, "metrics.json") if os.path.isdir(path) else path


def _iterations(metrics: Mapping[str, Series]) -> int:
    # An evaluation at the end is written under the iteration after the last.
    steps = [metrics["total_loss"]] if "total_loss" in metrics else metrics.values()
    return 1 + max(int(iterations[-1]) for iterations, _ in steps)


def _headline(models: Sequence[_Model]) -> List[Tuple[str, str]]:
    """Return the few numbers that stand at the top, as (name, value)."""
    scores = models[-1].scores
    key = main_score(scores)
    if not key or not np.isfinite(scores[key]):
        return []
    ours, others = scores[key], {model.name: model.scores.get(key, np.nan) for model in models[:-1]}
    lines = [(f"AP of {score_tables([{key: ours}])[0].title}, {models[-1].name}", f"{ours:.2f}")]
    if np.isfinite(others.get("alone", np.nan)):
        lines.append(("gained over the student alone", f"{ours - others['alone']:+.2f}".replace("-", "−")))
    if np.isfinite(others.get("teacher", np.nan)) and others["teacher"] > 0:
        lines.append(("of the teacher's AP", f"{ours / others['teacher']:.0%}"))
    return lines


def _weakest(tables: Sequence[ScoreTable], column: int) -> List[Tuple[str, float]]:
    """Return the three classes of the lowest AP in the first table that has classes."""
    classes = next((table.classes for table in tables if table.classes), [])
    known = [(row.name, value) for row in classes for value in [row.values[column]] if value is not None]
    return sorted(known, key=lambda entry: entry[1])[:3] if len(known) > 3 else []


def _times(metrics: Mapping[str, Series], memory: Mapping[str, int]) -> List[Tuple[str, str]]:
    rows = [("iterations", str(_iterations(metrics)))]
    iterations, times = metrics.get("time", (np.array([], dtype=int), np.array([])))
    if len(times):
        # Each entry stands for the steps since the one before.
        total = float((np.diff(iterations, prepend=-1) * times).sum())
        rows.append(("median time of a step", f"{np.median(times):.3f} s"))
        rows.append(("all steps, without evaluations", str(datetime.timedelta(seconds=round(total)))))
    if "data_time" in metrics:
        rows.append(("median wait for data in a step", f"{np.median(metrics['data_time'][1]):.3f} s"))
    rows += [(f"peak memory of the {name}", f"{value / 2**20:,.0f} MiB") for name, value in memory.items()]
    return rows


def _cost_rows(costs: Mapping[str, Series]) -> List[Tuple[str, str, str, int]]:
    return [(name, f"{v[0]:.4f}", f"{v[-1]:.4f}", len(v)) for name, (_, v) in costs.items()]


def _missing(run: Run, models: Sequence[_Model]) -> List[str]:
    """Return sentences about what would make the result table complete."""
    names, notes = [model.name for model in models], []
    if run.teacher and "teacher" not in names:
        notes.append("The teacher's scores are not known: --eval-teacher writes them.")
    if run.teacher and "alone" not in names:
        notes.append("There is no student that was trained alone to compare with: name its OUTPUT_DIR in REPORT.ALONE.")
    return notes


def _overtaken(models: Sequence[_Model], metrics: Mapping[str, Series]) -> List[str]:
    """Return the advice for a student that was distilled on after it had the AP of its teacher, if it was."""
    key = main_score(models[-1].scores) or ""
    teacher = next((model.scores.get(key, np.nan) for model in models if model.name == "teacher"), np.nan)
    last_loss = max((int(steps[-1]) for name, (steps, _) in metrics.items() if is_distillation_loss(name)), default=0)
    iterations, scores = metrics.get(key, ((), ()))
    # An evaluation during training is written under the iteration that it follows.
    reached = [int(i) + 1 for i, score in zip(iterations, scores) if score >= teacher and i < last_loss]
    if not reached:
        return []
    return [
        f"The student had the AP of its teacher ({teacher:.2f}) after {reached[0]} iterations and went on learning "
        f"from it. MODEL.MGD.STOP_ITER {reached[0]} would leave it the rest of the training for itself, at less cost."
    ]


# ---------------------------------------------------------------------- pictures
def _picture(draw: Callable[[IO[bytes]], Any], note: str = "") -> Picture:
    png = io.BytesIO()
    draw(png)
    return Picture("data:image/png;base64," + base64.b64encode(png.getvalue()).decode("ascii"), note)


def _costs(run: Run, metrics: Mapping[str, Series]) -> Picture:
    costs = matching_costs(metrics)
    if any(len(values) > 1 for _, values in costs.values()):
        return _picture(lambda file: plot_matching_costs(costs, file))
    if not run.teacher:
        return Picture("", "This training has no distillation.")
    if costs:
        return Picture("", "")  # the table is enough
    return Picture("", "No position of this training is matched: its losses compare the channels one to one.")


def _matching(run: Run) -> Picture:
    try:
        matched = read_matchings(run.folder)
    except (OSError, ValueError) as e:
        return Picture("", f"The first and the last matching cannot be read: {e}")
    if not matched:
        return Picture("", "")
    names = {"former_name": "first matching", "groups_name": "last matching"}
    note = "Costs of the pairs under the first and the last matching, both by the costs of the last update."
    return _picture(lambda file: plot_matching(matched, file, title="", **names), note)


def _examples(run: Run, name: str) -> Tuple[Picture, List[str]]:
    if not run.teacher:
        return Picture("", "This training has no teacher to compare with."), []
    if run.examples == 0:
        return Picture("", "REPORT.EXAMPLES is 0."), []
    of_teacher = run.teacher_detections.get(name, "")
    of_teacher = of_teacher if os.path.exists(of_teacher) else ""
    lines: List[str] = []
    try:
        if not of_teacher and run.run_teacher is None and run.no_teacher:
            raise NoExamples(run.no_teacher)

        def draw(file: IO[bytes]) -> None:
            lines.extend(
                draw_misses(
                    name,
                    run.student_detections.get(name, ""),
                    file,
                    teacher=of_teacher,
                    run_teacher=run.run_teacher,
                    number=run.examples,
                )
            )

        return _picture(draw), lines
    except NoExamples as e:
        return Picture("", str(e)), []
    except (UserError, OSError, ValueError, KeyError, RuntimeError) as e:  # of the teacher, its weights or an image
        return Picture("", f"The examples could not be drawn: {e}"), []


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as e:
        return f"{path} cannot be read: {e}"
