import argparse
import pickle
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.errors import UserError


def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


def assert_equal(module, expected):
    for actual, value in zip(module.state_dict().values(), expected.state_dict().values()):
        assert torch.equal(actual, value)


def test_loads_and_names_what_it_left_unset(tmp_path):
    source, target = model(), model()
    state = source.state_dict()
    state.pop("1.bias")
    state.pop("1.num_batches_tracked")
    state["0.bias"] = torch.zeros(7)
    torch.save({"model": state}, tmp_path / "some.pth")
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "some.pth"))
    assert torch.equal(target[0].weight, source[0].weight)
    assert sorted(checkpointer.unset_keys) == ["0.bias", "1.bias"]


def test_a_bare_state_dict(tmp_path):
    source, target = model(), model()
    torch.save(source.state_dict(), tmp_path / "bare.pth")
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "bare.pth"))
    assert torch.equal(target[0].weight, source[0].weight)
    assert checkpointer.unset_keys == []


def save(value):
    return lambda path: torch.save(value, path)


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("absent.pth", lambda path: None, "absent.pth: there is no such file"),
        ("bytes.pth", lambda path: path.write_bytes(b"\x00\x01nonsense"), "bytes.pth: cannot be read as a checkpoint"),
        ("empty.pth", lambda path: path.write_bytes(b""), "empty.pth: cannot be read as a checkpoint"),
        ("bytes.pkl", lambda path: path.write_bytes(b"nonsense"), "bytes.pkl: cannot be read as a checkpoint"),
        ("list.pth", save([1, 2]), "list.pth: cannot be read as a checkpoint: "),
        ("tensor.pth", save(torch.zeros(2)), "tensor.pth: cannot be read as a checkpoint"),
        pytest.param(
            "torn.safetensors",
            lambda path: path.write_bytes(b"nonsense"),
            "torn.safetensors: cannot be read",
            marks=pytest.mark.skipif(find_spec("safetensors") is None, reason="safetensors is not installed"),
        ),
        ("other.pth", save({"epoch": 3}), "other.pth: cannot be read as a checkpoint: its entry 'epoch' .* int"),
        ("number.pth", save({"model": 3}), "number.pth: cannot be read as a checkpoint: "),
        ("foreign.pth", save({"fc.weight": torch.zeros(2)}), "fit none of the model's 6 tensors.*fc.weight"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path, name, write, message):
    write(tmp_path / name)
    checkpointer = WeightsCheckpointer(model())
    with pytest.raises(UserError, match=message):
        checkpointer.load(str(tmp_path / name))
    # The checkpointer can be used again.
    torch.save(model().state_dict(), tmp_path / "good.pth")
    checkpointer.load(str(tmp_path / "good.pth"))


def test_a_cut_file_is_unreadable(tmp_path):
    torch.save(model().state_dict(), tmp_path / "whole.pth")
    content = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cut.pth: cannot be read as a checkpoint"):
        WeightsCheckpointer(model()).load(str(tmp_path / "cut.pth"))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
def test_weights_inside_a_training_checkpoint(tmp_path, key):
    """With the options of the training program, as torchvision's and timm's save them, and DataParallel's prefix."""
    source, target = model(), model()
    state = {f"module.{name}": value for name, value in source.state_dict().items()}
    torch.save({key: state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, tmp_path / "training.pth")
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "training.pth"))
    assert_equal(target, source)
    assert checkpointer.unset_keys == [] and checkpointer.report.unused == []


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    source, target = model(), model()
    safetensors.save_file(source.state_dict(), tmp_path / "weights.safetensors")
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "weights.safetensors"))
    assert_equal(target, source)
    assert checkpointer.unset_keys == []


def test_safetensors_is_not_installed(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="weights.safetensors: .* pip install safetensors"):
        WeightsCheckpointer(model()).load(str(tmp_path / "weights.safetensors"))


def test_a_resumed_checkpoint_gives_back_the_rest(tmp_path):
    """What a trainer saved beside the model."""
    source, target = model(), model()
    WeightsCheckpointer(source, str(tmp_path)).save("model_0000004", iteration=4)
    rest = WeightsCheckpointer(target, str(tmp_path)).resume_or_load("", resume=True)
    assert_equal(target, source)
    assert rest == {"iteration": 4}


def test_detectron2s_own_heuristics(tmp_path):
    """A .pkl in the names of Caffe2, as the ImageNet weights of Detectron2's model zoo."""
    target = nn.Module()
    target.stem = nn.Module()
    target.stem.conv1 = nn.Conv2d(3, 4, 7, bias=False)
    weight = np.random.default_rng(0).normal(size=(4, 3, 7, 7)).astype(np.float32)
    (tmp_path / "r50.pkl").write_bytes(pickle.dumps({"conv1_w": weight, "fc1000_w": np.zeros((2, 2))}))
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "r50.pkl"))
    assert torch.equal(target.stem.conv1.weight, torch.from_numpy(weight))
    assert checkpointer.unset_keys == [] and checkpointer.report.unused == ["fc1000.weight"]
