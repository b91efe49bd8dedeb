"""Untrusted weights: no code in them runs, and harmless ones load as Detectron2 loads them."""

import argparse
import logging
import pickle
import zipfile
from collections import OrderedDict

import malicious
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.checkpoint.safe_loading import load_pickle, load_torch_file
from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import ALLOW_UNSAFE_FILES


@pytest.fixture(autouse=True)
def by_default(monkeypatch):
    monkeypatch.delenv(ALLOW_UNSAFE_FILES, raising=False)


def model():
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))


MALICIOUS = [
    ("zip.pth", malicious.write_torch),
    ("legacy.pth", malicious.write_legacy_torch),
    ("no_suffix", malicious.write_legacy_torch),
    ("tar.pth", malicious.write_tar),
    ("tar_and_zip.pth", malicious.write_tar_with_zip),
    ("pycls.pyth", malicious.write_torch),
    ("python2.pkl", malicious.write_pickle),
    ("python3.pkl", lambda path, marker: malicious.write_pickle(path, marker, protocol=4)),
]


@pytest.mark.parametrize("name, write", MALICIOUS, ids=[name for name, _ in MALICIOUS])
def test_code_in_weights_runs_by_the_flag_only(tmp_path, monkeypatch, caplog, name, write):
    path, marker = tmp_path / name, tmp_path / "marker"
    write(path, marker)
    what = "tar file" if name.startswith("tar") else r"\w+\.mkdir"
    with pytest.raises(UserError, match=f"weights .*{name}: it .*{what}.*could run code.*--allow-unsafe-files"):
        WeightsCheckpointer(model()).load(str(path))
    assert not marker.exists()

    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    caplog.set_level(logging.WARNING, "mgd_det")
    try:
        WeightsCheckpointer(model()).load(str(path))
    except UserError as e:  # what ran is no checkpoint of pycls or of torch < 0.4
        assert "cannot be read as a checkpoint" in str(e) and name.startswith(("pycls", "tar"))
    assert marker.exists()
    [warning] = [record.getMessage() for record in caplog.records if record.name == "mgd_det.files.unsafe_files"]
    assert str(path) in warning


@pytest.mark.parametrize(
    "content, refused",
    [
        (b"cbuiltins\neval\n(S'1'\ntR.", "builtins.eval"),
        (b"c__builtin__\n__import__\n(S'os'\ntR.", "__builtin__.__import__"),
        (b"cnumpy\nload\n(S'x'\ntR.", "numpy.load"),
        (b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.", "numpy.core.multiarray.fromfile"),
        (b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.", "_codecs.encode with 'zip'"),
        (b"(ios\nsystem\n.", "os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x0ddict.fromkeys\x93.", "builtins.dict.fromkeys"),
    ],
)
def test_what_a_pickle_may_not_refer_to(tmp_path, content, refused):
    (tmp_path / "x.pkl").write_bytes(content)
    with pytest.raises(UserError, match=f"it refers to {refused};"):
        load_pickle(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_containers_in_a_pickle(tmp_path, protocol):
    content = {
        "arrays": [np.arange(6, dtype=np.float32).reshape(2, 3), np.asfortranarray(np.eye(3)), np.zeros((0, 2), "i8")],
        "numbers": (np.float32(1.5), np.int64(3), np.bool_(True), 1 << 70, 2j),
        "text": "ü",
        "bytes": b"\x00\xff",
        "sets": [{1, 2}, frozenset([3])],
        "ordered": OrderedDict(b=1, a=2),
    }
    with open(tmp_path / "x.pkl", "wb") as file:
        pickle.dump(content, file, protocol=protocol)
    loaded = load_pickle(str(tmp_path / "x.pkl"))
    for actual, expected in zip(loaded.pop("arrays"), content.pop("arrays")):
        np.testing.assert_array_equal(actual, expected, strict=True)
    assert loaded == content and list(loaded["ordered"]) == ["b", "a"]
    assert [type(number) for number in loaded["numbers"]] == [type(number) for number in content["numbers"]]


def test_an_array_of_python_2(tmp_path):
    """As cPickle of Python 2 and numpy 1 wrote it: strings of bytes, modules by their old names."""
    raw = np.array([1.5, -2], "<f4").tobytes()
    content = (
        b"}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR"
        b"(K\x01K\x02\x85cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x08" + raw + b"tbs."
    )
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + content)
    loaded = load_pickle(str(tmp_path / "x.pkl"))
    np.testing.assert_array_equal(loaded["conv1_w"], np.array([1.5, -2], np.float32), strict=True)


class Reduced:
    """Pickled, a call of numpy's function with this state, as numpy pickles arrays."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


RECONSTRUCT, NDARRAY = np.zeros(1).__reduce__()[:2]
FROMBUFFER = np.zeros(1).__reduce_ex__(5)[0]
SCALAR = np.float64(0).__reduce__()[0]
F4 = np.dtype("f4")


def dtype(code, state):
    return Reduced(np.dtype, (code, False, True), state)


def array(shape, kind, raw):
    return Reduced(RECONSTRUCT, NDARRAY, (1, shape, kind, False, raw))


@pytest.mark.parametrize(
    "content, refused",
    [
        # Read by numpy itself, the first makes it follow a pointer out of the file: nothing here looks into an array.
        (array((1,), malicious.DtypeOfPointers(), b"\x41" * 8), "numpy.dtype 'V8'"),
        (malicious.DtypeOfPointers(), "numpy.dtype 'V8'"),
        (dtype("f8", (3, "<", None, ("a",), {"a": (F4, 0)}, 8, 1, 0)), "a numpy.dtype '<f8' with fields or objects"),
        (dtype("f8", (3, "<", (F4, (2,)), None, None, 8, 1, 0)), "a numpy.dtype '<f8' with fields or objects"),
        (dtype("f8", (3, "<", None, None, None, -1, -1, 63)), "a numpy.dtype '<f8' with fields or objects"),
        (np.zeros(1, "f4,O"), "numpy.dtype 'V12'"),
        (np.array([None]), "numpy.dtype 'O8'"),
        (Reduced(np.dtype, ("f4,O", False, True)), "numpy.dtype 'f4,O'"),
        (Reduced(np.dtype, ([("a", "O")], False, True)), r"numpy.dtype \[\('a', 'O'\)\]"),
        (Reduced(SCALAR, (np.dtype("O"), b"\x41" * 8)), "numpy.dtype 'O8'"),
        (Reduced(FROMBUFFER, (b"\x41" * 8, np.dtype("V8"), (1,), "C")), "numpy.dtype 'V8'"),
        (Reduced(RECONSTRUCT, (dict, (0,), b"b")), "a subclass of numpy.ndarray"),
    ],
)
def test_what_an_array_in_a_pickle_may_not_be(tmp_path, content, refused):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": content}, 2))
    with pytest.raises(UserError, match=f"it refers to {refused};"):
        load_pickle(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize(
    "content, message",
    [
        (array((3,), F4, bytes(8)), "has 8 bytes"),
        (array((1,), F4, bytes(8)), "has 8 bytes"),
        (array((-1, -2), F4, bytes(8)), r"the shape \(-1, -2\)"),
        (array((2.0,), F4, bytes(8)), r"the shape \(2.0,\)"),
        (array((2,), "f4", bytes(8)), "no dtype"),
        (array((2,), F4, [0.0, 0.0]), "no bytes"),
        (Reduced(SCALAR, (F4, bytes(2))), "has 2 bytes"),
        (Reduced(FROMBUFFER, (bytes(6), F4, (2,), "C")), "has 6 bytes"),
        (Reduced(RECONSTRUCT, NDARRAY), "no content"),
        (dtype("f4", (3, "?", None, None, None, -1, -1, 0)), "byte order"),
    ],
)
def test_a_broken_array_in_a_pickle(tmp_path, content, message):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": content}, 2))
    with pytest.raises(pickle.UnpicklingError, match=message):
        load_pickle(str(tmp_path / "x.pkl"))


def test_bools_in_a_pickle_are_0_or_1(tmp_path):
    content = array((4,), np.dtype(bool), b"\x00\x01\x02\xff")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 2))
    assert load_pickle(str(tmp_path / "x.pkl")).tobytes() == b"\x00\x01\x01\x01"


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("core", ["core", "_core"])
def test_arrays_of_all_plain_kinds(tmp_path, protocol, core):
    """Wherever they are in the containers, with what they share and as numpy 1 and 2 name their modules."""
    kinds = ["?", "i1", "u2", ">i4", "f2", "<f4", ">f8", "c16", "S3", "U2", ">U2"]
    arrays = [np.array([[0, 1, 2], [3, 4, 5]]).astype(kind) for kind in kinds]
    arrays += [np.array(1.5), np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), np.zeros((0, 3), "U2", order="F")]
    content = {"nested": OrderedDict(a=(1, [arrays, (arrays[0],)])), "again": arrays[0], "kind": np.dtype(">f4")}
    content["text"], content["itself"] = np.str_(""), content
    raw = pickle.dumps(content, protocol)
    if protocol < 4:  # names of newer ones have their length before them
        raw = raw.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"numpy.{core}.".encode())
    (tmp_path / "x.pkl").write_bytes(raw)
    loaded = load_pickle(str(tmp_path / "x.pkl"))
    one, (copies, (shared,)) = loaded["nested"]["a"]
    assert one == 1 and shared is copies[0] is loaded["again"] and loaded["itself"] is loaded
    assert loaded["kind"] == np.dtype(">f4") and type(loaded["text"]) is np.str_ and loaded["text"] == ""
    for actual, expected in zip(copies, arrays):
        assert type(actual) is np.ndarray and actual.flags.writeable and len(copies) == len(arrays)
        assert actual.dtype == expected.dtype.newbyteorder("=") and actual.shape == expected.shape
        assert actual.flags.f_contiguous == expected.flags.f_contiguous
        np.testing.assert_array_equal(actual, expected)


def zoo_pickle(weights):
    return {"model": weights, "__author__": "Detectron2 Model Zoo"}


def imagenet_pickle(weights):
    return {"model": weights, "__author__": "torchvision", "matching_heuristics": True}


def caffe2_pickle(weights):
    momenta = {f"{name}_momentum": np.ones(3, np.float32) for name in weights}
    return {"blobs": {**weights, **momenta}, "cfg": "MODEL: {}"}


@pytest.mark.parametrize("form", [zoo_pickle, imagenet_pickle, caffe2_pickle])
def test_a_pickle_is_loaded_as_detectron2_loads_it(tmp_path, form):
    names = ["conv1_w", "res2_0_branch2a_w"] if form is caffe2_pickle else ["stem.conv1.weight", "res2.0.conv1.weight"]
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(3, 3, 1, 1)).astype(np.float32) for name in names}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(form(weights), protocol=2))

    def loaded_by(checkpointer_class):
        convs = [nn.ModuleDict({"conv1": nn.Conv2d(3, 3, 1, bias=False)}) for _ in range(2)]
        net = nn.ModuleDict({"stem": convs[0], "res2": nn.ModuleList(convs[1:])})
        checkpointer_class(net).load(str(tmp_path / "x.pkl"))
        return net.state_dict()

    ours, theirs = loaded_by(WeightsCheckpointer), loaded_by(DetectionCheckpointer)
    for name, array in zip(("stem.conv1.weight", "res2.0.conv1.weight"), weights.values()):
        np.testing.assert_array_equal(ours[name], array)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_checkpoint_of_pycls(tmp_path):
    weights = {"stem.weight": torch.randn(2, 1, 3, 3), "stem.num_batches_tracked": torch.tensor(3)}
    torch.save({"model_state": weights, "epoch": 3}, tmp_path / "x.pyth")
    target = nn.ModuleDict({"stem": nn.Conv2d(1, 2, 3)})
    checkpointer = WeightsCheckpointer(target)
    checkpointer.load(str(tmp_path / "x.pyth"))
    assert torch.equal(target["stem"].weight, weights["stem.weight"])
    assert checkpointer.report.unused == [] and checkpointer.unset_keys == ["stem.bias"]


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_training_checkpoint_of_torch(tmp_path, as_zip):
    """Also of the form before torch 1.6, with the optimizer, the schedule and the options of the program."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(torch.ones(2, 1, 3, 3)).sum().backward()
    optimizer.step()
    content = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=as_zip)
    loaded = load_torch_file(str(tmp_path / "x.pth"))
    assert loaded["args"].lr == 0.1
    momentum = [state["momentum_buffer"] for state in loaded["optimizer"]["state"].values()]
    for actual, parameter in zip(momentum, net.parameters()):
        assert torch.equal(actual, parameter.grad)  # after one step


@pytest.mark.parametrize("end", [b"", b"PK\5\6"], ids=["whole", "no zip to Python"])
def test_torchscript_is_no_weights(tmp_path, monkeypatch, end):
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    malicious.write_torchscript(tmp_path / "x.pth", end)
    assert zipfile.is_zipfile(tmp_path / "x.pth") == (end == b"")
    with pytest.raises(UserError, match="x.pth: it is a TorchScript program"):
        WeightsCheckpointer(model()).load(str(tmp_path / "x.pth"))


def test_a_zip_file_that_torch_cannot_open(tmp_path):
    (tmp_path / "x.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="x.pth: cannot be read as a checkpoint"):
        WeightsCheckpointer(model()).load(str(tmp_path / "x.pth"))


def test_a_pickle_protocol_that_torch_reads_unsafely_only(tmp_path, monkeypatch):
    torch.save(model().state_dict(), tmp_path / "x.pth", pickle_protocol=4)
    with pytest.raises(UserError, match="x.pth: cannot be read as a checkpoint: UnpicklingError: Unsupported operand"):
        WeightsCheckpointer(model()).load(str(tmp_path / "x.pth"))
    monkeypatch.setenv(ALLOW_UNSAFE_FILES, "1")
    checkpointer = WeightsCheckpointer(model())
    checkpointer.load(str(tmp_path / "x.pth"))
    assert checkpointer.unset_keys == []


@pytest.mark.parametrize("name", ["../other.pth", "/tmp/other.pth", "sub/other.pth", ".."])
def test_last_checkpoint_leads_to_no_other_folder(tmp_path, name):
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"model": model().state_dict()}, tmp_path / "other.pth")
    (folder / "last_checkpoint").write_text(name)
    with pytest.raises(UserError, match=f"last_checkpoint.*'{name}'"):
        WeightsCheckpointer(model(), str(folder)).resume_or_load("", resume=True)
