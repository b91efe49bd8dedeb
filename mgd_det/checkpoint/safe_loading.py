"""Readers of checkpoint files that run no code from them: they accept a list of types and refuse any other by name."""

import argparse
import codecs
import math
import pickle
import re
import tarfile
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, Optional, Tuple

import numpy as np
import torch

from mgd_det.errors import UserError
from mgd_det.files.unsafe_files import refuse_unsafe, unsafe_files_allowed

# How the messages of several torch releases name what their safe reader refused.
_REFUSED_BY_TORCH = re.compile(
    r"GLOBAL (\S+?) (?:was not|whose)|Unsupported class (\S+)|unrecognized function (.+)|but got (.+)"
)


def load_torch_file(path: str) -> Any:
    """Read what ``torch.save`` wrote, on the CPU: tensors, plain containers and the options of a training program.

    Raises:
        UserError: it refers to anything else, and unsafe files are not allowed.
        Exception: it cannot be read; the readers of zip, pickle and torch raise all kinds.
    """
    if tarfile.is_tarfile(path):
        # torch < 2.6 runs code from it even by weights_only=True (CVE-2025-32434), newer ones refuse it.
        refuse_unsafe(path, "it is a tar file of torch < 0.4")
        return torch.load(path, map_location="cpu", weights_only=False)
    if _is_torchscript(path):
        raise UserError("it is a TorchScript program: give the state_dict() of the model")
    try:
        with _options_of_trainings():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        refuse_unsafe(path, _refusal(e))
    return torch.load(path, map_location="cpu", weights_only=False)


def load_pickle(path: str) -> Any:
    """Read a ``.pkl`` of Python 2 or 3: numpy's arrays and numbers, and plain containers.

    Raises:
        UserError: it refers to anything else, and unsafe files are not allowed.
        Exception: it cannot be read; pickle raises all kinds.
    """
    with open(path, "rb") as file:
        try:
            # "latin1": as Detectron2 reads files of Python 2.
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
    # By torch's own reader: another reader of zip files may see other contents.
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return False
        file.seek(0)
        records = torch._C.PyTorchFileReader(file).get_all_records()
    return any(name == "constants.pkl" or name.startswith("code/") for name in records)


def _refusal(error: pickle.UnpicklingError) -> str:
    """Return what torch's safe reader refused; raise the error again if it names nothing and unsafe files are refused.

    Torch's advice, to read unsafely in any case, is left out.
    """
    refused = _REFUSED_BY_TORCH.search(str(error))
    if refused is not None:
        name = next(group for group in refused.groups() if group)
        hint = " (torch 2.5 and newer read it safely)" if name == "argparse.Namespace" else ""
        return f"it refers to {name}{hint}"
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
    """Encode text as bytes, which is how Python 3 writes bytes for Python 2; codecs.encode itself has unsafe codecs."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedGlobal(f"_codecs.encode with {encoding!r}")
    return codecs.encode(text, encoding)


class _NdarrayName:
    """Stands for numpy.ndarray, which a pickle names but need not call."""


class _Dtype:
    """Stands for a numpy.dtype, whose own state would let a pickle declare its bytes to be pointers to objects."""

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
    """Stands for a numpy.ndarray, which would accept any state."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self) -> None:
        self.value: Optional[np.ndarray] = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, raw = state
        self.value = _array_of(raw, dtype, shape, "F" if is_fortran else "C")


def _reconstruct(subtype: Any, shape: Any, typecode: Any) -> _Array:
    if subtype is not _NdarrayName:
        raise _RefusedGlobal("a subclass of numpy.ndarray")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> _Array:
    array = _Array()
    if order == "K" and axis_order is not None:
        array.value = _array_of(raw, dtype, shape, "C").transpose(axis_order)
    else:
        array.value = _array_of(raw, dtype, shape, order)
    return array


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array_of(raw, dtype, (), "C")[()]


def _array_of(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return the array with these bytes, after a check that it needs as many."""
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
    if array.dtype.kind == "b":  # numpy relies on 0 and 1; a mask with other bytes makes it write past its memory
        return array.view(np.uint8) != 0
    return array.astype(array.dtype.newbyteorder("="), order="K")  # a copy, which may be written; as numpy reads them


def _with_arrays(node: Any, done: Dict[int, Tuple[Any, Any]]) -> Any:
    """Replace the stand-ins in an unpickled object by arrays and dtypes; dicts and lists are changed in place.

    Args:
        node: the object.
        done: containers seen and their replacements, by id; holding them keeps their ids from being used again.
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
        unchanged = all(new is old for new, old in zip(values, node))
        done[id(node)] = node, node if unchanged else values
        return done[id(node)][1]
    return node


def _accepted() -> Dict[Tuple[str, str], Any]:
    """Return what a pickle of arrays and plain containers may refer to, by module and name in the file."""
    # Private to numpy, and in another module since numpy 2.
    functions = {
        ("multiarray", "_reconstruct"): _reconstruct,
        ("multiarray", "scalar"): _scalar,
        ("numeric", "_frombuffer"): _frombuffer,
    }
    accepted: Dict[Tuple[str, str], Any] = {
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for (module, name), function in functions.items()
    }
    accepted.update({("numpy", "ndarray"): _NdarrayName, ("numpy", "dtype"): _dtype})
    accepted.update({("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): _encode})
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset):
        for module in ("builtins", "__builtin__"):  # Python 2's name
            accepted[module, kind.__name__] = kind
    return accepted


_ACCEPTED = _accepted()


def _options_of_trainings() -> ContextManager[None]:
    """Let torch.load read the options that the training programs of torchvision and timm save with the weights."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    return safe_globals([argparse.Namespace]) if safe_globals else nullcontext()
