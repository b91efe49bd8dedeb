"""Reduction and partial L2 in one pass, each of its three ways, against the obvious way to write it."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from mgd_det.distillation.fused import amp_partial_l2, cpu, gpu

DEVICE = {"device": "cpu"}


@pytest.fixture(params=["cpu", "reference", "gpu"], autouse=True)
def way(request, monkeypatch):
    """The compiled loop, plain torch, and the Triton kernel, which is interpreted where there is no GPU."""
    if request.param == "cpu":
        assert cpu.is_for(torch.zeros(1)), "the compiled loop was not built"
    elif request.param == "reference":
        monkeypatch.setattr(cpu, "is_for", lambda *maps: False)
    elif gpu.triton is None:
        pytest.skip("Triton is not installed")
    elif torch.cuda.is_available():
        monkeypatch.setitem(DEVICE, "device", "cuda")
    else:
        types = (torch.float32, torch.float16, torch.bfloat16)
        monkeypatch.setattr(gpu, "is_for", lambda *maps: all(m.dtype in types for m in maps))
    return request.param


of_the_compiled_loop = pytest.mark.parametrize("way", ["cpu"], indirect=True)


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
    return s.to(**DEVICE, dtype=dtype), t.to(**DEVICE, dtype=dtype), margin.to(**DEVICE)


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


@pytest.mark.parametrize("size", [(5, 6), (1, 1), (1, 300), (33, 64), (257, 256)])
@pytest.mark.parametrize("group_size", [1, 2])
def test_loss_and_gradient_at_any_size(size, group_size):
    # An interpreted program takes milliseconds: one image and channel fewer of the largest maps.
    few = 1 if size == (257, 256) else 2
    compare(*maps(images=few, size=size), GROUPS[:, :group_size])


@pytest.mark.parametrize("student, teacher, group_size", [(64, 256, 4), (130, 260, 2), (5, 40, 8), (3, 7, 1)])
@pytest.mark.parametrize("size", [(25, 42), (2, 3)])
def test_blocks_of_channels(student, teacher, group_size, size):
    groups = torch.randperm(teacher, generator=torch.Generator().manual_seed(1))[: student * group_size]
    images = 1 if student > 10 and size == (25, 42) else 3
    compare(*maps(images, student, teacher, size), groups.view(student, group_size))


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
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_channels_last(which, dtype, rtol):
    student, teacher, margin = maps(size=(9, 11), dtype=dtype)
    if which in ("student", "both"):
        student = student.to(memory_format=torch.channels_last)
    if which in ("teacher", "both"):
        teacher = teacher.to(memory_format=torch.channels_last)
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
        amp_partial_l2(student, teacher, margin, GROUPS)
    assert kept == [student.shape]


def test_gradient_twice_over_the_same_graph():
    student, teacher, margin = maps()
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, GROUPS)
    first = torch.autograd.grad(value, student, retain_graph=True)[0]
    second = torch.autograd.grad(value, student)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("which, k", [("teacher", 0), ("teacher", 1), ("student", 0)])
def test_what_is_no_number_is_not_hidden(which, k):
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


def test_a_margin_that_is_no_number_is_not_hidden():
    student, teacher, margin = maps()
    margin[1] = float("nan")
    assert amp_partial_l2(student, teacher, margin, GROUPS).isnan()


def test_indices_that_are_none_are_refused():
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


@of_the_compiled_loop
def test_the_same_bits_on_any_number_of_threads():
    student, teacher, margin = maps(images=3, student=64, teacher=256, size=(50, 51))
    groups, threads = torch.arange(256).view(64, 4), torch.get_num_threads()
    values = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            values.append(amp_partial_l2(student, teacher, margin, groups).item())
    finally:
        torch.set_num_threads(threads)
    assert len(set(values)) == 1


@of_the_compiled_loop
@pytest.mark.parametrize("wrong", [7, -1])
def test_no_memory_is_read_that_is_not_the_teachers(wrong):
    student, teacher, margin = maps()
    groups = GROUPS.clone()
    groups[1, 1] = wrong
    with pytest.raises(IndexError, match="there are 7"):
        cpu.residual(student, teacher, margin[:3], groups)


@of_the_compiled_loop
def test_where_it_cannot_be_loaded_one_warning_says_what_it_costs(monkeypatch, caplog):
    def unloadable(path):
        raise OSError("undefined symbol")

    monkeypatch.setattr(ctypes, "CDLL", unloadable)
    cpu._compiled.cache_clear()
    try:
        compare(*maps(), GROUPS)
        compare(*maps(), GROUPS)
    finally:
        cpu._compiled.cache_clear()
    (record,) = caplog.records
    assert "undefined symbol" in record.message and "C compiler" in record.message


@pytest.mark.parametrize("way", ["gpu"], indirect=True)
def test_a_gpu_that_does_not_run_the_kernels_gets_plain_torch_and_a_warning(monkeypatch, caplog):
    device = torch.device(DEVICE["device"])
    assert gpu.runs_on.__wrapped__(device)

    def no_compiler(*maps):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(gpu, "residual", no_compiler)
    assert not gpu.runs_on.__wrapped__(device)
    assert "Failed to find C compiler" in caplog.text and "plain torch takes its place" in caplog.text


@pytest.mark.parametrize("way", ["gpu"], indirect=True)
@pytest.mark.parametrize("wrong", ["residual", "total", "scaled"])
def test_kernels_that_compute_something_else_are_not_used(wrong, monkeypatch, caplog):
    residual, scaled = gpu.residual, gpu.scaled

    def wrong_residual(*maps):
        difference, total = residual(*maps)
        return (difference + 0.01, total) if wrong == "residual" else (difference, total * 1.01)

    if wrong == "scaled":
        monkeypatch.setattr(gpu, "scaled", lambda *of: scaled(*of) * 1.01)
    else:
        monkeypatch.setattr(gpu, "residual", wrong_residual)
    assert not gpu.runs_on.__wrapped__(torch.device(DEVICE["device"]))
    assert "plain torch takes its place" in caplog.text


@pytest.mark.parametrize("way", ["gpu"], indirect=True)
def test_a_full_memory_says_nothing_of_the_kernels(monkeypatch):
    def full(*maps):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "residual", full)
    with pytest.raises(torch.OutOfMemoryError):
        gpu.runs_on.__wrapped__(torch.device(DEVICE["device"]))


# Not interpreted, but compiled for a GPU of two kinds, without one.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mgd_det.distillation.fused import gpu

def compiled(kernel, types, constants, capability):
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm

for capability, dtype in ((80, "fp32"), (90, "bf16")):
    maps = {name: "*" + dtype for name in ("student", "teacher", "residual", "result")}
    others = {"margin": "*fp32", "sums": "*fp32", "groups": "*i64", "factor": "*fp32", "size": "i64"}
    tiles = {"MEMBERS": 4, "TILE_CHANNELS": 1, "TILE_PIXELS": 1024}
    contiguous = {f"{which}_pixel": 1 for which in ("student", "teacher", "residual")}
    for kernel, constants in ((gpu._residual_kernel, {**tiles, **contiguous}), (gpu._scale_kernel, {"TILE": 1024})):
        asm = compiled(kernel, {**maps, **others}, constants, capability)
        assert "cubin" in asm, asm.keys()
"""


@pytest.mark.parametrize("way", ["gpu"], indirect=True)
def test_the_kernels_compile_for_a_gpu(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=environment, check=True, timeout=120)
