"""Reduction and partial L2 in one pass, in plain torch and compiled, against numpy."""

import numpy as np
import oracles
import pytest
import torch

from mgd_det.distillation.fused import amp_partial_l2, compiled, reference

DEVICE = {"device": "cpu"}


@pytest.fixture(params=["reference", pytest.param("compiled", marks=pytest.mark.gpu)], autouse=True)
def way(request, monkeypatch):
    """Plain torch; and compiled, as on a GPU."""
    if request.param == "compiled":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU that torch can use")
        monkeypatch.setitem(DEVICE, "device", "cuda")
    return request.param


only_reference = pytest.mark.parametrize("way", ["reference"], indirect=True)


@pytest.fixture
def compiler(monkeypatch):
    """``compiler(fn)``: from now on, what is compiled computes ``fn``; at first, plain torch."""

    def compiles_to(fn):
        monkeypatch.setattr(compiled, "_compiled", lambda: fn)

    monkeypatch.setattr(compiled, "_given_up", set())
    compiles_to(reference.residual_at_once)
    return compiles_to


def maps(images=2, student=3, teacher=7, size=(5, 6), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(images, student, *size), (images, teacher, *size)]
    s, t = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    margin = -torch.rand(teacher, generator=generator)
    return s.to(**DEVICE, dtype=dtype), t.to(**DEVICE, dtype=dtype), margin.to(**DEVICE)


GROUPS = torch.tensor([[5, 0], [1, 2], [6, 3]])


def compare(student, teacher, margin, groups, rtol=1e-5, factor=None):
    expected, gradient = oracles.amp_partial_l2(student, teacher, margin, groups, 1.0 if factor is None else factor)
    student = student.detach().requires_grad_()
    value = amp_partial_l2(student, teacher, margin, groups, None if factor is None else torch.tensor(factor))
    (3 * value).backward()
    np.testing.assert_allclose(value.item(), expected, rtol=rtol, atol=1e-12)
    np.testing.assert_allclose(double(student.grad), 3 * gradient, rtol=max(rtol, 1e-5), atol=rtol * 10)


def double(x):
    return x.detach().double().cpu().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("size, group_size", [((5, 6), 1), ((1, 1), 2), ((1, 300), 2), ((33, 64), 2), ((257, 256), 1)])
def test_loss_and_gradient_at_any_size(size, group_size):
    # An interpreted program takes milliseconds: only one image of the largest maps.
    few = 1 if size == (257, 256) else 2
    compare(*maps(images=few, size=size), GROUPS[:, :group_size])


@pytest.mark.slow
@pytest.mark.parametrize(
    "images, student, teacher, group_size, size",
    [(1, 40, 160, 4, (25, 42)), (3, 130, 260, 2, (2, 3)), (3, 5, 40, 8, (25, 42)), (3, 3, 7, 1, (2, 3))],
)
def test_many_channels(images, student, teacher, group_size, size):
    groups = torch.randperm(teacher, generator=torch.Generator().manual_seed(1))[: student * group_size]
    compare(*maps(images, student, teacher, size), groups.view(student, group_size))


@pytest.mark.parametrize("factor", [0.03, 1.0, 2.5, 40.0])
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_factor_of_teacher_and_margin(factor, dtype, rtol):
    student, teacher, margin = maps(size=(9, 11), dtype=dtype)
    compare(student, teacher, margin, GROUPS, rtol, factor)


@only_reference
def test_a_factor_of_float64():
    student, teacher, margin = maps(dtype=torch.float64)
    factor = torch.tensor(0.3, dtype=torch.float64)
    expected, _ = oracles.amp_partial_l2(student, teacher, margin.double(), GROUPS, 0.3)
    assert amp_partial_l2(student, teacher, margin.double(), GROUPS, factor).item() == pytest.approx(
        expected, rel=1e-12
    )


@only_reference
@pytest.mark.parametrize("block", [1, 7, 30, 90, 200, 1000])
def test_blocks_of_any_size(monkeypatch, block):
    """Fewer values than a channel (30), some channels, whole images (90), some images (540 values in all)."""
    whole = amp_partial_l2(*maps(images=6), GROUPS)
    monkeypatch.setattr(reference, "_BLOCK", block)
    compare(*maps(images=6), GROUPS)
    assert amp_partial_l2(*maps(images=6), GROUPS).item() == pytest.approx(whole.item(), rel=1e-6)


@only_reference
def test_temporaries_are_of_a_block():
    """They decide how much memory the loss takes besides the residual and the gradient."""
    student, teacher, margin = maps(images=2, student=64, teacher=256, size=(64, 64))
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            is_new = (
                isinstance(result, torch.Tensor) and not func.is_view and func is not torch.ops.aten.empty_like.default
            )
            if is_new and func._schema.name not in ("aten::copy_", "aten::detach"):
                largest = max(largest, result.numel())
            return result

    with torch.no_grad(), Sizes():
        amp_partial_l2(student, teacher, margin, torch.arange(256).view(64, 4), torch.tensor(0.3))
    assert 0 < largest <= reference._BLOCK < student.numel()


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_other_precisions(dtype, rtol):
    student, teacher, margin = maps(dtype=dtype, size=(20, 30))
    # Their mean is computed in their own type.
    compare(student, teacher, margin.double() if dtype == torch.float64 else margin, GROUPS, rtol)
    assert amp_partial_l2(student, teacher, margin, GROUPS).dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )


def test_half_precision_does_not_overflow():
    student, teacher, margin = maps(dtype=torch.float16, size=(64, 64))
    value = amp_partial_l2(student * 1000, teacher * 1000, margin, GROUPS)
    expected, _ = oracles.amp_partial_l2(student * 1000, teacher * 1000, margin, GROUPS)
    assert value.item() == pytest.approx(expected, rel=1e-3)


def test_a_gradient_of_half_precision_does_not_underflow():
    student, teacher, margin = maps(dtype=torch.float16, size=(64, 64))
    student, teacher = (student * 300).requires_grad_(), teacher * 300
    # A factor below the smallest number of float16, 6e-8; residuals of some hundreds bring it back.
    (amp_partial_l2(student, teacher, margin, GROUPS) * 1e-8).backward()
    expected = 1e-8 * oracles.amp_partial_l2(student, teacher, margin, GROUPS)[1]
    large = np.abs(expected) > 5e-6
    assert large.sum() > 100
    np.testing.assert_allclose(double(student.grad)[large], expected[large], rtol=0.05)


def test_a_student_of_float32_and_a_teacher_of_half_precision():
    student, teacher, margin = maps(size=(20, 30))
    teacher = teacher.bfloat16()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    assert value.item() == pytest.approx(oracles.amp_partial_l2(student, teacher, margin, GROUPS)[0], rel=1e-5)


@pytest.mark.parametrize(
    "student_format, teacher_format, dtype, rtol",
    [
        (torch.channels_last, torch.contiguous_format, torch.float32, 1e-5),
        (torch.contiguous_format, torch.channels_last, torch.bfloat16, 2e-2),
        (torch.channels_last, torch.channels_last, torch.float32, 1e-5),
    ],
)
def test_channels_last(student_format, teacher_format, dtype, rtol):
    student, teacher, margin = maps(size=(9, 11), dtype=dtype)
    student, teacher = student.to(memory_format=student_format), teacher.to(memory_format=teacher_format)
    compare(student, teacher, margin.to(dtype).float(), GROUPS, rtol)


def test_parts_of_larger_maps():
    student, teacher, margin = maps(images=4, student=6, teacher=14, size=(9, 11))
    compare(student[1:3, ::2, 2:, 3:], teacher[1:3, ::2, :7, :8], margin[::2], GROUPS)


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
        amp_partial_l2(student, teacher, margin, GROUPS, torch.tensor(0.3))
    assert kept == [student.shape]


def test_gradient_twice_over_the_same_graph():
    student, teacher, margin = maps()
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    second = torch.autograd.grad(value, student)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("which, k", [("teacher", 0), ("teacher", 1), ("student", 0)])
def test_a_nan_is_not_hidden(which, k):
    """A comparison with NaN is false: a running maximum written carelessly loses it."""
    student, teacher, margin = maps(size=(33, 40))
    place = (1, GROUPS[1, k] if which == "teacher" else 1, 30, 20)
    (teacher if which == "teacher" else student)[place] = float("nan")
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    value.backward()
    assert value.isnan() and student.grad[1, 1, 30, 20].isnan()
    assert not student.grad[0].isnan().any() and not student.grad[1, [0, 2]].isnan().any()


def test_infinite_values_of_the_teacher_are_not_hidden():
    student, teacher, margin = maps()
    teacher[0, 5, 0, 0] = float("inf")
    assert amp_partial_l2(student, teacher, margin, GROUPS).isinf()


def test_a_nan_of_the_margin_is_not_hidden():
    student, teacher, margin = maps()
    margin[1] = float("nan")
    assert amp_partial_l2(student, teacher, margin, GROUPS).isnan()


def test_groups_that_are_not_long_or_empty_are_refused():
    student, teacher, margin = maps()
    for groups in (GROUPS.int(), GROUPS[:, :0]):
        with pytest.raises(ValueError, match="give long indices, at least one a group"):
            amp_partial_l2(student, teacher, margin, groups)


def test_other_sizes_are_refused():
    student, teacher, margin = maps()
    with pytest.raises(ValueError, match="differ in size"):
        amp_partial_l2(student, teacher[..., :5], margin, GROUPS)
    with pytest.raises(ValueError, match="for 3 student channels"):
        amp_partial_l2(student, teacher, margin, GROUPS[:2])


@only_reference
def test_without_a_compiler_plain_torch_computes_and_a_warning_says_so(compiler, caplog):
    device = torch.device(DEVICE["device"])
    assert compiled.runs_on.__wrapped__(device)
    assert not caplog.text

    def no_compiler(*maps):
        raise RuntimeError("Failed to find C compiler")

    compiler(no_compiler)
    assert not compiled.runs_on.__wrapped__(device)
    assert "Failed to find C compiler" in caplog.text and "plain torch" in caplog.text


@only_reference
@pytest.mark.parametrize("wrong", ["residual", "total"])
def test_compiled_code_that_computes_something_else_is_not_used(wrong, compiler, caplog):
    def wrong_residual(*maps):
        difference, total = reference.residual_at_once(*maps)
        return (difference * 1.01, total) if wrong == "residual" else (difference, total * 1.01)

    compiler(wrong_residual)
    assert not compiled.runs_on.__wrapped__(torch.device(DEVICE["device"]))
    assert "plain torch" in caplog.text


@only_reference
def test_another_variant_that_cannot_be_compiled_is_left_to_plain_torch(compiler, monkeypatch, caplog):
    """The first that is tried is of float32; a teacher of half precision is compiled later, in a step."""
    calls = []

    def only_float32(student, teacher, *others):
        calls.append(teacher.dtype)
        if teacher.dtype != torch.float32:
            raise RuntimeError("PassManager::run failed")
        return reference.residual_at_once(student, teacher, *others)

    def is_for(*maps):
        """As for maps on a GPU."""
        return compiled.runs_on.__wrapped__(maps[0].device) and maps[0].device not in compiled._given_up

    compiler(only_float32)
    monkeypatch.setattr(compiled, "is_for", is_for)
    student, teacher, margin = maps()
    compare(student, teacher, margin, GROUPS)
    assert not caplog.text
    for _ in range(2):
        compare(student, teacher.bfloat16(), margin, GROUPS)
    assert caplog.text.count("PassManager::run failed") == caplog.text.count("plain torch") == 1
    assert calls.count(torch.bfloat16) == 1


@only_reference
def test_a_full_memory_says_nothing_of_the_compiler(compiler):
    def full(*maps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compiler(full)
    with pytest.raises(torch.OutOfMemoryError):
        compiled.runs_on.__wrapped__(torch.device(DEVICE["device"]))


@pytest.mark.slow
@only_reference
def test_generated_code_for_the_cpu():
    """The compiler that serves a GPU generates code here, too: for sizes that change, by one compilation."""
    if not compiled.runs_on(torch.device("cpu")):
        pytest.skip("torch.compile does not work here")
    count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (4, 5), (7, 3):
        student, teacher, margin = maps(size=size)
        expected, _ = oracles.amp_partial_l2(student, teacher, margin, GROUPS, 0.5)
        maps_of = student, teacher, margin[GROUPS].mean(dim=1), GROUPS, torch.tensor(0.5)
        _, total = compiled.residual(*maps_of)
        np.testing.assert_allclose(total.item(), expected, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - count == 1
