"""Weights written in float16."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer, write_half_precision
from mgd_det.errors import UserError


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


def test_half_precision_weights_load_into_a_float32_model(tmp_path):
    trained, path = net(), str(tmp_path / "half.safetensors")
    write_half_precision(path, trained.state_dict(), {"AP": "20.86"})
    other = net()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    checkpointer = WeightsCheckpointer(other)
    checkpointer.load(path)
    assert checkpointer.unset_keys == []
    for name, tensor in other.state_dict().items():
        expected = trained.state_dict()[name]
        assert tensor.dtype == expected.dtype, name
        torch.testing.assert_close(tensor, expected, rtol=2**-11, atol=3e-8)


def test_the_file_has_float16_numbers_integers_and_metadata(tmp_path):
    path = str(tmp_path / "half.safetensors")
    # A view that is not contiguous, and a number between two of float16: 1 + 2^-11 goes to the even neighbour.
    tensors = {"weight": torch.tensor([[1.0, 2.0], [1 + 2**-11, 4.0]]).t(), "count": torch.tensor(70000)}
    write_half_precision(path, tensors, {"commit": "abc"})
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"commit": "abc"}
        weight, count = file.get_tensor("weight"), file.get_tensor("count")
    assert weight.dtype == torch.float16 and weight.tolist() == [[1.0, 1.0], [2.0, 4.0]]
    assert count.dtype == torch.int64 and count.item() == 70000


def test_values_beyond_float16_are_refused(tmp_path):
    path = tmp_path / "half.safetensors"
    with pytest.raises(UserError, match=f"{path}: head.weight "):
        write_half_precision(str(path), {"head.weight": torch.tensor([70000.0])}, {})
    assert not path.exists()
