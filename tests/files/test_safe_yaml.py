"""Untrusted yaml configs."""

import logging
from pathlib import Path

import detectron2.model_zoo
import malicious
import pytest
import toy
from detectron2.config import get_cfg

from mgd_det.cli.yaml_setup import argument_parser, check_proposal_files, read_config
from mgd_det.config import add_mgd_config, merge_config
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES, unsafe_files_allowed
from mgd_det.modeling.teachers import teacher_config

INSTALLED = Path(detectron2.model_zoo.__file__).parent / "configs"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    monkeypatch.delenv(ALLOW_UNSAFE_FILES, raising=False)


def write_config(folder, marker):
    (folder / "evil.yaml").write_text(f"OUTPUT_DIR: x\nMODEL:\n  WEIGHTS: {malicious.yaml_tag(marker)}\n")
    return folder / "evil.yaml"


def write_base(folder, marker):
    path = write_config(folder, marker)
    path.rename(folder / "base.yaml")
    path.write_text("_BASE_: base.yaml\n")
    return path


def write_list_of_bases(folder, marker):
    path = write_base(folder, marker)
    (folder / "good.yaml").write_text("VERSION: 2\n")
    path.write_text(f"_BASE_: [good.yaml, {folder}/base.yaml]\n")
    return path


def warnings_of(caplog):
    """Return the warnings about unsafe files, of this project or of fvcore."""
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [warning for warning in warnings if "unsafe" in warning]


@pytest.mark.parametrize("write, named", [(write_config, "evil"), (write_base, "base"), (write_list_of_bases, "base")])
def test_code_in_yaml_runs_by_the_flag_only(tmp_path, monkeypatch, caplog, write, named):
    marker = tmp_path / "marker"
    path = write(tmp_path, marker)
    with pytest.raises(
        UserError, match=f"config {path}: .*{named}.yaml, line 3, has the yaml tag .*os.mkdir.*allow-unsafe-files"
    ):
        read_config(str(path))
    assert not marker.exists()

    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    cfg = merge_config(str(path), [])
    assert marker.exists() and cfg.OUTPUT_DIR == "x"
    [warning] = warnings_of(caplog)
    assert f"{named}.yaml" in warning


def test_the_teachers_config(tmp_path):
    path = write_base(tmp_path, tmp_path / "marker")
    cfg = read_config(toy.RETINANET, ["MODEL.MGD.TEACHER.CONFIG_FILE", str(path)])
    with pytest.raises(UserError, match="of MODEL.MGD.TEACHER: .*base.yaml, line 3, has the yaml tag"):
        teacher_config(cfg)
    assert not (tmp_path / "marker").exists()


def test_detectron2s_own_configs_stay_readable(tmp_path, caplog):
    """Its anchor sizes are an expression of Python; below a user's file, too, and without a warning."""
    (tmp_path / "own.yaml").write_text(f"_BASE_: {INSTALLED}/Base-RetinaNet.yaml\nOUTPUT_DIR: x\n")
    (tmp_path / "link.yaml").symlink_to(INSTALLED / "Base-RetinaNet.yaml")
    for path in (RETINANET, str(tmp_path / "own.yaml"), str(tmp_path / "link.yaml")):
        sizes = read_config(path).MODEL.ANCHOR_GENERATOR.SIZES
        assert sizes == [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    assert warnings_of(caplog) == []


def test_where_a_file_lies_counts_and_not_its_path(tmp_path):
    evil = write_config(tmp_path, tmp_path / "marker")
    roundabout = INSTALLED.joinpath(*[".."] * len(INSTALLED.resolve().parts), *evil.parts[1:])
    (tmp_path / "copy.yaml").write_text((INSTALLED / "Base-RetinaNet.yaml").read_text())
    for path, tag in ((roundabout, "os.mkdir"), (tmp_path / "copy.yaml", "eval")):
        assert path.is_file()
        with pytest.raises(UserError, match=f"has the yaml tag .*{tag}"):
            merge_config(str(path), [])
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("version", [1, 2])
def test_plain_yaml_is_merged_as_detectron2_merges_it(tmp_path, version):
    """Of an old version, too, which Detectron2 brings up to date."""
    size = "MAX_SIZE_TRAIN: 77" if version == 2 else "MAX_SIZE_TRAIN: 77\n  CROP: {ENABLED: True}"
    (tmp_path / "base.yaml").write_text(f"VERSION: {version}\nINPUT:\n  {size}\nSOLVER: {{STEPS: [5, 6]}}\n")
    (tmp_path / "own.yaml").write_text(f"_BASE_: base.yaml\nVERSION: {version}\nSOLVER: {{BASE_LR: 0.5}}\n")
    cfg = merge_config(str(tmp_path / "own.yaml"), [])
    expected = get_cfg()
    add_mgd_config(expected)
    expected.merge_from_file(str(tmp_path / "own.yaml"))
    assert type(cfg) is type(expected) and type(cfg.INPUT) is type(expected.INPUT)
    assert cfg.SOLVER == expected.SOLVER and cfg.INPUT == expected.INPUT
    assert cfg.SOLVER.STEPS == (5, 6) and cfg.INPUT.MAX_SIZE_TRAIN == 77


def test_a_fault_that_is_no_tag(tmp_path, monkeypatch):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    (tmp_path / "bad.yaml").write_text("{[1, 2]: 3}")
    with pytest.raises(UserError, match="(?s)config .*bad.yaml: .*unhashable key"):
        merge_config(str(tmp_path / "bad.yaml"), [])


def test_precomputed_proposals(tmp_path):
    malicious.write_pickle(tmp_path / "boxes.pkl", tmp_path / "marker")
    opts = ["DATASETS.PROPOSAL_FILES_TRAIN", (str(tmp_path / "boxes.pkl"),)]
    check_proposal_files(read_config("", opts))  # they are not read
    with pytest.raises(UserError, match=r"DATASETS.PROPOSAL_FILES_TRAIN .*boxes.pkl: it refers to \w+.mkdir"):
        check_proposal_files(read_config("", [*opts, "MODEL.LOAD_PROPOSALS", True]))
    assert not (tmp_path / "marker").exists()


def test_the_flag(monkeypatch):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "0")  # undone at the end, whatever the flag sets
    argument_parser().parse_args([])
    assert not unsafe_files_allowed()
    argument_parser().parse_args(["--allow-unsafe-files"])
    assert unsafe_files_allowed()


def test_no_config_allows_itself(tmp_path):
    for key in ("ALLOW_UNSAFE_FILES", ALLOW_UNSAFE_FILES, "allow_unsafe_files"):
        (tmp_path / "own.yaml").write_text(f"{key}: true\nOUTPUT_DIR: {malicious.yaml_tag(tmp_path / 'marker')}\n")
        with pytest.raises(UserError):
            read_config(str(tmp_path / "own.yaml"), [])
        assert not unsafe_files_allowed() and not (tmp_path / "marker").exists()
