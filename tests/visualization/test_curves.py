"""Curves of metrics.json: what is read from it, also after a kill and a resume, and what is drawn."""

import json
import logging

import numpy as np
import pytest
from matplotlib.image import imread

from mgd_det.errors import UserError
from mgd_det.visualization.curves import detection_loss, plot_curves, read_metrics, smooth


def write(path, rows, end=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def series(metrics, name):
    iterations, values = metrics[name]
    return list(zip(iterations.tolist(), values.tolist()))


def row(iteration, total, **others):
    return {"iteration": iteration, "total_loss": total, "loss_cls": total, **others}


def test_series_are_what_was_written(tmp_path):
    rows = [
        row(19, 3.0, loss_cls=1.5, loss_box_reg=0.75, loss_mgd_res3=0.5, loss_mgd_res4=0.25, lr=0.1),
        row(39, 2.0, loss_cls=1.0, loss_box_reg=0.5, loss_mgd_res3=9.5, lr=0.1),
        row(59, 1.5, loss_cls=1.5, lr=0.1, **{"bbox/AP": 12.5}),
    ]
    metrics = read_metrics(write(tmp_path / "metrics.json", rows))
    assert series(metrics, "total_loss") == [(19, 3.0), (39, 2.0), (59, 1.5)]
    assert series(metrics, "loss_mgd_res4") == [(19, 0.25)]
    assert series(metrics, "bbox/AP") == [(59, 12.5)]
    assert "iteration" not in metrics
    iterations, values = detection_loss(metrics)
    assert iterations.tolist() == [19, 39, 59]
    assert values.tolist() == [2.25, 1.5, 1.5]


def test_detection_loss_of_a_run_without_losses(tmp_path):
    metrics = read_metrics(write(tmp_path / "m.json", [{"iteration": 7, "bbox/AP": 3.0}]))
    iterations, values = detection_loss(metrics)
    assert len(iterations) == len(values) == 0


def test_entries_of_one_iteration_add_up(tmp_path):
    """Detectron2 writes metrics that came late in a line of their own."""
    rows = [row(19, 3.0), {"iteration": 19, "bbox/AP": 5.0}, {"iteration": 12, "mgd/cost_res2": 1.0}, row(39, 2.0)]
    metrics = read_metrics(write(tmp_path / "m.json", rows))
    assert series(metrics, "total_loss") == [(19, 3.0), (39, 2.0)]
    assert series(metrics, "bbox/AP") == [(19, 5.0)]
    assert series(metrics, "mgd/cost_res2") == [(12, 1.0)]


def test_half_a_last_line_is_skipped(tmp_path, caplog):
    path = write(tmp_path / "m.json", [row(19, 3.0), row(39, 2.0)], end='{"iteration": 59, "total_lo')
    with caplog.at_level(logging.WARNING):
        assert series(read_metrics(path), "total_loss") == [(19, 3.0), (39, 2.0)]
    assert "line 3" in caplog.text


def test_resumed_run_counts_every_iteration_once(tmp_path):
    killed = [row(19, 9.0), row(39, 8.0, **{"bbox/AP": 4.0}), row(59, 7.0), row(79, 6.0, **{"bbox/AP": 6.0})]
    resumed = [row(39, 2.0, **{"bbox/AP": 5.0}), row(59, 1.0)]  # from the checkpoint of iteration 20
    metrics = read_metrics(write(tmp_path / "m.json", killed + resumed))
    # What the killed run wrote at 79 is of weights that the resumed run does not have.
    assert series(metrics, "total_loss") == [(19, 9.0), (39, 2.0), (59, 1.0)]
    assert series(metrics, "bbox/AP") == [(39, 5.0)]


def test_resumed_in_the_middle_of_a_line(tmp_path):
    path = write(tmp_path / "m.json", [row(19, 3.0)], end='{"iteration": 39, "total_loss": 2')
    with path.open("a") as f:
        f.write(json.dumps(row(39, 1.0)) + "\n" + json.dumps(row(59, 0.5)) + "\n")
    assert series(read_metrics(path), "total_loss") == [(19, 3.0), (39, 1.0), (59, 0.5)]


def test_what_is_no_metrics_file(tmp_path):
    with pytest.raises(UserError, match="nothing.json cannot be read"):
        read_metrics(tmp_path / "nothing.json")
    (tmp_path / "m.json").write_text('[1, 2]\n{"a": 1}\n"iteration"\n')
    with pytest.raises(UserError, match="no entry of a training run"):
        read_metrics(tmp_path / "m.json")


def test_smooth_is_a_median_and_keeps_a_slope():
    values = np.array([5.0, 4.0, 100.0, 2.0, 1.0])
    assert smooth(values, 3).tolist() == [5.0, 5.0, 4.0, 2.0, 1.0]
    assert smooth(values, 1).tolist() == values.tolist()
    line = np.arange(30.0)
    assert smooth(line, 7).tolist() == line.tolist()
    assert smooth(np.array([1.0, np.nan, 3.0]), 3).tolist() == [1.0, 2.0, 3.0]


def run_of(length, distilled=False, ap=()):
    rows = []
    for i in range(length):
        iteration = 20 * i + 19
        total = 2.0 / (i + 1) + (0.5 if distilled else 0)
        rows.append(row(iteration, total, **({"loss_mgd_res3": 0.5} if distilled else {})))
        if iteration in ap:
            rows[-1]["bbox/AP"] = float(iteration)
    return rows


@pytest.mark.slow
def test_panels_appear_where_a_run_has_their_entries(tmp_path):
    plain = write(tmp_path / "plain.json", run_of(30))
    distilled = write(tmp_path / "distilled.json", run_of(30, distilled=True))
    evaluated = write(tmp_path / "evaluated.json", run_of(30, distilled=True, ap=(199, 399)))
    for runs, panels in [([plain], 1), ([plain, distilled], 2), ([plain, distilled, evaluated], 3)]:
        output = tmp_path / "pictures" / f"{panels}.png"
        assert plot_curves({path.stem: path for path in runs}, output) == str(output)
        picture = imread(output)
        assert picture.shape[:2] == (440, 540 * panels)
        for panel in range(panels):
            part = picture[:, 540 * panel : 540 * (panel + 1), :3]
            saturated = (part.max(axis=2) - part.min(axis=2)) > 0.2  # lines; axes and text are grey
            assert saturated.mean() > 0.001, f"panel {panel} of {panels} has no line"


def test_short_runs_and_values_that_are_not_numbers(tmp_path):
    nan = write(tmp_path / "nan.json", [row(19, 1.0), row(39, float("nan"), **{"bbox/AP": float("nan")})])
    one = write(tmp_path / "one.json", [row(19, 1.0)])
    picture = imread(plot_curves({"nan": nan, "one": one}, tmp_path / "curves.png"))
    assert picture.shape[:2] == (440, 540)


def test_no_runs():
    with pytest.raises(ValueError, match="at least one run"):
        plot_curves({}, "nowhere.png")


def test_every_distillation_loss_counts_as_one():
    names = ["loss_mgd_res2", "loss_pkd_p3", "loss_cwd_p3", "loss_l2_res4", "loss_at_res4_expansion"]
    names += ["loss_kd_logits", "loss_kd_boxes", "loss_kd_masks", "loss_kd_cross_cls", "loss_kd_cross_boxes"]
    names += ["loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_fcos_ctr", "loss_mask", "loss_box_reg_stage0"]
    metrics = {name: (np.array([1]), np.array([2.0**i])) for i, name in enumerate(names)}
    iterations, losses = detection_loss(metrics)
    assert iterations.tolist() == [1] and losses.tolist() == [sum(2.0**i for i in range(10, 16))]
