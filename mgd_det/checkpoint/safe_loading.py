"""Readers of checkpoint files that run no code: they accept a list of types and name any other that they refuse."""

import argparse
import math
import pickle
import re
import tarfile
from collections import OrderedDict
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch

from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import refuse_unsafe, unsafe_files_allowed

# How torch's messages name what its safe reader refused; they differ between releases.
_REFUSED_BY_TORCH = re.compile(
    r"GLOBAL (\S+?) (?:was not|whose)|Unsupported class (\S+)|unrecognized function (.+)|but got (.+)"
)


def load_torch_file(path: str) -> Any:
    """Read a file of ``torch.save`` on the CPU: tensors, plain containers and the options of a training program.

    Raises:
        UserError: the file refers to anything else, and unsafe files are not allowed.
        Exception: the file cannot be read; the readers of zip, pickle and torch raise many kinds.
    """
    if tarfile.is_tarfile(path):
        # torch < 2.6 runs code from it even with weights_only=True (CVE-2025-32434); newer releases refuse it.
        refuse_unsafe(path, "it is a tar file of torch < 0.4")
        return torch.load(path, map_location="cpu", weights_only=False)
    if _is_torchscript(path):
        raise UserError("it is a TorchScript program: give the state_dict() of the model")
    try:
        # The training programs of torchvision and timm save their options with the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        refuse_unsafe(path, _refusal(e))
    return torch.load(path, map_location="cpu", weights_only=False)


def load_pickle(path: str) -> Any:
    """Read a ``.pkl`` of Python 2 or 3: numpy's arrays and numbers, and plain containers.

    Raises:
        UserError: the file refers to anything else, and unsafe files are not allowed.
        Exception: the file cannot be read; pickle raises many kinds.
    """
    with open(path, "rb") as file:
        try:
            # Detectron2 reads files of Python 2 as "latin1", too.
            return _with_arrays(_ArraysUnpickler(file, encoding="latin1").load(), {})
        except _RefusedGlobal as e:
            refuse_unsafe(path, f"it refers to {e}")
        file.seek(0)
        return pickle.load(file, encoding="latin1")


def load_safetensors(path: str) -> Dict[str, torch.Tensor]:
    """Read the tensors of a ``.safetensors`` file, on the CPU.

    Raises:
        UserError: the library is not installed.
    """
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError("the library that reads it is not installed: pip install safetensors") from e
    return load_file(path, device="cpu")


def _is_torchscript(path: str) -> bool:
    # Read by torch itself: another reader of zip files may see other contents.
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        file.seek(0)
        records = torch._C.PyTorchFileReader(file).get_all_records()
    return any(name == "constants.pkl" or name.startswith("code/") for name in records)


def _refusal(error: pickle.UnpicklingError) -> str:
    """Return what torch's safe reader refused, without torch's advice to read the file unsafely.

    Raises:
        pickle.UnpicklingError: the message names nothing, and unsafe files are not allowed.
    """
    refused = _REFUSED_BY_TORCH.search(str(error))
    if refused is not None:
        return f"it refers to {next(filter(None, refused.groups()))}"
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].lstrip().partition("\n")[0]
    if not unsafe_files_allowed():
        raise pickle.UnpicklingError(reason) from error
    return f"torch's safe reader refuses it ({reason})"


class _RefusedGlobal(pickle.UnpicklingError):
    """The name of a class or function that a pickle refers to and that is not accepted."""


class _ArraysUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ACCEPTED[module, name]
        except KeyError:
            raise _RefusedGlobal(f"{module}.{name}") from None


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stand for codecs.encode, with which Python 3 writes bytes for Python 2, without its unsafe codecs."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedGlobal(f"_codecs.encode with {encoding!r}")
    return text.encode("latin1")


class _NdarrayName:
    """A stand-in for numpy.ndarray, which a pickle names but need not call."""


class _Dtype:
    """A stand-in for a numpy.dtype, whose own ``__setstate__`` can declare that bytes are pointers to objects."""

    __hash__ = None  # type: ignore[assignment]  # it changes while its state is read

    def __init__(self, dtype: np.dtype) -> None:
        self.value = dtype

    def __setstate__(self, state: Any) -> None:
        _, byte_order, subarray, names, fields, _, _, flags = state[:8]
        if (subarray, names, fields) != (None, None, None) or flags not in (0, _NEEDS_INIT):
            raise _RefusedGlobal(f"a numpy.dtype {self.value.str!r} with fields or objects")
        if byte_order not in ("<", ">", "=", "|"):
            raise pickle.UnpicklingError(f"a numpy.dtype has the byte order {byte_order!r}")
        self.value = self.value.newbyteorder(byte_order)


# Without the letters for objects and records, which np.dtype also accepts as "O8", "V8" or "f4,O".
_PLAIN_DTYPE = re.compile(r"[biufc]\d{1,2}|[SU]\d{1,9}", re.ASCII)
_NEEDS_INIT = 8  # the flag that numpy gives U


def _dtype(code: Any, align: Any, copy: Any) -> _Dtype:
    if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
        raise _RefusedGlobal(f"numpy.dtype {code!r}")
    return _Dtype(np.dtype(code))


class _Array:
    """A stand-in for a numpy.ndarray, which would accept any state."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Optional[np.ndarray] = None) -> None:
        self.value = value

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = _array_of(raw, dtype, shape, "F" if is_fortran else "C")


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> _Array:
    if subtype is not _NdarrayName:
        raise _RefusedGlobal("a subclass of numpy.ndarray")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> _Array:
    if order == "K" and axis_order is not None:
        return _Array(_array_of(raw, dtype, shape, "C").transpose(axis_order))
    return _Array(_array_of(raw, dtype, shape, order))


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array_of(raw, dtype, (), "C")[()]


def _array_of(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return a writable array of these bytes after a check of their number."""
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array has no dtype or no bytes")
    if not isinstance(shape, tuple) or not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError(f"an array has the shape {shape!r}")
    if len(raw) != dtype.value.itemsize * math.prod(shape):
        raise pickle.UnpicklingError(f"an array of shape {shape} and dtype {dtype.value} has {len(raw)} bytes")
    if not raw:  # np.frombuffer takes no dtype of size 0
        return np.ndarray(shape, dtype.value, order=order)
    array = np.frombuffer(raw, dtype.value).reshape(shape, order=order)
    if array.dtype.kind == "b":  # a mask with bytes other than 0 and 1 makes numpy write past its memory
        return array.view(np.uint8) != 0
    return array.astype(array.dtype.newbyteorder("="), order="K")


def _with_arrays(node: Any, done: Dict[int, Tuple[Any, Any]]) -> Any:
    """Replace the stand-ins in an unpickled object by arrays and dtypes. Dicts and lists are changed in place.

    Args:
        node: the object.
        done: containers already visited and their replacements, by id. It keeps them alive, so that no id is reused.
    """
    if isinstance(node, (_Array, _Dtype)):
        if node.value is None:
            raise pickle.UnpicklingError("an array has no content")
        return node.value
    if id(node) in done:
        return done[id(node)][1]
    if isinstance(node, dict):
        done[id(node)] = node, node
        for key, value in list(dict.items(node)):
            dict.__setitem__(node, key, _with_arrays(value, done))
    elif isinstance(node, list):
        done[id(node)] = node, node
        node[:] = [_with_arrays(value, done) for value in node]
    elif isinstance(node, tuple):
        values = tuple(_with_arrays(value, done) for value in node)
        done[id(node)] = node, values
        return values
    return node


# What a pickle of arrays and plain containers may refer to, by module and name in the file.
_ACCEPTED: Dict[Tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NdarrayName,
    ("numpy", "dtype"): _dtype,
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):  # before numpy 2, and since
    _ACCEPTED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ACCEPTED[f"{_core}.multiarray", "scalar"] = _scalar
    _ACCEPTED[f"{_core}.numeric", "_frombuffer"] = _frombuffer
for _kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset):
    _ACCEPTED["builtins", _kind.__name__] = _kind
    _ACCEPTED["__builtin__", _kind.__name__] = _kind  # Python 2
