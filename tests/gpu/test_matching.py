"""Cost, assignment, reducers, margins and losses on a GPU, against numpy and the CPU."""

import numpy as np
import oracles
import pytest
import torch
import toy_distiller
from scipy.optimize import linear_sum_assignment

from mgd_det.distillation import (
    POSITION_LOSS_REGISTRY,
    Distiller,
    MatchingStatistics,
    Padding,
    Position,
    box_mask,
    score_mask,
)
from mgd_det.distillation.margins import MeasuredMargin
from mgd_det.distillation.reducers import absolute_max_pooling, random_drop, sparse_matching
from mgd_det.matching import ChannelCost, assign_channels, matched_cost

pytestmark = pytest.mark.gpu

GROUPS = torch.tensor([[5, 0], [1, 2], [6, 3]])


def maps(channels, size=(9, 11), images=3, seed=0):
    return torch.randn(images, channels, *size, generator=torch.Generator().manual_seed(seed))


def expected_cost(student, teacher):
    """Mean squared distance of normalised maps, one pair at a time."""
    result = np.zeros((student.shape[1], teacher.shape[1]))
    for s, t in zip(student.double().cpu().numpy(), teacher.double().cpu().numpy()):
        s, t = ([x.ravel() / np.linalg.norm(x) for x in y] for y in (s, t))
        result += [[((a - b) ** 2).sum() for b in t] for a in s]
    return result / len(student)


@pytest.mark.parametrize("size", [(9, 11), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_cost(device, tf32, size, dtype, layout):
    """With all bits of float32 whatever the user allows."""
    student, teacher = (
        maps(channels, size, seed=channels).to(device, dtype, memory_format=layout) for channels in (12, 26)
    )
    cost = ChannelCost(12, 26)
    with torch.autocast(device.type, torch.bfloat16):
        cost.update(student, teacher)
        cost.update(student.flip(0), teacher.flip(0), only_finite=True)
    assert cost.sums.device.type == device.type
    np.testing.assert_allclose(cost.mean().numpy(), expected_cost(student, teacher), atol=2e-6)


def test_a_batch_that_is_not_finite_is_left_out(device):
    cost = ChannelCost(12, 26)
    student, teacher = maps(12).to(device), maps(26, seed=1).to(device)
    cost.update(student, teacher, only_finite=True)
    cost.update(student * float("nan"), teacher, only_finite=True)
    assert cost.num_images == 3
    np.testing.assert_allclose(cost.mean().numpy(), expected_cost(student, teacher), atol=2e-6)


def test_assignment_is_optimal_for_the_costs(device):
    student, teacher = maps(12).to(device), maps(26, seed=1).to(device)
    cost = ChannelCost(12, 26)
    cost.update(student, teacher)
    groups = assign_channels(cost.mean())
    expected = np.tile(expected_cost(student, teacher), (2, 1))
    rows, columns = linear_sum_assignment(expected)
    assert matched_cost(cost.mean(), groups) == pytest.approx(expected[rows, columns].mean(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reducers(device, dtype):
    teacher, margin = maps(7).to(device, dtype), -torch.rand(7).to(device)
    groups = GROUPS.to(device)
    target, m = absolute_max_pooling(teacher, margin, groups)
    expected, expected_m = oracles.absolute_max_pooling(
        teacher.double().cpu().numpy(), margin.cpu().numpy(), GROUPS.numpy()
    )
    assert target.dtype == dtype
    np.testing.assert_array_equal(target.double().cpu().numpy(), expected)
    np.testing.assert_allclose(m.cpu().numpy(), expected_m, rtol=1e-6)
    target, m = sparse_matching(teacher, margin, groups[:, 1:])
    assert torch.equal(target, teacher[:, GROUPS[:, 1].tolist()]) and torch.equal(m, margin[GROUPS[:, 1].tolist()])
    target, m = random_drop(teacher, margin, groups)
    members = teacher[:, groups]  # (B, Cs, K, H, W)
    chosen = members == target.unsqueeze(2)
    assert chosen.any(dim=2).all() and chosen[:, :, 0].any() and chosen[:, :, 1].any()
    assert all(value in margin[group] for value, group in zip(m, groups))


def test_margins(device):
    teacher = maps(7).to(device)
    measured = MeasuredMargin(7)
    measured.update(teacher)
    values = teacher.double().cpu().numpy().swapaxes(0, 1)
    np.testing.assert_allclose(measured.mean().cpu().numpy(), [x[x < 0].mean() for x in values], rtol=1e-5)


@pytest.mark.parametrize("matching", ["assignment", "identity", "adapter", "random"])
@pytest.mark.parametrize("loss", toy_distiller.LOSSES)
def test_losses_and_gradients_are_those_of_the_cpu(device, exact, loss, matching):
    position = Position("p3", "p3", 8, 8, matching) if matching == "identity" else Position("p3", "p3", 6, 14, matching)
    results = []
    for place in (torch.device("cpu"), device):
        torch.manual_seed(0)
        distiller = Distiller([position], norm_groups=2, losses={loss: {"weights": 1.0}})
        if distiller.matched_positions:
            size, channels = distiller.group_size(position), position.matched_channels
            groups = distiller.groups(position)
            if matching == "assignment":
                groups = torch.randperm(position.teacher_channels)[: channels * size].view(channels, size)
            margin = -torch.rand(position.teacher_channels)
            distiller.set_matching(position, groups=groups, margin=margin, mean_square=torch.tensor(1.7))
        for parameter in distiller.parameters():
            torch.nn.init.uniform_(parameter, 0.3, 1.2)
        distiller.to(place)
        student = maps(position.student_channels).to(place).requires_grad_()
        (value,) = distiller({"p3": student}, {"p3": maps(position.teacher_channels, seed=1).to(place)}).values()
        value.backward()
        assert value.device.type == place.type
        results.append((value.detach().cpu(), student.grad.cpu(), [p.grad.cpu() for p in distiller.parameters()]))
    (value, gradient, others), (on_gpu, gradient_on_gpu, others_on_gpu) = results
    assert value > 0 and gradient.abs().max() > 0
    torch.testing.assert_close(on_gpu, value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient_on_gpu, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    # Of all: a shift changes no softmax, so a bias under CWD has a gradient of rounding errors.
    largest = max((float(other.abs().max()) for other in others), default=0.0)
    for one, other in zip(others_on_gpu, others):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * largest)


def test_masked_losses_are_those_of_the_cpu(device, exact):
    """Every loss, FSP too, with a mask of boxes at one position and one of scores at the other."""
    padding = Padding([(48, 64), (40, 50)], (48, 64))
    boxes = [torch.tensor([[3.0, 4.0, 20.0, 30.0], [9.0, 9.0, 15.0, 20.0]]), torch.zeros(0, 4)]
    results = []
    for place in (torch.device("cpu"), device):
        losses = {name: {} for name, _ in POSITION_LOSS_REGISTRY}
        distiller = toy_distiller.matched(losses=losses, norm_groups=1).to(place)
        student, teacher = ({name: x.to(place) for name, x in of.items()} for of in toy_distiller.features())
        for x in student.values():
            x.requires_grad_()
        scores = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)).to(place)
        masks = {
            "res2": box_mask([x.to(place) for x in boxes], padding, toy_distiller.SIZES["res2"]).to(place),
            "res5": score_mask(scores, padding),
        }
        values = distiller(student, teacher, masks=masks)
        sum(values.values()).backward()
        results.append([*(x.detach() for x in values.values()), *(x.grad for x in student.values()), *masks.values()])
    for one, other in zip(*results):
        assert one.device.type == "cpu" and other.device.type == device.type
        torch.testing.assert_close(other.cpu(), one, rtol=1e-3, atol=1e-5 * float(one.abs().max()))


def test_a_matching_is_solved_as_on_the_cpu(device):
    student, teacher = toy_distiller.features(images=4)
    solved = []
    for place in (torch.device("cpu"), device):
        distiller = Distiller(toy_distiller.POSITIONS).to(place)
        norms = {p.name: None for p in distiller.positions}
        statistics = MatchingStatistics(distiller, norms, "measured")
        for _ in range(2):
            statistics.update(*({name: x.to(place) for name, x in of.items()} for of in (student, teacher)))
        statistics.solve()
        assert all(distiller.groups(p).device.type == place.type for p in distiller.positions)
        solved.append(distiller.distillation_state()["matchings"])
    for name, matching in solved[0].items():
        assert torch.equal(solved[1][name]["groups"], matching["groups"])
        for key in ("margin", "mean_square"):
            torch.testing.assert_close(solved[1][name][key], matching[key], rtol=1e-4, atol=1e-6)
