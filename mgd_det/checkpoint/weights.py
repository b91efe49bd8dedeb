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

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:  # type: ignore[override]
        """Raises UserError where the file is not there, cannot be read, or fits no tensor of the model."""
        if path.startswith(SCHEME):
            path = torchvision_weights_url(path)
        try:
            return super().load(path, checkpointables=checkpointables)
        except UserError:
            raise
        except Exception as e:
            # Whatever a reader of foreign bytes raises (pickle, zip, torch, numpy) means the same to the user.
            raise UserError(self._explain(path, e)) from e
        finally:
            self._parsed_url_during_load = None

    def _explain(self, path: str, error: Exception) -> str:
        local = path.partition("?")[0]
        if "://" not in local and not os.path.exists(local):
            problem = "there is no such file"
        else:
            reason = (str(error).splitlines() or ["-"])[0]
            problem = f"it cannot be read as a checkpoint ({type(error).__name__}: {reason})"
        message = f"weights {path}: {problem}."
        if self.save_dir and path == self.get_checkpoint_file():
            others = sorted(os.path.basename(f) for f in self.get_all_checkpoint_files() if f != path)
            message += (
                f" It is what {os.path.join(self.save_dir, 'last_checkpoint')} names: put the name of another "
                f"checkpoint there ({', '.join(others) or 'there is none'}), or train without --resume."
            )
        return message

    def _load_file(self, filename: str) -> Dict[str, Any]:
        loaded = super()._load_file(filename)
        if is_torchvision_weights(loaded["model"]):
            loaded["model"] = convert_torchvision_weights(loaded["model"])
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
