"""The compiled loss at the sizes of a training, against plain torch; tests/distillation/test_fused.py has more."""

import contextlib

import oracles
import pytest
import torch

from mgd_det.distillation.fused import amp_partial_l2, compiled, reference

pytestmark = pytest.mark.gpu

RTOL = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def maps(device, dtypes, layouts=(CONTIGUOUS, CONTIGUOUS), shape=(2, 64, 256, 100, 84)):
    images, students, teachers, height, width = shape
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        torch.randn(images, channels, height, width, device=device, generator=generator)
        .to(dtype)
        .contiguous(memory_format=layout)
        for channels, dtype, layout in zip((students, teachers), dtypes, layouts)
    )
    groups = torch.randperm(teachers, generator=torch.Generator().manual_seed(0)).view(students, -1)
    return student, teacher, -torch.rand(teachers, device=device, generator=generator), groups.to(device)


def test_compiled_code_is_used(device):
    if device.type == "cpu":
        assert not compiled.is_for(torch.ones(1))
    else:
        assert compiled.runs_on(torch.device("cuda", torch.cuda.current_device()))
        assert all(compiled.is_for(torch.ones(1, device=device, dtype=dtype)) for dtype in RTOL)


# In pairs, since each is compiled: every dtype and every layout of both maps.
@pytest.mark.parametrize(
    "dtypes, layouts, factor",
    [
        ((torch.float32, torch.float32), (CONTIGUOUS, CONTIGUOUS), 0.3),
        ((torch.float32, torch.float32), (CHANNELS_LAST, CONTIGUOUS), None),
        ((torch.float16, torch.float16), (CHANNELS_LAST, CHANNELS_LAST), None),
        ((torch.bfloat16, torch.bfloat16), (CONTIGUOUS, CONTIGUOUS), 0.3),
        ((torch.float32, torch.float16), (CONTIGUOUS, CONTIGUOUS), None),
        ((torch.float32, torch.bfloat16), (CONTIGUOUS, CHANNELS_LAST), 0.3),
    ],
)
def test_dtypes_and_layouts(device, dtypes, layouts, factor):
    student, teacher, margin, groups = maps(device, dtypes, layouts, (1, 16, 64, 25, 42))
    expected, expected_gradient = oracles.amp_partial_l2(student, teacher, margin, groups, factor or 1.0)
    student.requires_grad_()
    value = amp_partial_l2(student, teacher, margin, groups, None if factor is None else torch.tensor(factor))
    value.backward()
    rtol = RTOL[dtypes[0]]
    assert value.item() == pytest.approx(expected, rel=rtol)
    expected_gradient = torch.from_numpy(expected_gradient)
    torch.testing.assert_close(student.grad.double().cpu(), expected_gradient, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("dtype", list(RTOL))
def test_large_maps_are_those_of_plain_torch_and_equal_in_every_run(device, dtype):
    student, teacher, margin, groups = maps(device, (dtype, dtype))
    margin, factor = margin[groups].mean(dim=1), torch.tensor(0.5, device=device)
    expected, expected_total = reference.residual(student, teacher, margin, groups, factor)
    version = compiled if compiled.is_for(student, teacher) else reference
    results = [version.residual(student, teacher, margin, groups, factor) for _ in range(2)]
    torch.testing.assert_close(results[0][0], expected, rtol=RTOL[dtype], atol=RTOL[dtype])
    torch.testing.assert_close(results[0][1], expected_total, rtol=RTOL[dtype], atol=0)
    assert all(torch.equal(one, other) for one, other in zip(*results))


def test_maps_of_more_than_two_billion_values(device):
    """An offset of 32 bits would wrap."""
    shape = (2, 64, 64, 4200, 4200) if device.type == "cuda" else (2, 4, 4, 42, 42)
    images, channels, _, height, width = shape
    if device.type == "cuda":
        assert images * channels * height * width > 2**31
        if torch.cuda.mem_get_info()[0] < 30 * 2**30:
            pytest.skip("the maps need 30 GiB")
    student = torch.zeros(images, channels, height, width, dtype=torch.bfloat16, device=device)
    teacher = torch.zeros_like(student)
    student[-1, -1, -1, -1], teacher[-1, -1, -1, -1] = 3.0, 1.0
    student[0, 0, 0, 0] = 5.0
    student.requires_grad_()
    groups = torch.arange(channels, device=device).view(-1, 1)
    value = amp_partial_l2(student, teacher, torch.zeros(channels, device=device), groups)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 4.0 + 25.0
    assert gradient[-1, -1, -1, -1] == 4.0 and gradient[0, 0, 0, 0] == 10.0
    assert gradient.count_nonzero() == 2


def test_the_host_does_not_wait(device):
    student, teacher, margin, groups = maps(device, (torch.float32, torch.float16))
    factor = torch.tensor(0.5, device=device)
    student.requires_grad_()
    amp_partial_l2(student, teacher, margin, groups, factor).backward()
    with waits_are_errors(device):
        amp_partial_l2(student, teacher, margin, groups, factor).backward()
    assert student.grad.abs().max() > 0


@contextlib.contextmanager
def waits_are_errors(device):
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
