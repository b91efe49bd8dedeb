"""What the benchmark measures is what training does."""

import oracles
import pytest
import torch
import toy
from toy import RCNN, RETINANET

from mgd_det.benchmark import DistillationBenchmark, naive_partial_l2

pytestmark = pytest.mark.slow


@pytest.fixture(params=[RETINANET, RCNN])
def bench(request):
    cfg = toy.distilled_config("no weights are read", request.param)
    return DistillationBenchmark(cfg, size=(64, 96), batch=2)


def test_both_students_train_and_start_alike(bench):
    plain, distilled = bench.plain.state_dict(), bench.distilled.state_dict()
    assert all(torch.equal(plain[key], distilled[key]) for key in plain)
    bench.plain_step()
    bench.distilled_step()
    key = "backbone.bottom_up.res2.0.conv1.weight"
    after = bench.distilled.state_dict()[key]
    assert not torch.equal(after, bench.plain.state_dict()[key])  # the distillation losses moved it too


def test_a_keypoint_detector_learns_from_keypoints_inside_the_boxes():
    opts = ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3"]
    cfg = toy.distilled_config("no weights are read", RCNN, opts=[*opts, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "[16]"])
    bench = DistillationBenchmark(cfg, size=(64, 96), batch=2)
    before = [parameter.clone() for parameter in bench.plain.roi_heads.keypoint_head.parameters()]
    bench.plain_step()
    assert all((old != new).any() for old, new in zip(before, bench.plain.roi_heads.keypoint_head.parameters()))
    objects = bench._batch[0]["instances"]
    for box, points in zip(objects.gt_boxes.tensor, objects.gt_keypoints.tensor):
        assert points.shape == (3, 3) and (points[:, 2] == 2).all()
        assert (points[:, :2] >= box[:2]).all() and (points[:, :2] <= box[2:]).all()


def test_levels_of_a_narrower_inherited_fpn_are_distilled_without_weights_to_inherit():
    opts = ["MODEL.FPN.OUT_CHANNELS", "8", "MODEL.MGD.INHERIT", "['fpn']", "MODEL.MGD.POSITIONS", "['p3']"]
    bench = DistillationBenchmark(toy.distilled_config("no weights are read", opts=opts), size=(64, 96), batch=2)
    (position,) = bench.positions
    assert (position.matching, position.student_channels, position.teacher_channels) == ("inherited", 8, 16)
    assert bench.distillation_part(position).item() > 0
    bench.distilled_step()


def test_parts_run_what_their_names_say(bench, monkeypatch):
    calls = []
    detector = bench.distilled
    bench.plain.backbone.bottom_up.register_forward_hook(lambda *_: calls.append("plain"))
    detector.backbone.bottom_up.stem.register_forward_hook(lambda *_: calls.append("student"))
    detector.backbone.mgd.teacher.backbone.bottom_up.stem.register_forward_hook(lambda *_: calls.append("teacher"))
    bench.teacher_bottom_up(), bench.student_bottom_up(), bench.measuring_pass()
    assert calls == ["teacher", "plain", "student", "teacher"]
    calls.clear()
    bench.online_step(), bench.distilled_step(), bench.online_step()
    assert sorted(calls) == ["student"] * 3 + ["teacher"] * 3
    assert bench._window.num_images == 4  # of the online steps alone
    bench.observation()
    assert bench._window.num_images == 6 and len(calls) == 6  # no forward
    shapes = []
    monkeypatch.setattr("mgd_det.benchmark.step.assign_channels", lambda cost, size: shapes.append(tuple(cost.shape)))
    bench.assignment()
    assert shapes == [(p.student_channels, p.teacher_channels) for p in bench.positions] and len(shapes) == 4


def test_the_fast_part_and_the_naive_one_agree(bench):
    for position in bench.positions:
        fast, naive = bench.distillation_part(position), bench.naive_part(position)
        assert fast.item() > 0
        assert fast.item() == pytest.approx(naive.item(), rel=1e-5)
        bench.copies(position)


def test_mixed_precision_reaches_both_nets():
    cfg = toy.distilled_config("no weights are read", opts=["SOLVER.AMP.ENABLED", "True", "MODEL.DEVICE", "cpu"])
    bench = DistillationBenchmark(cfg, size=(64, 96), batch=2)
    seen = []
    for net in (bench.plain.backbone, bench.distilled.backbone.mgd.teacher.backbone):
        net.bottom_up.res3.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    bench.plain_step()
    features = bench.teacher_bottom_up()
    assert seen[0] == torch.float16 and set(seen) == {torch.float16}
    assert {feature.dtype for feature in features.values()} == {torch.float16}
    assert {teacher.dtype for _, teacher in bench._features.values()} == {torch.float16}


def test_the_bytes_of_the_copies(bench):
    for position in bench.positions:
        student, teacher = bench._features[position.name]
        assert bench.copied_bytes(position) == 4 * (4 * student.numel() + 2 * (teacher.numel() // 2))


def test_naive_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 7, 4, 5, generator=generator)
    margin, groups = -torch.rand(7, generator=generator), torch.tensor([[5, 0], [1, 2], [6, 3]])
    expected, _ = oracles.amp_partial_l2(student, teacher, margin, groups)
    assert naive_partial_l2(student, teacher, margin, groups).item() == pytest.approx(expected, rel=1e-5)
