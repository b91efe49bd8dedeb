"""tools/check_dataset.py as a user runs it."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import coco_data
import pytest
from coco_data import annotation

from mgd_det.data import check_dataset, register_coco_folder
from mgd_det.errors import UserError

SCRIPT = Path(__file__).parents[2] / "tools" / "check_dataset.py"
NAME = "test_check_tool"


@pytest.fixture
def program(monkeypatch, capsys):
    """Runs it in this process; returns (exit status, stdout, stderr)."""

    def run(*argv):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, argv)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return (end.value.code, *capsys.readouterr())

    yield run
    coco_data.forget(NAME)


@pytest.fixture
def broken(tmp_path):
    """(json, images) of a set with something of every kind."""
    content = coco_data.content()
    json_file, images = coco_data.write(tmp_path, content)
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    coco_data.truncate(images / "3.png")
    content["images"][3]["width"] = 65
    content["annotations"] += [annotation(11, bbox=[0, 0, -1, 2]), annotation(12, bbox=[60, 40, 9, 20], image_id=5)]
    del content["annotations"][4]["area"]
    json_file.write_text(json.dumps(content))
    return json_file, images


def table(out):
    rows = [line.rsplit(maxsplit=2) for line in out.splitlines()]
    return {(row[0], row[1]): int(row[2]) for row in rows if len(row) == 3 and row[1] in ("breaks", "noted")}


def test_a_sound_set(tmp_path, program):
    json_file, images = coco_data.write(tmp_path, coco_data.content())
    status, out, err = program("--json", json_file, "--images", images, "--eval", "--masks")
    assert status == 0
    assert out.strip() == (
        f"{json_file}: 6 usable images, 5 annotations, 3 classes; 0 problems that break training, 0 notes."
    )
    assert "Traceback" not in err


def test_all_problems_are_listed_and_counted(broken, program, tmp_path):
    json_file, images = broken
    status, out, err = program("--json", json_file, "--images", images, "--output", tmp_path / "problems.json")
    assert status == 1
    assert f"breaks: missing image: image 1: '{images}/1.png'" in out
    assert f"breaks: empty image file: image 2: '{images}/2.png'" in out
    assert f"breaks: unreadable image: image 3: '{images}/3.png' cannot be read" in out
    assert f"breaks: wrong image size: image 4: '{images}/4.png' has 64 x 48" in out
    assert "breaks: invalid box: annotation 11: bbox [0, 0, -1, 2]" in out
    assert "noted: box sticks out of the image: annotation 12: bbox [60, 40, 9, 20]" in out
    assert table(out) == {
        ("missing image", "breaks"): 1,
        ("empty image file", "breaks"): 1,
        ("unreadable image", "breaks"): 1,
        ("wrong image size", "breaks"): 1,
        ("invalid box", "breaks"): 1,
        ("box sticks out of the image", "noted"): 1,
        ("missing key", "noted"): 1,
    }
    assert "5 problems that break training, 2 notes" in out
    assert "reading images" in err and "0/4" in err  # progress; two images are known not to be there
    written = json.loads((tmp_path / "problems.json").read_text())
    assert len(written) == 7
    (unreadable,) = [p for p in written if p["kind"] == "unreadable image"]
    assert (unreadable["file"], unreadable["entry"], unreadable["breaks"]) == (f"{images}/3.png", 3, True)


def test_without_decoding_it_finds_what_training_refuses(broken, program):
    """And the command in the refusal is one that lists it."""
    register_coco_folder(NAME, *broken, broken_input="skip")
    with pytest.raises(UserError) as error:
        check_dataset(NAME, ["area", "iscrowd"])
    command = next(line for line in str(error.value).splitlines() if "tools/check_dataset.py" in line)
    argv = shlex.split(command.split("tools/check_dataset.py")[1])
    status, out, _ = program(*argv, "--skip-decoding")
    assert status == 1
    breaking = {kind: count for (kind, how), count in table(out).items() if how == "breaks"}
    assert breaking == {"missing image": 1, "empty image file": 1, "invalid box": 1, "missing key": 1}
    assert "4 broken entries" in str(error.value)


def test_a_registered_set(broken, program):
    register_coco_folder(NAME, *broken, broken_input="skip")
    status, out, _ = program("--dataset", NAME, "--workers", 2)
    assert status == 1 and str(broken[0]) in out and "unreadable image" in out


def test_a_json_that_cannot_be_read(tmp_path, program):
    json_file, images = coco_data.write(tmp_path, coco_data.content())
    json_file.write_text("{")
    status, out, _ = program("--json", json_file, "--images", images)
    assert status == 1 and "breaks: unreadable json" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--json", "nothing.json", "--images", "."], "no file 'nothing.json'"),
        (["--dataset", "coco_2017_trian"], "Did you mean coco_2017_train"),
        (["--dataset", "coco_2017_train_panoptic_separated"], "no file|no json"),
    ],
)
def test_mistakes(program, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = program(*argv)
    assert status == 1 and out == "" and err.count("error: ") == 1 and "Traceback" not in err
    assert any(part in err for part in message.split("|"))


@pytest.mark.parametrize("argv", [[], ["--json", "a"], ["--dataset", "a", "--json", "b", "--images", "c"]])
def test_flags_that_do_not_go_together(program, argv):
    status, _, err = program(*argv)
    assert status == 2 and "give --json and --images, or --dataset" in err


def test_an_output_that_cannot_be_written(tmp_path, program):
    paths = coco_data.write(tmp_path, coco_data.content())
    status, _, err = program("--json", paths[0], "--images", paths[1], "--output", tmp_path)
    assert status == 1 and "--output" in err and "cannot be written" in err
