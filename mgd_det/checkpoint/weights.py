"""Loading of weights, with a report of what was loaded and clear errors about a file."""

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
    - a ``.pth`` or ``.safetensors`` file of a torchvision or timm network that is the model's backbone, or of a
      torchvision detector with the model's ResNet and FPN. The tensors may be in an entry "model", "state_dict" or
      "model_state_dict";
    - "torchvision://<model>" or "timm://<model>" (:mod:`mgd_det.checkpoint.sources`).

    No code runs from a file (:mod:`mgd_det.checkpoint.safe_loading`), and a download with a hash in its name is
    verified (:mod:`mgd_det.files.downloads`).

    Weights of a network other than the model's backbone are an error. A checkpoint with Detectron2's own names may fill
    a part of the model: the log and the attributes say which.

    Attributes:
        report: which tensors the last load used. It prints as a table.
        unset_keys: the model's tensors that the file lacks or has in another shape.
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
                self._log_incompatible_keys(self._load_model({"model": fetch_named_weights(path)}))
                return {}
            local = local_copy(path.partition("?")[0])
            if local and not os.path.isfile(local):
                advice = self._advice(path) or ". Check the path; if a training writes the file, run that first."
                raise UserError(f"there is no such file{advice}")
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
            UserError: "last_checkpoint" holds a path.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file()
        name = named_checkpoint(self.save_dir)
        return "" if name is None else os.path.join(self.save_dir, name)

    def _advice(self, path: str) -> str:
        """Return what to do about a bad file that "last_checkpoint" names; "" for other files."""
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
            return {**loaded, "model": _state_dict_of(loaded["model"])}
        except (OSError, UserError, _UnreadableError):
            raise
        except Exception as e:  # pickle, zip, torch, numpy and safetensors raise many kinds
            raise _UnreadableError(f"{type(e).__name__}: {first_line(e)}") from e

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
        # A part that was loaded only in part is probably a mistake; a head that is missing as a whole is usual.
        partly = self.report.partly_loaded()
        level = logging.WARNING if partly else logging.INFO
        remark = f" ({', '.join(partly)}: only in part)" if partly else ""
        logger.log(level, f"Loaded weights{remark}:\n{self.report}")


class _UnreadableError(Exception):
    """The reason why the content of a file is not a checkpoint."""


def _report(model: List[str], incompatible: Any, left_out: List[str]) -> LoadReport:
    missing = set(incompatible.missing_keys)
    other_shape = {key: (file, model) for key, file, model in incompatible.incorrect_shapes}
    # Detectron2's FrozenBatchNorm2d does not report missing statistics, because old files have only weight and bias.
    # If these are missing too, the statistics are unset.
    statistics = [key for key in model if key.endswith((".running_mean", ".running_var"))]
    missing.update(key for key in statistics if f"{key.rpartition('.')[0]}.weight" in missing)
    return LoadReport(
        model=without_counts(model),
        unset=[key for key in without_counts(model) if key in missing and key not in other_shape],
        other_shape=other_shape,
        unused=without_counts([*incompatible.unexpected_keys, *left_out]),
    )


def _state_dict_of(loaded: Any) -> Dict[str, Any]:
    """Return the tensors by name, which may be in an entry of their own."""
    if isinstance(loaded, dict):
        loaded = next((loaded[key] for key in ("state_dict", "model_state_dict") if key in loaded), loaded)
    if not isinstance(loaded, dict):
        raise _UnreadableError("it is not a dict of tensors")
    for key, value in loaded.items():
        if not isinstance(value, (torch.Tensor, np.ndarray)):
            raise _UnreadableError(f"its entry {key!r} is of type {type(value).__name__}, not a tensor")
    prefix = "module."  # of (Distributed)DataParallel
    if all(key.startswith(prefix) for key in loaded):
        loaded = {key[len(prefix) :]: value for key, value in loaded.items()}
    return loaded


def _checkpoint_of_pickle(content: Any) -> Dict[str, Any]:
    """Return the content of a ``.pkl`` as a checkpoint, as Detectron2 does: others than its own have Caffe2's names."""
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    weights = {name: blob for name, blob in blobs.items() if not name.endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}


def _checkpoint_of_pycls(content: Any) -> Dict[str, Any]:
    weights = {name: content["model_state"][name] for name in without_counts(content["model_state"])}
    return {"model": weights, "__author__": "pycls", "matching_heuristics": True}
