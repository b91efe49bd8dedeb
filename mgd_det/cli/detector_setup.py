"""Build a trained detector from the folder of its training, or from a yaml config."""

import json
import logging
import os
from typing import List, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from mgd_det.checkpoint import WeightsCheckpointer
from mgd_det.checkpoint.resumable import named_checkpoint
from mgd_det.cli.yaml_setup import read_config
from mgd_det.config import without_distillation
from mgd_det.errors import UserError, first_line

logger = logging.getLogger(__name__)

_CONFIGS = ("config.yaml", "student.yaml")


def read_detector_config(model: str, opts: Sequence[str], flag: str = "--model") -> CfgNode:
    """Read the config of a trained detector, without its distillation, for the CPU.

    Args:
        model: the OUTPUT_DIR of a training, or a yaml config (a path or a name of a model zoo).
        opts: overrides, KEY VALUE ...
        flag: what the user set to ``model``, for errors.

    Returns:
        The config. In the case of a folder, MODEL.WEIGHTS is its model_final.pth, or else its last checkpoint.

    Raises:
        UserError: the folder has no config, or there are no weights.
    """
    weights: List[str] = []
    path = model
    if os.path.isdir(model):
        path = next((os.path.join(model, name) for name in _CONFIGS if os.path.isfile(os.path.join(model, name))), "")
        if not path:
            raise UserError(f"{flag} {model} has neither {' nor '.join(_CONFIGS)}: give the OUTPUT_DIR of a training")
        weights = ["MODEL.WEIGHTS", _weights_of(model)]
    cfg = without_distillation(read_config(path, [*weights, "MODEL.DEVICE", "cpu", *opts]))
    if not cfg.MODEL.WEIGHTS:
        raise UserError(f"{flag} {model} names no weights: append MODEL.WEIGHTS model_final.pth")
    return cfg


def load_detector(cfg: CfgNode) -> nn.Module:
    """Build the detector of a config and load its weights, in eval mode.

    Raises:
        UserError: the weights are missing, or leave a tensor of the detector unset.
    """
    detector = build_model(cfg).eval()
    checkpointer = WeightsCheckpointer(detector)
    checkpointer.load(cfg.MODEL.WEIGHTS)
    if checkpointer.unset_keys:
        raise UserError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} lacks {len(checkpointer.unset_keys)} tensors of the detector, such as "
            f"{checkpointer.unset_keys[0]}: give the weights of a trained detector of this config"
        )
    return detector


def names_and_ids(cfg: CfgNode, number: int) -> Tuple[List[str], List[int]]:
    """Return names and category ids of a detector's classes, as far as its data sets tell.

    Args:
        number: of the detector's classes.

    Returns:
        The names ("class 1"... if unknown) and the ids (1, 2... if unknown).
    """
    folder = cfg.DATASETS.COCO_FOLDER
    known = [_classes_of_json(path) for path in (folder.TRAIN_JSON, folder.VAL_JSON)]
    known += [_classes_of_set(name) for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)]
    for classes in known:
        if len(classes) == number:
            return [name for name, _ in classes], [category_id for _, category_id in classes]
    logger.warning(
        f"DATASETS.TRAIN {cfg.DATASETS.TRAIN} does not tell the detector's {number} classes, so the exported model "
        f"calls them class 1 to class {number}, with the category ids 1 to {number}"
    )
    ids = list(range(1, number + 1))
    return [f"class {category_id}" for category_id in ids], ids


def _classes_of_set(name: str) -> List[Tuple[str, int]]:
    """Return name and id of each class of a registered set; nothing if they are not known without loading it."""
    if name not in DatasetCatalog:
        return []
    metadata = MetadataCatalog.get(name)
    ids = metadata.get("thing_dataset_id_to_contiguous_id")
    if ids and metadata.get("thing_classes"):
        return list(zip(metadata.thing_classes, sorted(ids, key=ids.get)))
    return _classes_of_json(metadata.get("original_json_file") or metadata.get("json_file") or "")


def _classes_of_json(json_file: str) -> List[Tuple[str, int]]:
    """Return name and id of each category by id, the order of class indices; nothing if the file does not exist."""
    if not os.path.isfile(json_file):
        return []
    try:
        with open(json_file, encoding="utf-8") as file:
            categories = json.load(file)["categories"]
        return sorted(((entry["name"], int(entry["id"])) for entry in categories), key=lambda entry: entry[1])
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{json_file} cannot be read as a json in COCO's format: {first_line(e)}") from e


def _weights_of(folder: str) -> str:
    final = os.path.join(folder, "model_final.pth")
    if os.path.isfile(final):
        return final
    name = named_checkpoint(folder)
    return os.path.join(folder, name) if name else ""
