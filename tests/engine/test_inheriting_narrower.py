"""Trainings of students with a narrower FPN than their teacher's, and resumed ones."""

import logging
import shutil

import pytest
import torch
import toy
from detectron2.modeling import build_model
from inheriting import loaded, overrides, plain_config

from mgd_det.cli.yaml_setup import read_config
from mgd_det.errors import ArgumentError, UserError
from mgd_det.modeling import check_inheritance, find_distillation, inherit_from_config, inherit_from_teacher

pytestmark = pytest.mark.slow

CHANNELS = "MODEL.MGD.INHERIT_CHANNELS"


@pytest.fixture
def opts(data, tmp_path):
    opts = [*overrides(data, tmp_path / "whole"), "MODEL.FPN.OUT_CHANNELS", "8", f"{CHANNELS}.NUM_BATCHES", "2"]
    opts += ["MODEL.MGD.POSITIONS", "['res4', 'p3', 'p5']", "MODEL.MGD.LOSS.NAMES", "['pkd', 'partial_l2']"]
    return opts


def groups(trainer):
    distiller = find_distillation(trainer.model).distiller
    return {p.name: distiller.groups(p)[:, 0].tolist() for p in distiller.positions if p.name.startswith("p")}


def test_levels_learn_from_the_channels_that_they_come_from_and_a_resumed_training_is_the_same(
    teacher, opts, tmp_path, caplog, monkeypatch
):
    with caplog.at_level(logging.INFO, logger="mgd_det"):
        whole = loaded(toy.distilled_config(teacher, opts=opts))
    channels = groups(whole)["p3"]
    assert len(set(channels)) == 8 and groups(whole) == {"p3": channels, "p5": channels}
    assert "fpn: 8 of 16 channels, error" in caplog.text
    # The layers that make the channels have the teacher's rows, also the norm's.
    file, state = torch.load(teacher)["model"], whole.model.state_dict()
    for name in ("backbone.fpn_output4.norm.running_mean", "backbone.top_block.p7.bias"):
        assert torch.equal(state[name].cpu(), file[name][channels]), name
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    assert groups(whole) == {"p3": channels, "p5": channels}

    part = tmp_path / "part"
    part.mkdir()
    shutil.copy(tmp_path / "whole" / "model_0000001.pth", part)
    (part / "last_checkpoint").write_text("model_0000001.pth")
    monkeypatch.setattr("mgd_det.engine.trainer.channel_batches", lambda *args: pytest.fail("measured again"))
    cfg = toy.distilled_config(teacher, opts=[*opts, "OUTPUT_DIR", str(part)])
    resumed = loaded(cfg, resume=True)
    assert groups(resumed) == {"p3": channels, "p5": channels}
    resumed.train()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())

    cfg = toy.distilled_config(teacher, opts=[*opts, "OUTPUT_DIR", str(part), f"{CHANNELS}.CRITERION", "none"])
    with pytest.raises(UserError, match="MODEL.MGD.MATCHING.KINDS 'assignment, inherited, inherited'"):
        loaded(cfg, resume=True)


def test_a_choice_without_measurement_takes_the_largest_weights(teacher, opts):
    unmeasured = [f"{CHANNELS}.CRITERION", "weight", f"{CHANNELS}.COMPENSATE", "False"]
    cfg = plain_config(teacher, [*opts, *unmeasured])
    student = build_model(cfg)
    report = inherit_from_config(cfg, student, lambda image_format: pytest.fail("measured"))
    file, own = torch.load(teacher)["model"], student.state_dict()
    score = sum(
        weight.square().sum(dim=(0, 2, 3)) / weight.square().sum()
        for weight in (
            file[f"{name}.weight"] for name in ("head.cls_subnet.0", "head.bbox_subnet.0", "backbone.top_block.p7")
        )
    )
    kept = score.argsort(descending=True)[:8].sort().values
    assert torch.equal(report.narrowed.channels["fpn"], kept)
    assert report.sliced["head.cls_subnet.0.weight"] == ((16, 16, 3, 3), (8, 8, 3, 3))
    assert torch.equal(own["backbone.top_block.p7.weight"].cpu(), file["backbone.top_block.p7.weight"][kept][:, kept])
    assert "fpn: 8 of 16 channels" in str(report) and report.other_shape["backbone.fpn_lateral5.weight"][1][0] == 8


def test_equal_widths_cost_nothing_and_change_nothing(teacher, opts):
    students, wide = [], ["MODEL.FPN.OUT_CHANNELS", "16"]
    for criterion in ("reconstruction", "none"):
        cfg = plain_config(teacher, [*opts, *wide, f"{CHANNELS}.CRITERION", criterion])
        torch.manual_seed(1)
        students.append(build_model(cfg))
        report = inherit_from_config(cfg, students[-1], lambda image_format: pytest.fail("measured"))
        assert report.narrowed is None and not report.sliced
    states = [student.state_dict() for student in students]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_teacher_gets_images_of_its_own_format_and_the_random_generator_stays(teacher, opts):
    cfg = plain_config(teacher, [*opts, f"{CHANNELS}.CRITERION", "energy"])
    cfg.MODEL.MGD.TEACHER.OPTS = [*cfg.MODEL.MGD.TEACHER.OPTS, "INPUT.FORMAT", "RGB"]
    student, formats, read = build_model(cfg), [], []

    def build(image_format):
        formats.append(image_format)
        return (read.append(seed) or toy.batch(seed=seed) for seed in range(9))

    state = torch.get_rng_state()
    inherit_from_config(cfg, student, build)
    assert formats == ["RGB"] and read == [0, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_measurement_without_batches_is_refused_and_changes_nothing(teacher, opts):
    cfg = plain_config(teacher, opts)
    student = build_model(cfg)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UserError, match=f"no batch.*{CHANNELS}"):
        inherit_from_config(cfg, student, lambda _: [])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_every_rank_has_the_channels_that_rank_0_chose(teacher, opts, run_ranks):
    cfg = plain_config(teacher, [*opts, "MODEL.DEVICE", "cpu"])

    def start(rank):
        student = build_model(cfg)
        report = inherit_from_config(cfg, student, lambda _: (toy.batch(seed=10 * rank + i) for i in range(2)))
        return report.narrowed.channels, {name: student.state_dict()[name] for name in report.sliced}

    alone = start(0)
    for channels, tensors in run_ranks(start, 2):
        assert all(torch.equal(kept, alone[0][name]) for name, kept in channels.items())
        assert all(torch.equal(value, alone[1][name]) for name, value in tensors.items())


def test_the_keyword_arguments_do_what_the_config_does(teacher, opts):
    cfg = plain_config(teacher, [*opts, f"{CHANNELS}.CRITERION", "energy_weight", f"{CHANNELS}.COMPENSATE", "False"])
    students = []
    for _ in range(2):
        torch.manual_seed(1)
        students.append(build_model(cfg))
    inherit_from_config(cfg, students[0], lambda _: [toy.batch()])
    arguments = {"config_file": toy.RETINANET, "weights": teacher, "opts": toy.teacher_opts(), "parts": ["fpn", "head"]}
    channels = {"criterion": "energy_weight", "compensate": False}
    inherit_from_teacher(students[1], **arguments, channels=channels, build_batches=lambda _: [toy.batch()])
    states = [student.state_dict() for student in students]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    with pytest.raises(ArgumentError, match="channels.criterion is 'energy_weight'.*build_batches"):
        inherit_from_teacher(students[1], **arguments, channels=channels)
    with pytest.raises(ArgumentError, match="channels.num_batches is 0"):
        inherit_from_teacher(students[1], **arguments, channels={"num_batches": 0})
    with pytest.raises(ArgumentError, match="channels.by is unknown.*criterion"):
        inherit_from_teacher(students[1], **arguments, channels={"by": "energy"})


def test_mistakes_are_named_before_anything_is_built(teacher, opts):
    for more, message in (
        (["CRITERION", "best"], f"{CHANNELS}.CRITERION is 'best'.*energy_weight"),
        (["NUM_BATCHES", "0"], f"{CHANNELS}.NUM_BATCHES is 0"),
    ):
        with pytest.raises(UserError, match=message):
            check_inheritance(plain_config(teacher, [*opts, f"{CHANNELS}.{more[0]}", more[1]]))
    with pytest.raises(UserError, match="COMPENSATE"):
        read_config("", [f"{CHANNELS}.COMPENSATE", "3"])


def test_inherited_levels_need_an_inherited_fpn(teacher, opts):
    kinds = ["MODEL.MGD.MATCHING.KINDS", "['assignment', 'inherited', 'inherited']"]
    cfg = toy.distilled_config(teacher, opts=[*opts, *kinds, f"{CHANNELS}.CRITERION", "none"])
    with pytest.raises(UserError, match=r"p3, p5 is 'inherited'.*INHERIT is \['fpn', 'head'\]"):
        inherit_from_config(cfg, build_model(cfg))
