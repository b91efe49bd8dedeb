"""The table at the end of a distillation: teacher, student alone, student distilled."""

import json
import os
from typing import Any, Dict, List, Mapping, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate

from mgd_det.config import without_distillation
from mgd_det.files.atomic_files import write_text_atomically
from mgd_det.modeling.teachers import teacher_config
from mgd_det.visualization import read_metrics
from mgd_det.visualization.scores import last_scores, read_scores

_SCORES = {
    "AP": "bbox/AP",
    "AP50": "bbox/AP50",
    "AP75": "bbox/AP75",
    "mask AP": "segm/AP",
    "keypoint AP": "keypoints/AP",
}
_ALWAYS = ("AP", "AP50", "AP75")

Row = Dict[str, Any]


def write_comparison(cfg: CfgNode, alone_dir: str, teacher_scores: str = "") -> str:
    """Write comparison.json and comparison.md to OUTPUT_DIR, and return the table.

    Args:
        cfg: the config of the distilled student, whose training is over.
        alone_dir: OUTPUT_DIR of the student alone.
        teacher_scores: scores.json of the teacher's evaluation; "" if it cannot be scored on these data.

    Raises:
        UserError: a training left no metrics.json.
    """
    folder = cfg.OUTPUT_DIR
    student, teacher = parameters(without_distillation(cfg)), parameters(teacher_config(cfg))
    alone, distilled = (read_metrics(os.path.join(path, "metrics.json")) for path in (alone_dir, folder))
    runs = (
        ("teacher", read_scores(teacher_scores) if teacher_scores else {}, teacher, None),
        ("student alone", last_scores(alone), student, _seconds(alone, cfg.SOLVER.MAX_ITER)),
        ("student distilled", last_scores(distilled), student, _seconds(distilled, cfg.SOLVER.MAX_ITER)),
    )
    rows: List[Row] = []
    for dataset in cfg.DATASETS.TEST:
        # The scores of one of several sets have its name before theirs.
        prefix = f"{dataset}/" if len(cfg.DATASETS.TEST) > 1 else ""
        for name, scores, number, seconds in runs:
            row: Row = {"detector": name, "data set": dataset}
            row.update({title: _finite(scores.get(prefix + key)) for title, key in _SCORES.items()})
            rows.append({**row, "parameters": number, "training seconds": seconds})
    content = {"iterations": cfg.SOLVER.MAX_ITER, "seed": cfg.SEED, "rows": rows}
    solver = cfg.SOLVER
    table = comparison_table(rows) + (
        f"\n\n{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images, seed {cfg.SEED}, one training each. "
        "Time: iterations times the mean time of one, without evaluation and saving.\n"
    )
    for path, text in (("comparison.json", json.dumps(content, indent=1)), ("comparison.md", table)):
        write_text_atomically(os.path.join(folder, path), text)
    return f"{table}\nThe table is in {os.path.join(folder, 'comparison.md')} and .json."


def comparison_table(rows: List[Row]) -> str:
    """Return the rows of :func:`write_comparison` as a markdown table, without columns of scores that nobody has."""
    scores = [title for title in _SCORES if title in _ALWAYS or any(row[title] is not None for row in rows)]
    sets = ["data set"] if len({row["data set"] for row in rows}) > 1 else []
    lines = []
    for row in rows:
        shown = ["-" if row[title] is None else f"{row[title]:.2f}" for title in scores]
        seconds = row["training seconds"]
        time = "-" if seconds is None else f"{seconds:.0f}"
        lines.append([row["detector"], *(row[k] for k in sets), *shown, f"{row['parameters'] / 1e6:.2f}", time])
    headers = ["detector", *sets, *scores, "parameters (M)", "training s"]
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def parameters(cfg: CfgNode) -> int:
    """Return the number of parameters of a plain detector, which is built without memory for them."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(cfg).parameters())


def _finite(score: Optional[float]) -> Optional[float]:
    """Return None for nan, the AP without any prediction, which json does not have."""
    return score if score is not None and np.isfinite(score) else None


def _seconds(metrics: Mapping[str, Any], iterations: int) -> Optional[float]:
    """Return the time of all steps; None for a training that is too short to be timed."""
    if "time" not in metrics:
        return None
    return float(np.mean(metrics["time"][1])) * iterations
