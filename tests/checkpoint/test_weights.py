import pytest
import torch
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.errors import UserError


def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


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


def test_a_bare_state_dict_serves(tmp_path):
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
        ("list.pth", save([1, 2]), "list.pth: cannot be read as a checkpoint: it holds no tensors by name"),
        ("tensor.pth", save(torch.zeros(2)), "tensor.pth: cannot be read as a checkpoint"),
        ("number.pth", save({"model": 3}), "number.pth: cannot be read as a checkpoint: it holds no tensors"),
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


def test_unknown_torchvision_names():
    with pytest.raises(UserError, match="torchvision://resnet18"):
        WeightsCheckpointer(model()).load("torchvision://resnet-18")


def test_torchvision_names_are_downloaded_and_converted(tmp_path, monkeypatch):
    import torchvision
    from detectron2.utils.file_io import PathManager

    resnet = torchvision.models.resnet18(weights=None)
    torch.save(resnet.state_dict(), tmp_path / "resnet18.pth")
    asked = []
    local = PathManager.get_local_path
    monkeypatch.setattr(
        PathManager,
        "get_local_path",
        lambda path, **k: (asked.append(path), str(tmp_path / "resnet18.pth"))[1] if "://" in path else local(path),
    )
    holder = nn.Module()
    holder.backbone = nn.Module()
    holder.backbone.bottom_up = nn.Module()
    holder.backbone.bottom_up.stem = nn.Module()
    holder.backbone.bottom_up.stem.conv1 = nn.Conv2d(3, 64, 7, bias=False)
    WeightsCheckpointer(holder).load("torchvision://resnet18")
    assert asked and asked[0].startswith("https://download.pytorch.org/models/resnet18")
    assert torch.equal(holder.backbone.bottom_up.stem.conv1.weight, resnet.conv1.weight)
