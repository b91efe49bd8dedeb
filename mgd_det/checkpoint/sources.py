"""Weights by name: "torchvision://<model>" and "timm://<model>", in the caches of these libraries."""

import logging
import os
from typing import Dict
from urllib.parse import urlparse

import torch
import torchvision
from iopath.common.file_io import file_lock
from torch import Tensor

from mgd_det.checkpoint.safe_loading import load_torch_file
from mgd_det.errors import UserError, did_you_mean, first_line
from mgd_det.files.downloads import hash_prefix, verify_hash

TORCHVISION = "torchvision://"
TIMM = "timm://"

# torchvision's names of the networks that can be converted.
TORCHVISION_NETWORKS = (
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
)
TORCHVISION_DETECTORS = (
    *("retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"),
    *("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"),
    *("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2", "keypointrcnn_resnet50_fpn"),
)

logger = logging.getLogger(__name__)


def is_named(path: str) -> bool:
    """Return whether :func:`fetch_named_weights` takes this path."""
    return path.startswith((TORCHVISION, TIMM))


def fetch_named_weights(path: str) -> Dict[str, Tensor]:
    """Return pretrained weights of torchvision or timm. Download them if they are not in the library's cache.

    Args:
        path: "torchvision://<model>", one of :data:`TORCHVISION_NETWORKS` (their default ImageNet weights) or
            :data:`TORCHVISION_DETECTORS` (COCO); or "timm://<model>" with or without the tag of its weights
            ("timm://resnet18", "timm://resnet18.a1_in1k").

    Returns:
        Tensors on the CPU by the library's own names.

    Raises:
        UserError: there is no such model, the library is not installed, the download failed, or it does not match the
            hash in its name.
    """
    return _fetch_from_torchvision(path) if path.startswith(TORCHVISION) else _fetch_from_timm(path)


def _fetch_from_torchvision(path: str) -> Dict[str, Tensor]:
    name = path[len(TORCHVISION) :]
    known = [*TORCHVISION_NETWORKS, *TORCHVISION_DETECTORS]
    if name not in known:
        raise UserError(
            f"torchvision has no weights named {name!r} that can be imported."
            f"{did_you_mean(name.lower(), known)} Choose from {', '.join(known)}."
        )
    weights = torchvision.models.get_model_weights(name).DEFAULT
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(weights.url).path))
    logger.info(f"{path} is {weights}, in torch's cache {cached}")
    try:
        with file_lock(cached):  # one process of a machine downloads it
            if not os.path.isfile(cached):
                torch.hub.download_url_to_file(weights.url, cached, hash_prefix(cached))
        verify_hash(cached)  # also of a file that was in the cache
        # weights.get_state_dict() reads the file in a way that can run code.
        return load_torch_file(cached)
    except UserError:
        raise
    except Exception as e:  # of the network, the disk, the hash or the reader of the file
        raise _download_error(e, weights.url) from e


def _fetch_from_timm(path: str) -> Dict[str, Tensor]:
    try:
        import timm
    except ImportError as e:
        raise UserError("timm is not installed: pip install timm") from e
    name = path[len(TIMM) :]
    known = timm.list_models(pretrained=True)
    if name not in known and name not in {full.partition(".")[0] for full in known}:
        raise UserError(
            f"timm {timm.__version__} has no pretrained weights named {name!r}."
            f"{did_you_mean(name.lower(), known)} timm.list_models(pretrained=True) lists them."
        )
    try:
        timm.models.set_pretrained_check_hash(True)  # of files that are not the hub's
        # The network draws random weights first. The caller's random numbers must not depend on that.
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(name, pretrained=True)
    except Exception as e:  # of the network, the hub, the disk or the reader of the file
        raise _download_error(e, f"https://huggingface.co/timm/{name}") from e
    trained_with = getattr(model, "pretrained_cfg", {})
    if "mean" in trained_with:
        mean, std = ([round(255 * value, 3) for value in trained_with[key]] for key in ("mean", "std"))
        # Not every model has ImageNet's. Wrong ones cost accuracy without any error.
        logger.info(f"{path} was trained on RGB images with MODEL.PIXEL_MEAN {mean} and MODEL.PIXEL_STD {std}")
    return model.state_dict()


def _download_error(error: Exception, url: str) -> UserError:
    return UserError(
        f"the download of {url} failed: {type(error).__name__}: {first_line(error)}. Check the network; on a machine "
        "without one, give the path of the file itself."
    )
