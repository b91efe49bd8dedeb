"""The runner of studies, with a stand-in for the training program: seconds for a whole study."""

import dataclasses
import hashlib
import threading
from pathlib import Path

import pytest
from accuracy_study import runner as runner_module
from accuracy_study.equal_time import longer_schedule, time_ratio
from accuracy_study.processes import LoggedProcess
from accuracy_study.results import COLUMNS, Result, overrides_of_text
from study_place import STAND_IN, STUDY

from mgd_det.errors import UserError

pytestmark = pytest.mark.slow


ALL = [("alone", 1), ("distilled", 1), ("alone", 2), ("distilled", 2), ("same_time", 1), ("same_time", 2)]


def test_all_trainings_are_run_and_written_seed_by_seed(place):
    assert place.run() == []
    assert place.keys() == place.trained() == ALL
    row = next(row for row in place.rows() if (row.arm, row.seed) == ("distilled", 2))
    assert dataclasses.asdict(row) == {
        "study": "toy",
        "arm": "distilled",
        "seed": 2,
        "config": "FashionScenes/retinanet_MobileNetV2_FPN_mgd_R50.yaml",
        "overrides": f"SOLVER.MAX_ITER 600 SOLVER.STEPS '[420, 540]' MODEL.MGD.TEACHER.WEIGHTS {place.teacher}",
        "evaluation_set": "fashion_scenes_small_val",
        "AP": 2.6,
        "AP50": 22.0,
        "AP75": 5.0,
        "mask_AP": None,
        "iterations": 600,
        "seconds": 270.0,
        "cpu_seconds": 90.0,
        "seconds_per_iteration": 0.45,
        "cpu_seconds_per_iteration": 0.15,
        "curve": "300:1.23 600:2.60",
        "teacher": "ba7816bf8f01",  # sha256 of "abc", the example of FIPS 180
        "commit": "abc",
        "torch": "2.0",
        "device": "cpu",
        "hardware": "abacus",
    }
    assert row.curve_points() == {300: 1.23, 600: 2.6}
    assert next(row for row in place.rows() if row.arm == "alone").teacher == ""


def test_equal_time_is_the_ratio_of_cpu_times(place):
    place.run()
    # 0.15 s against 0.1 s a step: 1.5 times as many iterations; 420 and 540 in proportion.
    row = next(row for row in place.rows() if row.arm == "same_time")
    assert row.iterations == 900
    assert overrides_of_text(row.overrides) == {"SOLVER.MAX_ITER": "900", "SOLVER.STEPS": "[630, 810]"}


def test_what_the_csv_has_is_not_run_again(place):
    place.run()
    started = len(place.calls())
    assert place.run(commit="another") == []
    assert len(place.calls()) == started and place.keys() == ALL


def test_more_seeds_keep_the_length_of_equal_time(place):
    place.run()
    program = place.folder / "train.py"
    program.write_text(STAND_IN.replace('"distilled": 0.15', '"distilled": 0.5'))
    place.write_study(STUDY.replace("[1, 2]", "[1, 2, 3, 4, 5]"))
    place.run()
    assert len(place.keys()) == 15
    assert {row.iterations for row in place.rows() if row.arm == "same_time"} == {900}


def test_a_result_that_was_not_yet_read_is_read_and_not_run_again(place):
    place.run()
    csv = place.folder / "results.csv"
    lines = csv.read_text().splitlines(keepends=True)
    csv.write_text("".join(line for line in lines if not line.startswith("toy,alone,1,")))
    started = len(place.calls())
    assert place.run(commit="another") == []
    assert len(place.calls()) == started
    assert next(row.commit for row in place.rows() if (row.arm, row.seed) == ("alone", 1)) == "abc"


def test_a_failed_training_is_reported_with_its_log_and_stops_no_other(place):
    (place.folder / "fail_alone_2").write_text("")
    (failure,) = place.run()
    assert "alone, seed 2" in failure and "status 3" in failure and failure.endswith("the disk is on fire")
    # The pair of seed 1 sets the length of equal time.
    assert place.keys() == [key for key in ALL if key != ("alone", 2)]
    (place.folder / "fail_alone_2").unlink()
    assert place.run() == []
    assert set(place.keys()) == set(ALL) and place.trained()[-1] == ("alone", 2)


def test_without_a_pair_the_equal_time_is_not_guessed(place):
    for seed in (1, 2):
        (place.folder / f"fail_distilled_{seed}").write_text("")
    failures = place.run()
    assert len(failures) == 4
    assert all("distilled" in failure and "no seed" in failure for failure in failures[2:])
    assert {arm for arm, _ in place.trained()} == {"alone", "distilled"}


def test_a_training_that_was_cut_is_resumed(place):
    (place.folder / "cut_alone_1").write_text("")
    (failure,) = place.run()
    assert "alone, seed 1: training was interrupted" in failure
    (place.folder / "cut_alone_1").unlink()
    assert place.run() == []
    last = [call for call in place.calls() if "SEED" in call][-1]
    assert "--resume" in last["argv"] and last["OUTPUT_DIR"].endswith("alone/seed1")


@pytest.mark.parametrize("change", ["overrides", "commit"])
def test_a_cut_training_of_something_else_starts_again(place, change):
    (place.folder / "cut_alone_1").write_text("")
    place.run()
    (place.folder / "cut_alone_1").unlink()
    (place.folder / "results.csv").unlink()
    if change == "overrides":
        place.write_study(STUDY.replace("600", "500"))
    assert place.run(commit="other" if change == "commit" else "abc") == []
    retrained = [call for call in place.calls() if "SEED" in call and call["OUTPUT_DIR"].endswith("alone/seed1")]
    assert len(retrained) == 2 and "--resume" not in retrained[1]["argv"]


@pytest.mark.parametrize("change", ["overrides", "config", "teacher"])
def test_results_of_another_training_under_the_same_name_are_refused(place, change):
    place.run()
    if change == "teacher":
        place.teacher.write_bytes(b"another")
    else:
        old, new = {
            "overrides": ("SOLVER.MAX_ITER: 600", "SOLVER.MAX_ITER: 601"),
            "config": ("FashionScenes/retinanet_MobileNetV2_FPN.yaml", "demo/retinanet_MobileNetV2_FPN.yaml"),
        }[change]
        place.write_study(STUDY.replace(old, new))
    with pytest.raises(UserError, match=f"{place.folder}/results.csv.*{change}"):
        place.runner()


def test_as_many_run_side_by_side_as_there_are_workers(place):
    (place.folder / "slow").write_text("")
    place.run(workers=2)
    together, most = 0, 0
    for call in sorted(place.calls(), key=lambda call: call["time"]):
        together += -1 if call["end"] else 1
        most = max(most, together)
    assert most == 2


def test_equal_time_waits_for_the_arms_that_set_it(place):
    place.run(workers=6)
    calls = place.calls()
    first = next(i for i, call in enumerate(calls) if "same_time" in call.get("OUTPUT_DIR", ""))
    assert sum(call["end"] for call in calls[:first]) == 4


def test_the_final_set_has_rows_of_its_own(place):
    text = STUDY.replace("arms:", "final: {fashion_scenes: small, seed: 7, images: 100}\narms:")
    place.write_study(text)
    assert place.run() == []
    final = [row for row in place.rows() if row.evaluation_set == "fashion_scenes_small_seed7_val"]
    assert [(row.arm, row.seed) for row in final] == ALL
    assert {(row.AP, row.AP50, row.AP75, row.curve) for row in final} == {(1.0, 2.0, 0.5, "")}
    assert final[0].cpu_seconds == 60.0  # of its training
    started = len(place.calls())
    place.run()
    assert len(place.calls()) == started


def test_a_lost_final_evaluation_is_repeated_without_training(place):
    place.write_study(STUDY.replace("arms:", "final: {fashion_scenes: small, seed: 7, images: 100}\narms:"))
    place.run()
    csv = place.folder / "results.csv"
    kept = csv.read_text().splitlines(keepends=True)[:-1]
    csv.write_text("".join(kept))
    started = len(place.calls())
    assert place.run() == []
    assert ["--eval-only" in call["argv"] for call in place.calls()[started:]] == [True]


TEACHER_ARM = """  - name: teacher
    config: FashionScenes/retinanet_R_50_FPN.yaml
    overrides: {MODEL.WEIGHTS: TEACHER}
    eval_only: true
"""


def test_an_arm_that_is_not_trained_is_evaluated_once_on_both_sets(place):
    final = "final: {fashion_scenes: small, seed: 7, images: 100}\narms:"
    place.write_study(STUDY.replace("arms:", final) + TEACHER_ARM)
    assert place.run() == []
    rows = [row for row in place.rows() if row.arm == "teacher"]
    assert [(row.seed, row.evaluation_set) for row in rows] == [
        (0, "fashion_scenes_small_val"),
        (0, "fashion_scenes_small_seed7_val"),
    ]
    for row in rows:
        assert (row.AP, row.iterations, row.cpu_seconds, row.cpu_seconds_per_iteration, row.curve) == (1.0, 0, 0, 0, "")
        assert row.teacher == hashlib.sha256(b"abc").hexdigest()[:12]  # of the weights that it evaluates
    calls = [call["argv"] for call in place.calls() if "retinanet_R_50_FPN" in " ".join(call.get("argv", []))]
    assert ["--eval-only" in argv for argv in calls] == [True, True]
    assert all(argv[argv.index("MODEL.WEIGHTS") + 1] == str(place.teacher) for argv in calls)
    started = len(place.calls())
    assert place.run() == [] and len(place.calls()) == started
    place.teacher.write_bytes(b"other")
    with pytest.raises(UserError, match="teacher"):
        place.runner()


def test_an_arm_that_is_not_trained_needs_weights(place):
    place.write_study(STUDY + TEACHER_ARM.replace("overrides: {MODEL.WEIGHTS: TEACHER}", "overrides: {}"))
    with pytest.raises(UserError, match="eval_only evaluates MODEL.WEIGHTS, which is empty"):
        place.runner()


def test_averaged_weights_are_those_that_the_final_set_scores(place):
    overrides = "{MODEL.MGD.TEACHER.WEIGHTS: TEACHER}"
    averaged = overrides.replace("}", ", SOLVER.EMA.ENABLED: true}")
    text = STUDY.replace(overrides, averaged).replace("seeds: [1, 2]", "seeds: [1]")
    place.write_study(text.replace("arms:", "final: {fashion_scenes: small, seed: 7, images: 100}\narms:"))
    for arm in ("distilled", "alone"):
        (place.folder / "output" / arm / "seed1").mkdir(parents=True)
        (place.folder / "output" / arm / "seed1" / "model_ema.pth").write_text("")
    assert place.run() == []
    names = {Path(c["MODEL.WEIGHTS"]).parts[-3::2] for c in place.calls() if "--val-json" in c}
    assert names >= {("distilled", "model_ema.pth"), ("alone", "model_final.pth")}


def test_an_interrupted_study_stops_its_trainings(place, monkeypatch):
    (place.folder / "wait").write_text("")
    training = place.folder / "output" / "alone" / "seed1"

    def sleep(seconds):
        if (training / "waiting").exists():
            monkeypatch.undo()  # waiting for the processes sleeps too
            raise KeyboardInterrupt
        threading.Event().wait(seconds)

    monkeypatch.setattr(runner_module.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        place.run()
    assert (training / "stopped").exists()


# ------------------------------------------------------------------ equal time
def row(seed, cpu, wall=1.0, device="cpu", hardware="abacus"):
    values = dict.fromkeys(COLUMNS, "")
    values.update(seed=seed, cpu_seconds=cpu, seconds=wall, device=device, hardware=hardware)
    return Result(**values)


def test_time_ratio_is_the_median_over_the_seeds_of_both():
    plain = [row(1, 10.0), row(2, 20.0), row(3, 10.0), row(4, 1.0)]
    distilled = [row(3, 13.0), row(1, 14.0), row(2, 80.0), row(9, 1000.0)]
    assert time_ratio(plain, distilled) == 1.4  # of 1.3, 1.4 and 4.0: one training on a loaded machine changes nothing


def test_on_a_gpu_wall_clock_time_counts():
    plain, distilled = [row(1, 10.0, 100.0, "cuda")], [row(1, 50.0, 120.0, "cuda")]
    assert time_ratio(plain, distilled) == 1.2


def test_times_of_different_machines_are_not_compared():
    with pytest.raises(UserError, match="no seed"):
        time_ratio([row(1, 10.0)], [row(1, 14.0, hardware="a faster abacus")])


def test_longer_schedule_by_hand():
    # 600 * 1.43 = 858; 420 * 858 / 600 = 600.6; 540 * 858 / 600 = 772.2.
    assert longer_schedule(600, (420, 540), 1.43) == {"SOLVER.MAX_ITER": 858, "SOLVER.STEPS": [601, 772]}


def test_a_long_evaluation_does_not_lose_the_iteration(tmp_path):
    log = tmp_path / "stdout.txt"
    process = LoggedProcess(["true"], log)
    assert process.iteration() == 0
    log.write_text("eta: 0:00:01  iter: 119  total_loss: 1\n")
    assert process.iteration() == 120
    with open(log, "a") as file:
        file.write("inference done\n" * 1000)
    assert process.iteration() == 120
