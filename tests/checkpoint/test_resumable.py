"""The checkpoint that a training resumes from if some are damaged."""

import multiprocessing
import re
import zipfile

import pytest
import torch
from checkpoint.trainings import Training, assert_resumes, names
from torch import nn

from mgd_det.errors import UserError


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def forge_the_pickle(path):
    """Make a zip file with correct checksums and invalid content."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, b"\x80nonsense" if name.endswith("data.pkl") else content)


def of_weights_alone(path):
    torch.save({"model": torch.load(path)["model"]}, path)


@pytest.mark.parametrize(
    "damage, reason",
    [
        (cut, "cannot be read: it is empty, cut short"),
        (lambda path: path.write_bytes(b""), "cannot be read: it is empty"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "cannot be read: it is empty"),
        (flip_a_bit, "the checksum of its part .* is wrong"),
        (forge_the_pickle, "cannot be read: .*Error: "),
        (of_weights_alone, "it was not saved by a training: it has no entry optimizer"),
        (lambda path: torch.save([1], path), "it was not saved by a training: it has no entry model, optimizer"),
    ],
)
def test_falls_back_on_the_newest_older_one_that_reads(tmp_path, caplog, damage, reason):
    training = Training(tmp_path)
    training.save(1)
    expected = training.save(3)
    training.save(5, 7)
    for name in ("model_0000005.pth", "model_0000007.pth"):
        damage(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if name.endswith(".pth")}
    assert_resumes(tmp_path, "model_0000003.pth", expected)
    (warning,) = [record.message for record in caplog.records if "Falling back" in record.message]
    assert re.search(f"model_0000007.pth: .*{reason}.*; model_0000005.pth: .*{reason}.*model_0000003.pth", warning)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    # The next resume starts from there too.
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    caplog.clear()
    assert_resumes(tmp_path, "model_0000003.pth", expected)
    assert not any("Falling back" in record.message for record in caplog.records)


@pytest.mark.parametrize("last", [None, b"", b"\n", bytes(17), b"model_0000099.pth"])
def test_a_last_checkpoint_that_names_none(tmp_path, last):
    expected = Training(tmp_path).save(1, 3)
    if last is None:
        (tmp_path / "last_checkpoint").unlink()
    else:
        (tmp_path / "last_checkpoint").write_bytes(last)
    assert_resumes(tmp_path, "model_0000003.pth", expected)


def test_the_final_checkpoint_counts_by_its_iteration(tmp_path):
    training = Training(tmp_path)
    training.save(3)
    training.step()
    training.checkpointer.save("model_final", iteration=5)
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    checkpointer = Training(tmp_path).checkpointer
    checkpointer.resume_or_load("")
    assert checkpointer.resumed_from == str(tmp_path / "model_final.pth")
    # Newer checkpoints than the damaged one, final or periodic, are of an earlier training: they are not used.
    training.save(9)
    cut(tmp_path / "model_0000009.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    checkpointer.resume_or_load("")
    assert checkpointer.resumed_from == str(tmp_path / "model_0000003.pth")


def test_if_none_can_be_read_the_error_names_them_all_and_nothing_changes(tmp_path):
    Training(tmp_path).save(1, 3)
    for name in ("model_0000001.pth", "model_0000003.pth"):
        cut(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    message = "--resume: no checkpoint in .*: model_0000003.pth: .*model_0000001.pth: .*or train without --resume"
    with pytest.raises(UserError, match=message.replace(": model", ".*model")):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("name", ["../other/model_0000001.pth", "/tmp/model_0000001.pth", "..", "sub/model_final.pth"])
def test_last_checkpoint_does_not_lead_out_of_the_folder(tmp_path, name):
    Training(tmp_path).save(1)
    (tmp_path / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match=f"last_checkpoint holds '{name}'"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)


def test_a_folder_without_checkpoints_starts_from_the_weights(tmp_path):
    torch.save({"model": Training(tmp_path, seed=3).model.state_dict()}, tmp_path / "weights.pth")
    training = Training(tmp_path)
    training.checkpointer.resume_or_load(str(tmp_path / "weights.pth"), resume=True)
    assert training.checkpointer.resumed_from == ""
    assert torch.equal(training.model[0].weight, Training(tmp_path, seed=3).model[0].weight)


def test_a_checkpoint_of_another_network_is_no_fallback(tmp_path):
    Training(tmp_path, features=30).save(1)
    Training(tmp_path).save(3)
    cut(tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match=r"model_0000001.pth .*another network: .*0\.weight"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_a_checkpoint_of_another_optimizer_is_named(tmp_path):
    Training(tmp_path).save(1)
    training = Training(tmp_path)
    training.optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(UserError, match="model_0000001.pth does not fit this training: ValueError: .*groups"):
        training.checkpointer.resume_or_load("", resume=True)


def test_code_in_a_checkpoint_is_not_skipped_as_damage(tmp_path):
    Training(tmp_path).save(1, 3)
    content = torch.load(tmp_path / "model_0000003.pth")
    torch.save({**content, "x": multiprocessing.Process}, tmp_path / "model_0000003.pth")
    with pytest.raises(UserError, match="model_0000003.pth: it refers to multiprocessing"):
        Training(tmp_path).checkpointer.resume_or_load("", resume=True)
