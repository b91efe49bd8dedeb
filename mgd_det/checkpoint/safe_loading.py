"""Readers of checkpoint files that run no code from them: what they do not admit is refused by its name."""

import argparse
import codecs
import pickle
import re
import tarfile
import zipfile
from collections import OrderedDict
from contextlib import nullcontext
from typing import Any, ContextManager, Dict, Tuple

import numpy as np
import torch

from mgd_det.errors import UserError
from mgd_det.safe_files import refuse_unsafe, unsafe_files_allowed

# How the releases of torch say what their safe reader refused.
_REFUSED_BY_TORCH = re.compile(
    r"GLOBAL (\S+?) (?:was not|whose)|Unsupported class (\S+)|unrecognized function (.+)|but got (.+)"
)


def load_torch_file(path: str) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors, plain containers and the options of a training program.

    Raises:
        UserError: it refers to anything else, and unsafe files are not allowed.
        Exception: it cannot be read (of the readers of zip, pickle and torch).
    """
    if tarfile.is_tarfile(path):
        # torch < 2.6 runs code from it even by weights_only=True (CVE-2025-32434), newer ones refuse it.
        refuse_unsafe(path, "it is a tar file of torch < 0.4")
        return torch.load(path, map_location="cpu", weights_only=False)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError("it is a TorchScript program: give the state_dict() of the model")
    try:
        with _options_of_trainings():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        refuse_unsafe(path, _refusal(e))
    return torch.load(path, map_location="cpu", weights_only=False)


def load_pickle(path: str) -> Any:
    """What a ``.pkl`` holds, of Python 2 or 3: numpy's arrays and numbers, and plain containers.

    Raises:
        UserError: it refers to anything else, and unsafe files are not allowed.
        Exception: it cannot be read (of pickle).
    """
    with open(path, "rb") as file:
        try:
            # "latin1": as Detectron2 reads what Python 2 wrote.
            return _ArraysUnpickler(file, encoding="latin1").load()
        except _RefusedGlobal as e:
            refuse_unsafe(path, f"it refers to {e}")
        file.seek(0)
        return pickle.load(file, encoding="latin1")


def load_safetensors(path: str) -> Dict[str, torch.Tensor]:
    """The tensors of a ``.safetensors`` file, on the CPU. Raises UserError where the library is not installed."""
    try:
        from safetensors.torch import load_file
    except ImportError as e:
        raise UserError("the library that reads it is not installed: pip install safetensors") from e
    return load_file(path, device="cpu")


def _refusal(error: pickle.UnpicklingError) -> str:
    """What torch's safe reader refused; where it names nothing and could not read on, the error is raised anew.

    Without torch's advice, which is to read unsafely whatever the fault.
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
    """The name of a class or function that a pickle refers to and may not."""


class _ArraysUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise _RefusedGlobal(f"{module}.{name}") from None


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How Python 3 writes bytes for Python 2 to read; codecs.encode itself knows codecs that do more."""
    if encoding not in ("latin1", "latin-1"):
        raise _RefusedGlobal(f"_codecs.encode with {encoding!r}")
    return codecs.encode(text, encoding)


def _admitted() -> Dict[Tuple[str, str], Any]:
    """What a pickle of arrays and plain containers refers to: module and name in the file, and what it stands for."""
    array = np.zeros(1)
    # Private to numpy, and in another module since numpy 2.
    functions = {
        ("multiarray", "_reconstruct"): array.__reduce__()[0],
        ("multiarray", "scalar"): np.float64(0).__reduce__()[0],
        ("numeric", "_frombuffer"): array.__reduce_ex__(5)[0],
    }
    admitted: Dict[Tuple[str, str], Any] = {
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for (module, name), function in functions.items()
    }
    admitted.update({("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype})
    admitted.update({("collections", "OrderedDict"): OrderedDict, ("_codecs", "encode"): _encode})
    for kind in (bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset):
        for module in ("builtins", "__builtin__"):  # Python 2's name
            admitted[module, kind.__name__] = kind
    return admitted


_ADMITTED = _admitted()


def _options_of_trainings() -> ContextManager[None]:
    """Lets torch.load read the training programs' options, which torchvision's and timm's save with the weights."""
    safe_globals = getattr(torch.serialization, "safe_globals", None)  # torch >= 2.5
    return safe_globals([argparse.Namespace]) if safe_globals else nullcontext()
