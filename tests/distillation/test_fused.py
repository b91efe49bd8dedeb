"""Reduction and partial L2 in one pass, against the obvious way to write them."""

import pytest
import torch

from mgd_det.distillation.fused import amp_partial_l2


def naive(student, teacher, margin, groups):
    """As in the paper, a step at a time: gather the groups, take the largest magnitude, and so on."""
    members = torch.stack([teacher[:, group] for group in groups.unbind(1)], dim=2)  # (B, Cs, K, H, W)
    # Of equal magnitudes, which half precision has, the positive one.
    largest = (members.abs().double() + 1e-9 * members.sign()).argmax(dim=2, keepdim=True)
    target = members.gather(2, largest).squeeze(2)
    target = torch.max(target, margin[groups].mean(dim=1).view(1, -1, 1, 1))
    counts = (student > target) | (target > 0)
    return (((student - target) ** 2) * counts).sum()


def maps(images=2, student=3, teacher=7, size=(5, 6), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, student, *size), (images, teacher, *size)]
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    margin = -torch.rand(teacher, generator=generator)
    return s.to(dtype), t.to(dtype), margin


GROUPS = torch.tensor([[5, 0], [1, 2], [6, 3]])


def compare(student, teacher, margin, groups, rtol=1e-5):
    results = []
    for loss, dtype in ((amp_partial_l2, student.dtype), (naive, torch.float64)):
        s = student.detach().to(dtype).requires_grad_()
        value = loss(s, teacher.to(dtype), margin.to(dtype) if dtype == torch.float64 else margin, groups)
        (3 * value).backward()
        results.append((value.detach().double(), s.grad.double()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=rtol, atol=1e-12)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=max(rtol, 1e-5), atol=rtol * 10)


@pytest.mark.parametrize("size", [(5, 6), (1, 1), (1, 300), (257, 256), (200, 330)])
@pytest.mark.parametrize("group_size", [1, 2])
def test_loss_and_gradient_at_any_size(size, group_size):
    compare(*maps(size=size), GROUPS[:, :group_size])


@pytest.mark.parametrize("student, teacher, group_size", [(64, 256, 4), (130, 260, 2), (5, 40, 8), (3, 7, 1)])
def test_blocks_of_channels(student, teacher, group_size):
    groups = torch.randperm(teacher, generator=torch.Generator().manual_seed(1))[: student * group_size]
    compare(*maps(3, student, teacher, (25, 42)), groups.view(student, group_size))


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_precisions(dtype, rtol):
    student, teacher, margin = maps(dtype=dtype, size=(20, 30))
    compare(student, teacher, margin.to(dtype).float(), GROUPS, rtol)
    assert amp_partial_l2(student, teacher, margin, GROUPS).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_half_precision_does_not_overflow():
    student, teacher, margin = maps(dtype=torch.float16, size=(64, 64))
    value = amp_partial_l2(student * 1000, teacher * 1000, margin, GROUPS)
    expected = naive((student * 1000).double(), (teacher * 1000).double(), margin.double(), GROUPS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_gradient_of_half_precision_does_not_underflow():
    student, teacher, margin = maps(dtype=torch.float16, size=(64, 64))
    gradients = []
    for loss, dtype in ((amp_partial_l2, torch.float16), (naive, torch.float64)):
        s = (student * 300).to(dtype).requires_grad_()
        # A factor below the smallest number of float16, 6e-8; residuals of some hundreds bring it back.
        (loss(s, (teacher * 300).to(dtype), margin.to(dtype), GROUPS) * 1e-8).backward()
        gradients.append(s.grad.double())
    large = gradients[1].abs() > 5e-6
    assert large.sum() > 100
    torch.testing.assert_close(gradients[0][large], gradients[1][large], rtol=0.05, atol=0)


def test_a_student_of_float32_and_a_teacher_of_half_precision():
    student, teacher, margin = maps(size=(20, 30))
    teacher = teacher.bfloat16()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    assert value.item() == pytest.approx(naive(student, teacher.float(), margin, GROUPS).item(), rel=1e-5)


@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_channels_last(which):
    student, teacher, margin = maps(size=(9, 11))
    if which in ("student", "both"):
        student = student.to(memory_format=torch.channels_last)
    if which in ("teacher", "both"):
        teacher = teacher.to(memory_format=torch.channels_last)
    compare(student, teacher, margin, GROUPS)


def test_an_empty_batch():
    student, teacher, margin = maps(images=0)
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    value.backward()
    assert value.item() == 0 and student.grad.shape == student.shape


def test_inputs_are_not_written_and_the_teacher_gets_no_gradient():
    student, teacher, margin = maps()
    before = [x.clone() for x in (student, teacher, margin)]
    teacher.requires_grad_(), student.requires_grad_()
    amp_partial_l2(student, teacher, margin, GROUPS).backward()
    assert teacher.grad is None
    assert all(torch.equal(x, y) for x, y in zip((student, teacher, margin), before))


def test_backward_keeps_one_map():
    kept = []
    student, teacher, margin = maps()
    student.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        amp_partial_l2(student, teacher, margin, GROUPS)
    assert kept == [student.shape]


def test_gradient_twice_over_the_same_graph():
    student, teacher, margin = maps()
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    second = torch.autograd.grad(value, student)[0]
    assert torch.equal(first, second)


def test_other_sizes_are_refused():
    student, teacher, margin = maps()
    with pytest.raises(ValueError, match="differ in size"):
        amp_partial_l2(student, teacher[..., :5], margin, GROUPS)
    with pytest.raises(ValueError, match="for 3 student channels"):
        amp_partial_l2(student, teacher, margin, GROUPS[:2])
