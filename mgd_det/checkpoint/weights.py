"""Loading weights with one clear word on what is wrong with a file."""

import os
from typing import Any, Dict, List, Optional

from detectron2.checkpoint import DetectionCheckpointer

from mgd_det.checkpoint.torchvision_weights import (
    SCHEME,
    convert_torchvision_weights,
    is_torchvision_weights,
    torchvision_weights_url,
)
from mgd_det.errors import UserError


class WeightsCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also takes torchvision's weights and reports what it could not use.

    A path may be all that Detectron2 takes, a torchvision classification checkpoint, or
    "torchvision://<model>" (downloaded to Detectron2's cache).

    Attributes:
        unset_keys: after a load, the model's tensors that the file did not set, for want of them or
            because they have another shape there.
    """

    unset_keys: List[str] = []

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """Raises UserError where the file is not there, cannot be read, or fits no tensor of the model."""
        if path.startswith(SCHEME):
            path = torchvision_weights_url(path)
        local = path.partition("?")[0]
        if local and "://" not in local and not os.path.isfile(local):
            raise UserError(f"weights {path}: there is no such file{self._advice(path)}")
        try:
            return super().load(path, checkpointables=checkpointables)
        except OSError as e:  # of a download
            raise UserError(f"weights {path}: cannot be had: {e}{self._advice(path)}") from e
        except _UnreadableError as e:
            raise UserError(f"weights {path}: cannot be read as a checkpoint: {e}{self._advice(path)}") from e
        finally:
            self._parsed_url_during_load = None

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
            loaded = super()._load_file(filename)
        except OSError:
            raise
        except Exception as e:
            # Readers of foreign bytes (pickle, zip, torch, numpy) raise all kinds of errors.
            raise _UnreadableError(f"{type(e).__name__}: {(str(e).splitlines() or ['-'])[0]}") from e
        if not isinstance(loaded, dict) or not isinstance(loaded["model"], dict):
            raise _UnreadableError("it holds no tensors by name")
        if is_torchvision_weights(loaded["model"]):
            under_fpn = any(key.startswith("backbone.bottom_up.") for key in self.model.state_dict())
            prefix = "backbone.bottom_up." if under_fpn else "backbone."
            loaded["model"] = convert_torchvision_weights(loaded["model"], prefix)
        return loaded

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        total = sum(not key.endswith("num_batches_tracked") for key in self.model.state_dict())
        names = list(checkpoint["model"])
        incompatible = super()._load_model(checkpoint)
        unset = [*incompatible.missing_keys, *(key for key, *_ in incompatible.incorrect_shapes)]
        # A norm layer's count of batches changes no output, and weights from elsewhere often lack it.
        self.unset_keys = [key for key in dict.fromkeys(unset) if not key.endswith("num_batches_tracked")]
        if total and len(self.unset_keys) >= total:
            raise UserError(
                f"the weights fit none of the model's {total} tensors: they are of another network or format. "
                f"The file has {', '.join(names[:3])}...; the model wants {', '.join(self.unset_keys[:3])}..."
            )
        return incompatible


class _UnreadableError(Exception):
    """A file whose content is no checkpoint."""
