"""The cost matrix, against loops over images and channels in numpy."""

import numpy as np
import pytest
import torch

from mgd_det.matching import ChannelCost

CS, CT = 3, 5


def features(seed, images, channels, size=(4, 6)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, channels, *size, generator=generator)


def batches(*sizes):
    return [(features(10 * n, b, CS), features(10 * n + 1, b, CT)) for n, b in enumerate(sizes, 1)]


def measured(pairs):
    cost = ChannelCost(CS, CT)
    for student, teacher in pairs:
        cost.update(student, teacher)
    return cost.mean()


def cost_by_loops(pairs):
    distances = []
    for student, teacher in pairs:
        for s_image, t_image in zip(student.double().numpy(), teacher.double().numpy()):
            image = np.empty((len(s_image), len(t_image)))
            for i, s_map in enumerate(s_image):
                for j, t_map in enumerate(t_image):
                    s_norm, t_norm = np.sqrt((s_map**2).sum()), np.sqrt((t_map**2).sum())
                    if s_norm == 0 or t_norm == 0:
                        image[i, j] = 2
                    else:
                        image[i, j] = ((s_map / s_norm - t_map / t_norm) ** 2).sum()
            distances.append(image)
    return np.mean(distances, axis=0)


def test_is_the_mean_over_all_images_of_unequal_batches():
    pairs = batches(4, 1, 3)
    mean = measured(pairs)
    assert mean.dtype == torch.float64 and mean.device.type == "cpu" and mean.shape == (CS, CT)
    np.testing.assert_allclose(mean.numpy(), cost_by_loops(pairs), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 3), (7, 9)])
def test_maps_of_fewer_and_of_more_pixels_than_channels(size):
    pairs = [(features(n, n, CS, size), features(10 + n, n, CT, size)) for n in (1, 4)]
    pairs[1][0][2, 1] = 0
    np.testing.assert_allclose(measured(pairs).numpy(), cost_by_loops(pairs), atol=1e-6)


def test_batches_may_differ_in_map_size():
    pairs = batches(2) + [(features(1, 3, CS, (5, 2)), features(2, 3, CT, (5, 2)))]
    np.testing.assert_allclose(measured(pairs).numpy(), cost_by_loops(pairs), atol=1e-6)


def test_equal_maps_cost_0_and_opposite_maps_cost_4():
    teacher = features(1, 2, CT)
    student = torch.stack([teacher[:, 3], -teacher[:, 0], teacher[:, 1]], dim=1)
    mean = measured([(student, teacher)])
    assert mean[0, 3] == pytest.approx(0, abs=1e-6)
    assert mean[1, 0] == pytest.approx(4, abs=1e-6)
    assert mean.min() > -1e-6 and mean.max() < 4 + 1e-6


def test_a_channel_that_is_zero_is_at_2_from_all():
    student, teacher = features(1, 2, CS), features(2, 2, CT)
    student[:, 1] = 0
    teacher[:, 4] = 0
    mean = measured([(student, teacher)])
    torch.testing.assert_close(mean[1], torch.full((CT,), 2.0, dtype=torch.float64))
    torch.testing.assert_close(mean[:, 4], torch.full((CS,), 2.0, dtype=torch.float64))
    assert (mean[0, :4] - 2).abs().min() > 1e-4


def test_a_zero_map_on_one_image_counts_as_2_on_that_image():
    student, teacher = features(1, 2, CS), features(2, 2, CT)
    student[0, 1] = 0
    np.testing.assert_allclose(measured([(student, teacher)]).numpy(), cost_by_loops([(student, teacher)]), atol=1e-6)


def test_scale_of_a_channel_on_an_image_does_not_matter():
    student, teacher = features(1, 3, CS), features(2, 3, CT)
    generator = torch.Generator().manual_seed(3)
    s_scale = 10 ** (torch.rand(3, CS, 1, 1, generator=generator) * 6 - 3)
    t_scale = 10 ** (torch.rand(3, CT, 1, 1, generator=generator) * 6 - 3)
    torch.testing.assert_close(
        measured([(student * s_scale, teacher * t_scale)]), measured([(student, teacher)]), atol=1e-6, rtol=0
    )


def test_sign_matters():
    student, teacher = features(1, 2, CS), features(2, 2, CT)
    torch.testing.assert_close(measured([(-student, teacher)]), 4 - measured([(student, teacher)]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_half_precision_features_are_measured_in_float32(dtype, rounding):
    pairs = batches(2, 3)
    halves = [(student.to(dtype), teacher.to(dtype)) for student, teacher in pairs]
    rounded = [(student.float(), teacher.float()) for student, teacher in halves]
    torch.testing.assert_close(measured(halves), measured(rounded), atol=1e-6, rtol=0)
    torch.testing.assert_close(measured(halves), measured(pairs), atol=rounding, rtol=0)


def test_half_precision_does_not_overflow():
    student, teacher = features(1, 2, CS) * 1e4, features(2, 2, CT) * 1e4
    half = measured([(student.half(), teacher.half())])
    torch.testing.assert_close(half, measured([(student, teacher)]), atol=1e-3, rtol=0)


def test_autocast_changes_nothing():
    pairs = batches(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = measured(pairs)
    torch.testing.assert_close(mean, measured(pairs), atol=1e-6, rtol=0)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_is_close_to_float64_whatever_products_of_float32_may_drop(precision):
    """Channels that are nearly alike on large maps, where bfloat16 in the product would cost 1e-3 and more."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 1, 100, 168, generator=generator)
    student, teacher = (common + 0.1 * torch.randn(1, c, 100, 168, generator=generator) for c in (16, 32))
    s, t = (x.double().numpy().reshape(x.shape[1], -1) for x in (student, teacher))
    s, t = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (s, t))
    cost = ChannelCost(16, 32)
    former = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        cost.update(student, teacher)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(former)
    assert np.abs(cost.mean().numpy() - (2 - 2 * s @ t.T)).max() < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_can_be_left_out(value):
    good, bad = batches(2, 3)
    bad[1][1, 2, 0, 0] = value
    cost = ChannelCost(CS, CT)
    for pair in (bad, good):
        cost.update(*pair, only_finite=True)
    assert cost.num_images == 2
    np.testing.assert_allclose(cost.mean().numpy(), cost_by_loops([good]), atol=1e-6)
    assert measured([good, bad])[:, 2].isnan().all()


def test_sums_of_parts_add_up():
    pairs = batches(2, 3)
    parts = [ChannelCost(CS, CT) for _ in pairs]
    for part, pair in zip(parts, pairs):
        part.update(*pair)
    whole = ChannelCost(CS, CT)
    whole.sums = parts[0].sums + parts[1].sums
    assert whole.num_images == 5 and torch.equal(whole.mean(), measured(pairs))


@pytest.mark.slow
def test_many_updates_do_not_drift():
    (student, teacher) = batches(3)[0]
    once = measured([(student, teacher)])
    assert (measured([(student, teacher)] * 2000) - once).abs().max() < 1e-10


def test_needs_no_gradient_and_keeps_no_graph():
    student, teacher = features(1, 2, CS).requires_grad_(), features(2, 2, CT)
    assert not measured([(student, teacher)]).requires_grad


def test_update_leaves_the_features_alone():
    student, teacher = batches(2)[0]
    copies = student.clone(), teacher.clone()
    measured([(student, teacher)])
    assert torch.equal(student, copies[0]) and torch.equal(teacher, copies[1])


def test_memory_format_does_not_matter():
    student, teacher = batches(2)[0]
    last = [x.contiguous(memory_format=torch.channels_last) for x in (student, teacher)]
    torch.testing.assert_close(measured([last]), measured([(student, teacher)]), atol=1e-6, rtol=0)


def test_update_reads_nothing_back_from_the_device(monkeypatch):
    def waits(*args, **kwargs):
        raise AssertionError("update() waits for the device")

    cost = ChannelCost(CS, CT)
    student, teacher = batches(2)[0]
    for name in ("item", "cpu", "numpy", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    cost.update(student, teacher)
    cost.update(student, teacher)
    monkeypatch.undo()
    assert cost.num_images == 4


@pytest.mark.parametrize(
    "student, teacher, named",
    [
        ((2, CS, 4), (2, CT, 4), ["2, 3, 4", "2, 5, 4"]),
        ((2, CS + 1, 4, 6), (2, CT, 4, 6), ["4 and 5", "3 and 5"]),
        ((2, CS, 4, 6), (2, CT - 1, 4, 6), ["3 and 4", "3 and 5"]),
        ((2, CS, 4, 6), (3, CT, 4, 6), ["(2, 3, 4, 6)", "(3, 5, 4, 6)"]),
        ((2, CS, 4, 6), (2, CT, 6, 4), ["(2, 3, 4, 6)", "(2, 5, 6, 4)"]),
    ],
)
def test_wrong_shapes_are_named(student, teacher, named):
    cost = ChannelCost(CS, CT)
    with pytest.raises(ValueError) as error:
        cost.update(torch.ones(student), torch.ones(teacher))
    for text in named:
        assert text in str(error.value)
    assert cost.num_images == 0


def test_mean_before_the_first_update():
    with pytest.raises(ValueError, match="no image"):
        ChannelCost(CS, CT).mean()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
def test_the_users_precision_stays_and_follows_the_setting_of_all():
    matmuls = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [torch.backends.fp32_precision, *(each.fp32_precision for each in matmuls)]
    try:
        for each in matmuls:
            each.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        measured(batches(2))
        assert [each.fp32_precision for each in matmuls] == ["tf32", "tf32"]
        torch.backends.fp32_precision = "ieee"
        assert [each.fp32_precision for each in matmuls] == ["ieee", "ieee"]
        matmuls[0].fp32_precision = "tf32"  # of its own
        measured(batches(2))
        assert [each.fp32_precision for each in matmuls] == ["tf32", "ieee"]
    finally:
        torch.backends.fp32_precision = before[0]
        for each, precision in zip(matmuls, before[1:]):
            each.fp32_precision = precision
