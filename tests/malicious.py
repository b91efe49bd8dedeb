"""Files that run code if they are read unsafely: each makes the folder ``marker``."""

import os
import pickle
import tarfile
import zipfile

import numpy as np
import torch


class Payload:
    """Pickled, a call of os.mkdir."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def weights(marker):
    """Tensors by name, with a payload deep inside."""
    return {"model": {"0.weight": torch.zeros(2, 1, 3, 3)}, "trainer": {"hooks": [{"EvalHook": Payload(marker)}]}}


def write_torch(path, marker):
    torch.save(weights(marker), path)


def write_legacy_torch(path, marker):
    torch.save(weights(marker), path, _use_new_zipfile_serialization=False)


def write_tar(path, marker):
    """The form of torch < 0.4, of which each part is a pickle."""
    part = path.with_suffix(".part")
    part.write_bytes(pickle.dumps(Payload(marker)))
    with tarfile.open(path, "w") as tar:
        for name in ("storages", "tensors", "pickle"):
            tar.add(part, name)


def write_tar_with_zip(path, marker):
    """A tar file to those that look at its begin, a zip file to those that look at its end."""
    write_tar(path, marker)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/data.pkl", b"N.")


def write_pickle(path, marker, protocol=2):
    content = {"model": {"0.weight": np.zeros((2, 1, 3, 3), "f4")}, "__author__": ["a stranger", Payload(marker)]}
    path.write_bytes(pickle.dumps(content, protocol))


def yaml_tag(marker):
    return f"!!python/object/apply:os.mkdir ['{marker}']"


def yaml_resolver(marker, resolver="oc.create"):
    """An interpolation that becomes a node with a _target_ after a config was read."""
    return f"'${{{resolver}:{{_target_: os.mkdir, path: {marker}}}}}'"


def write_torchscript(path, end=b""):
    """What torch takes for a TorchScript program; by end, Python's zipfile may not even take it for a zip file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in [
            ("version", "3"),
            ("data.pkl", pickle.dumps({}, 2)),
            ("constants.pkl", pickle.dumps((), 2)),
        ]:
            archive.writestr(f"x/{name}", content)
    path.write_bytes(path.read_bytes() + end)


class DtypeOfPointers:
    """Pickled, a dtype that tells numpy that 8 raw bytes, which are no object, are one."""

    def __reduce__(self):
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)
