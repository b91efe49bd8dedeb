"""Where the tests of the GPU run."""

import os

import pytest
import torch


@pytest.fixture
def device():
    """The GPU. Without one a test is skipped, unless MGD_GPU_TESTS=cpu asks to run it on the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("MGD_GPU_TESTS") == "cpu":
        return torch.device("cpu")
    pytest.skip("there is no GPU that torch can use")


@pytest.fixture
def exact():
    """Convolutions and products with all bits of float32."""
    yield from _with_tf32(False)


@pytest.fixture
def tf32():
    """Convolutions and products in TF32, as a user may allow."""
    yield from _with_tf32(True)


def _with_tf32(is_allowed):
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.9, which refuses to mix this with the other
        name, value = "fp32_precision", "tf32" if is_allowed else "ieee"
        settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    else:
        name, value = "allow_tf32", is_allowed
        settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [getattr(setting, name) for setting in settings]
    for setting in settings:
        setattr(setting, name, value)
    yield
    for setting, old in zip(settings, before):
        setattr(setting, name, old)
