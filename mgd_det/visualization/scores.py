"""Scores of several models side by side, from metrics.json or from the scores.json of an evaluation.

Scores are flat: "bbox/AP", "bbox/AP-<class>", and with several test sets "<set>/bbox/AP". Those of averaged weights
(SOLVER.EMA) have "ema/" in front.
"""

import json
import math
import os
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from detectron2.utils.file_io import PathManager

from mgd_det.errors import UserError
from mgd_det.visualization.curves import Series
from mgd_det.visualization.figures import PathLike

SCORES_FILE = "scores.json"

_TASKS = {
    "bbox": "boxes",
    "segm": "masks",
    "keypoints": "keypoints",
    "sem_seg": "semantic segmentation",
    "panoptic_seg": "panoptic segmentation",
    "box_proposals": "proposals",
}
# A class name may hold a slash (T-shirt/top), so the task is looked for, not the last slash.
_KEY = re.compile(rf"(?:(?P<ema>ema)/)?(?:(?P<set>.+?)/)?(?P<task>{'|'.join(_TASKS)})(?P<tta>_TTA)?/(?P<metric>.+)")

Scores = Mapping[str, float]


class Row(NamedTuple):
    """A line of a table: one number for each model, None if it has none."""

    name: str
    values: List[Optional[float]]


@dataclass(frozen=True)
class ScoreTable:
    """The scores of all models in one task on one set.

    Attributes:
        title: "boxes", or "my_val, boxes" if there are several sets.
        rows: the metrics, from "AP" on.
        classes: AP of each class, empty if there is only one.
    """

    title: str
    rows: List[Row]
    classes: List[Row]


def last_scores(metrics: Mapping[str, Series]) -> Dict[str, float]:
    """Return the scores of the last evaluation of a training.

    Args:
        metrics: as :func:`mgd_det.visualization.read_metrics` returns them.
    """
    return {name: float(values[-1]) for name, (_, values) in metrics.items() if _KEY.fullmatch(name)}


def write_scores(results: Mapping[str, Any], path: PathLike) -> None:
    """Write the nested results of an evaluation as flat scores, so that a report can show them.

    A score that is not defined, such as the AP of large objects where there are none, is null.
    """
    scores = {key: value if math.isfinite(value) else None for key, value in _flat(results).items()}
    with PathManager.open(os.fspath(path), "w") as file:
        json.dump(scores, file, indent=1, sort_keys=True)


def read_scores(path: PathLike) -> Dict[str, float]:
    """Read what :func:`write_scores` wrote.

    Raises:
        UserError: the file cannot be read, or has no scores.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        known = {k: v for k, v in content.items() if _KEY.fullmatch(k)}
        scores = {k: math.nan if v is None else float(v) for k, v in known.items()}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"scores {os.fspath(path)} cannot be read: {e}") from e
    if not scores:
        raise UserError(f"{os.fspath(path)} has no scores such as bbox/AP: is it the {SCORES_FILE} of --eval-teacher?")
    return scores


def main_score(scores: Scores) -> str:
    """Return the key that stands for a model, the AP of boxes if there is one; "" if there is no AP."""
    keys = [key for key in scores if key.endswith("/AP")]
    return min(keys, key=lambda key: (key.find("bbox") == -1, "_TTA" in key, key.startswith("ema/")), default="")


def score_tables(models: Sequence[Scores]) -> List[ScoreTable]:
    """Return one table for each set and task.

    Args:
        models: the scores of each model, in the order of the columns; {} for unknown ones.
    """
    parts: Dict[Tuple[str, str], Dict[str, List[Optional[float]]]] = {}
    for index, scores in enumerate(models):
        for key, value in scores.items():
            match = _KEY.fullmatch(key)
            if match is None:
                continue
            task = _TASKS[match["task"]] + (" with test-time augmentation" if match["tta"] else "")
            task += " of the averaged weights" if match["ema"] else ""
            table = parts.setdefault((match["set"] or "", task), {})
            row = table.setdefault(match["metric"], [None] * len(models))
            row[index] = value if math.isfinite(value) else None
    tables = []
    for (name, task), rows in parts.items():
        classes = [Row(k[3:], v) for k, v in sorted(rows.items()) if k.startswith("AP-")]
        metrics = [Row(k, v) for k, v in rows.items() if not k.startswith("AP-")]
        tables.append(ScoreTable(f"{name}, {task}" if name else task, sorted(metrics, key=_rank), classes))
    return tables


def _rank(row: Row) -> Tuple[int, str]:
    order = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    return order.index(row.name) if row.name in order else len(order), row.name


def _flat(results: Mapping[str, Any], prefix: str = "") -> Dict[str, float]:
    flat: Dict[str, float] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = float(value)
    return flat
