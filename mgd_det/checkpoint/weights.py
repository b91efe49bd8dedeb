"""Loading weights, with a report of what was loaded and clear errors about a file."""

import logging
import os
from typing import Any, Dict, List, Optional

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from mgd_det.checkpoint.conversion import convert_weights
from mgd_det.checkpoint.load_report import LoadReport
from mgd_det.checkpoint.resumable import named_checkpoint
from mgd_det.checkpoint.safe_loading import load_pickle, load_safetensors, load_torch_file
from mgd_det.checkpoint.sources import fetch_named_weights, is_named
from mgd_det.checkpoint.weights_format import without_counts
from mgd_det.errors import UserError, first_line
from mgd_det.files.downloads import local_copy

logger = logging.getLogger(__name__)


class WeightsCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also reads weights of torchvision and timm and reports what it loaded.

    A path may be

    - anything that Detectron2 takes, also as ``.safetensors``;
    - a file of a torchvision or timm network that the model has as its backbone, or of a torchvision detector whose
      ResNet and FPN it has, ``.pth`` or ``.safetensors``, bare or as entry "model", "state_dict" or
      "model_state_dict" of a training checkpoint;
    - "torchvision://<model>" or "timm://<model>", which the library downloads to its own cache
      (:mod:`mgd_det.checkpoint.sources`).

    No code runs from a file (:mod:`mgd_det.checkpoint.safe_loading`), and a download with a hash in its name is
    verified (:mod:`mgd_det.files.downloads`).

    A network other than the model's backbone is an error. A checkpoint in Detectron2's own names may fill a part of the
    model: the log and the attributes say which.

    Attributes:
        report: what the last load did, for every part of the detector; it prints as a table.
        unset_keys: the model's tensors that the file did not set, because it lacks them or has them in another shape.
    """

    report: LoadReport = LoadReport(model=[])
    unset_keys: List[str] = []

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """Load a checkpoint, as Detectron2's checkpointer does.

        Raises:
            UserError: the file does not exist, cannot be read, or is of another network.
        """
        try:
            if is_named(path):
                logger.info(f"Loading {path}")
                checkpoint: Dict[str, Any] = {"model": fetch_named_weights(path)}
                self._log_incompatible_keys(self._load_model(checkpoint))
                return checkpoint
            local = local_copy(path.partition("?")[0])
            if local and not os.path.isfile(local):
                raise UserError(f"there is no such file{self._advice(path)}")
            return super().load(path, checkpointables=checkpointables)
        except UserError as e:
            raise UserError(f"weights {path}: {e}") from e
        except OSError as e:  # of a download
            raise UserError(f"weights {path}: the download failed: {e}{self._advice(path)}") from e
        except _UnreadableError as e:
            advice = f". Delete {local} to download it again." if "://" in path else self._advice(path)
            raise UserError(f"weights {path}: cannot be read as a checkpoint: {e}{advice}") from e
        finally:
            self._parsed_url_during_load = None

    def get_checkpoint_file(self) -> str:
        """Return the path of the checkpoint that "last_checkpoint" names, or "".

        Raises:
            UserError: it names a file of another folder.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file()
        name = named_checkpoint(self.save_dir)
        return "" if name is None else os.path.join(self.save_dir, name)

    def _advice(self, path: str) -> str:
        if not self.save_dir or path != self.get_checkpoint_file():
            return ""
        others = sorted(os.path.basename(f) for f in self.get_all_checkpoint_files() if f != path)
        return (
            f". It is what {os.path.join(self.save_dir, 'last_checkpoint')} names: put the name of another "
            f"checkpoint there ({', '.join(others) or 'there is none'}), or train without --resume."
        )

    def _load_file(self, filename: str) -> Dict[str, Any]:
        try:
            if filename.endswith(".pkl"):
                loaded = _checkpoint_of_pickle(load_pickle(filename))
            elif filename.endswith(".pyth"):
                loaded = _checkpoint_of_pycls(load_torch_file(filename))
            else:
                loaded = super()._load_file(filename)
        except (OSError, UserError):
            raise
        except Exception as e:
            # The readers (pickle, zip, torch, numpy, safetensors) raise all kinds of errors.
            raise _UnreadableError(f"{type(e).__name__}: {first_line(e)}") from e
        if not isinstance(loaded, dict):
            raise _UnreadableError("it is not a dict of tensors")
        loaded["model"] = _state_dict_of(loaded["model"])
        return loaded

    def _torch_load(self, f: str) -> Any:
        return load_safetensors(f) if f.endswith(".safetensors") else load_torch_file(f)

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        names = list(checkpoint["model"])
        model = self.model.state_dict()
        left_out: List[str] = []
        if not checkpoint.get("matching_heuristics", False):
            converted = convert_weights(checkpoint["model"], model)
            if converted is not None:
                checkpoint["model"], left_out = converted.tensors, converted.left_out
        incompatible = super()._load_model(checkpoint)
        self.report = _report(list(model), incompatible, left_out)
        self.unset_keys = self.report.not_loaded
        total = len(self.report.model)
        if total and len(self.unset_keys) >= total:
            raise UserError(
                f"the weights fit none of the model's {total} tensors: they are of another network or format. "
                f"The file has {', '.join(names[:3])}...; the model wants {', '.join(self.unset_keys[:3])}..."
            )
        return incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        # A part that was loaded only in part is probably a mistake; a head that is missing altogether is usual.
        partly = self.report.partly_loaded()
        level = logging.WARNING if partly else logging.INFO
        remark = f" ({', '.join(partly)}: only in part)" if partly else ""
        logger.log(level, f"Loaded weights{remark}:\n{self.report}")


class _UnreadableError(Exception):
    """A file whose content is not a checkpoint."""


def _report(model: List[str], incompatible: Any, left_out: List[str]) -> LoadReport:
    missing = set(incompatible.missing_keys)
    other_shape = {key: (file, model) for key, file, model in incompatible.incorrect_shapes}
    for key in model:
        # Detectron2's FrozenBatchNorm2d accepts files without statistics, as old ones with an affine layer are, and
        # does not report them. If weight and bias are missing too, they are unset.
        layer, _, tensor = key.rpartition(".")
        if tensor in ("running_mean", "running_var") and f"{layer}.weight" in missing:
            missing.add(key)
    # A norm layer's count of batches changes no output, and many files lack it.
    return LoadReport(
        model=without_counts(model),
        unset=[key for key in without_counts(model) if key in missing and key not in other_shape],
        other_shape=other_shape,
        unused=without_counts([*incompatible.unexpected_keys, *left_out]),
    )


def _state_dict_of(loaded: Any) -> Dict[str, Any]:
    """Return the tensors by name, which may be nested in an entry of their own."""
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in ("state_dict", "model_state_dict") if key in loaded), loaded)
    if not isinstance(loaded, dict):
        raise _UnreadableError("it is not a dict of tensors")
    for key, value in loaded.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise _UnreadableError(f"its entry {key!r} is a {type(value).__name__}, not a tensor")
    prefix = "module."  # of (Distributed)DataParallel
    if loaded and all(key.startswith(prefix) for key in loaded):
        loaded = {key[len(prefix) :]: value for key, value in loaded.items()}
    return loaded


def _checkpoint_of_pickle(content: Any) -> Dict[str, Any]:
    """Return a ``.pkl`` in the form of Detectron2's checkpoints; other files hold blobs by Caffe2's names."""
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _checkpoint_of_pycls(content: Any) -> Dict[str, Any]:
    weights = {name: content["model_state"][name] for name in without_counts(content["model_state"])}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
