"""From the config's data keys to registered and checked data sets."""

import logging
import os
from typing import Dict, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils import comm

from mgd_det.checkpoint.safe_loading import load_pickle
from mgd_det.config import class_head
from mgd_det.data import check_dataset, register_coco_folder, without_broken_entries
from mgd_det.data.class_names import Classes, check_same_classes, check_scorable_classes, class_names
from mgd_det.data.coco.clean import WithoutBroken, original_name, register_without_broken
from mgd_det.data.coco.keypoints import (
    Keypoints,
    check_number_of_keypoints,
    check_same_keypoints,
    keypoints_of,
    register_keypoints,
    require_names,
)
from mgd_det.data.coco.register import classes_of_json, classes_without_loading
from mgd_det.data.mapper import skipped_list
from mgd_det.distributed.ranks import on_main_process
from mgd_det.errors import UserError
from mgd_det.files.downloads import local_copy
from mgd_det.progress import ProgressLog

logger = logging.getLogger(__name__)

OTHER_CLASSES_LEARNED = (
    "Use sets with the same list, or set DATASETS.TRAIN (of a teacher: in MODEL.MGD.TEACHER.OPTS) to the sets that the "
    'weights were trained on ("()": unknown).'
)
_SPLITS = {"TRAIN": "train", "TEST": "val"}  # key of DATASETS: split of DATASETS.COCO_FOLDER


def use_coco_folders(cfg: CfgNode) -> None:
    """Register the sets of DATASETS.COCO_FOLDER, and set DATASETS.TRAIN and TEST and the head's NUM_CLASSES to them.

    Their names are "coco_folder_train" and "coco_folder_val". Sets that another run wrote without broken entries are
    replaced by those that it wrote them from.

    Raises:
        UserError: a key is missing, a file is missing or broken, or the two sets have different classes.
    """
    folder, broken_input = cfg.DATASETS.COCO_FOLDER, cfg.DATASETS.BROKEN_INPUT
    if broken_input not in ("refuse", "skip"):
        raise UserError(f'DATASETS.BROKEN_INPUT is {broken_input!r}: set it to "refuse" or "skip"')
    _use_original_names(cfg)
    classes = {}
    for key, split in _SPLITS.items():
        json_key, images_key = f"{split.upper()}_JSON", f"{split.upper()}_IMAGES"
        if bool(folder[json_key]) != bool(folder[images_key]):
            raise UserError(
                f"--{split}-json and --{split}-images go together (DATASETS.COCO_FOLDER.{json_key} and {images_key}): "
                "give both or neither"
            )
        if not folder[json_key]:
            continue
        name = f"coco_folder_{split}"
        classes[split] = register_coco_folder(name, folder[json_key], folder[images_key], broken_input=broken_input)
        cfg.DATASETS[key] = (name,)
        class_head(cfg).NUM_CLASSES = len(classes[split])
    # Both in one group, as even a class that is missing at the end is more likely a slip than meant.
    check_same_classes({getattr(folder, f"{split.upper()}_JSON"): classes[split] for split in classes}, {})


def _use_original_names(cfg: CfgNode) -> None:
    for key in _SPLITS:  # the config.yaml of a run that skipped broken input names the sets that it wrote
        cfg.DATASETS[key] = tuple(name if name in DatasetCatalog else original_name(name) for name in cfg.DATASETS[key])


def check_proposal_files(cfg: CfgNode) -> None:
    """Check the proposal files of a config with MODEL.LOAD_PROPOSALS, which Detectron2 reads by an unsafe unpickler.

    Raises:
        UserError: a file cannot be read, or not safely.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        for path in cfg.DATASETS[key]:
            try:
                load_pickle(local_copy(path))
            except Exception as e:  # of the download, the disk and the unpickler
                raise UserError(f"DATASETS.{key} {path}: {e}") from e


def learned_classes(cfg: CfgNode, owner: str = "") -> Dict[str, Optional[List[str]]]:
    """Return the classes that weights of this config have learned, as far as the config tells, without loading a set.

    Args:
        cfg: a detector's config.
        owner: whose config it is, for messages (" of the teacher's config").

    Returns:
        The classes of the json or the sets that it trains on, by what messages call the set. A set with another number
        of classes than the detector is left out, because the weights cannot be from it.
    """
    json_file = cfg.DATASETS.COCO_FOLDER.TRAIN_JSON
    if json_file:
        classes = {f"DATASETS.COCO_FOLDER.TRAIN_JSON{owner} ({json_file})": classes_of_json(json_file)}
    else:
        names = [original_name(name) for name in cfg.DATASETS.TRAIN]
        classes = {f"DATASETS.TRAIN{owner} ({name})": classes_without_loading(name) for name in names}
    number = class_head(cfg).NUM_CLASSES
    return {name: names for name, names in classes.items() if names is not None and len(names) == number}


def check_datasets(cfg: CfgNode, train: bool, resume: bool = False, learned: Optional[Classes] = None) -> None:
    """Check the data sets of a config against their files and the detector.

    With DATASETS.BROKEN_INPUT "skip", sets with broken entries are written without them to OUTPUT_DIR/datasets, and
    replace the original ones in ``cfg``. All images of DATASETS.TEST are read for that, since the evaluator must know
    its images in advance. Those of TRAIN are not: a broken one is skipped when training reaches it. With "refuse", no
    image is read here, and training or evaluation stops at the first broken one.

    Args:
        cfg: changed in place.
        train: whether DATASETS.TRAIN is checked too.
        resume: whether to continue the list of images that training skipped.
        learned: what weights have learned that are evaluated, or whose heads are distilled (:func:`learned_classes`).

    Raises:
        UserError: a set cannot be used, or two have different classes, with what to do.
    """
    _use_original_names(cfg)
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, or give --train-json and --train-images")
    if train and not resume and comm.is_main_process() and os.path.exists(skipped_list(cfg)):
        os.remove(skipped_list(cfg))
    trained: Dict[str, Optional[List[str]]] = {}
    tested: Dict[str, Optional[List[str]]] = {}
    keypoints: Dict[str, Keypoints] = {}
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)):
        is_trained, is_tested = train and name in cfg.DATASETS.TRAIN, name in cfg.DATASETS.TEST
        try:
            classes, keypoints[name] = _check_dataset(cfg, name, is_trained, is_tested)
            if is_trained:
                trained[f"DATASETS.TRAIN {name}"] = classes
            if is_tested:
                tested[f"DATASETS.TEST {name}"] = classes
        except UserError as e:
            folder = cfg.DATASETS.COCO_FOLDER
            if folder.TRAIN_JSON and not folder.VAL_JSON and name in cfg.DATASETS.TEST:
                raise UserError(
                    f"{e}\nThe config evaluates on this set: give --val-json and --val-images too, or "
                    'DATASETS.TEST "()" to train without evaluation.'
                ) from e
            raise
    check_same_classes(trained, tested)
    check_same_keypoints(keypoints)
    if learned and train:
        check_same_classes(trained, learned, OTHER_CLASSES_LEARNED)
    elif learned:
        check_same_classes(learned, tested, OTHER_CLASSES_LEARNED)


def _check_dataset(cfg: CfgNode, name: str, trained: bool, evaluated: bool) -> Tuple[Optional[List[str]], Keypoints]:
    """Check one data set, and return its class names and keypoints."""
    keys: Tuple[str, ...] = ()
    if evaluated:
        keys += ("area", "iscrowd")
    if cfg.MODEL.MASK_ON:
        keys += ("segmentation",)
        if trained and cfg.INPUT.MASK_FORMAT == "polygon":
            keys += ("polygons",)
    if cfg.MODEL.KEYPOINT_ON:
        keys += ("keypoints",)
    if cfg.DATASETS.BROKEN_INPUT != "skip":
        check_dataset(name, keys)
        classes = class_names(name)
        _check_classes(cfg, name, classes, evaluated)
        return classes, use_keypoints(cfg, name, trained)

    def clean() -> Tuple[WithoutBroken, Optional[List[str]], Keypoints]:
        folder = os.path.join(cfg.OUTPUT_DIR, "datasets")
        progress = ProgressLog(logger, f"Reading the images of {name}")
        cleaned = without_broken_entries(name, folder, keys, decode=evaluated, progress=progress)
        return cleaned, class_names(name), _keypoints(cfg, name)

    cleaned, classes, keypoints = on_main_process(clean)
    _check_classes(cfg, name, classes, evaluated)
    _register_keypoints(cfg, name, keypoints, trained)
    if cleaned.name:
        register_without_broken(name, cleaned)
        logger.warning(cleaned.summary)
        _replace(cfg, name, cleaned.name)
    return classes, keypoints


def use_keypoints(cfg: CfgNode, name: str, trained: bool) -> Keypoints:
    """Check a data set's keypoints, if the detector has a keypoint head; put their names where Detectron2 reads them.

    Args:
        cfg: the config.
        name: of the data set.
        trained: whether it is used to train, where names are needed.

    Raises:
        UserError: they do not fit the detector, or names are missing.
    """
    keypoints = _keypoints(cfg, name)
    _register_keypoints(cfg, name, keypoints, trained)
    return keypoints


def _keypoints(cfg: CfgNode, name: str) -> Keypoints:
    if not cfg.MODEL.KEYPOINT_ON:
        return Keypoints()
    return keypoints_of(name, cfg.DATASETS.KEYPOINT_NAMES, cfg.DATASETS.KEYPOINT_FLIP_PAIRS)


def _register_keypoints(cfg: CfgNode, name: str, keypoints: Keypoints, trained: bool) -> None:
    if cfg.MODEL.KEYPOINT_ON:
        number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
        check_number_of_keypoints(name, keypoints, "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", number)
        if trained:
            require_names(name, keypoints)
        register_keypoints(name, keypoints)


def _check_classes(cfg: CfgNode, name: str, classes: Optional[List[str]], evaluated: bool) -> None:
    if evaluated:
        check_scorable_classes(name)
    expected = class_head(cfg).NUM_CLASSES
    # For training, the config may have more classes than the data; the evaluator knows the data's classes only.
    if classes is not None and (len(classes) > expected or (evaluated and len(classes) < expected)):
        raise UserError(
            f"{name} has {len(classes)} classes, but the {cfg.MODEL.META_ARCHITECTURE} of the config has {expected}: "
            f"set its NUM_CLASSES (MODEL.RETINANET, FCOS or ROI_HEADS) to {len(classes)}, or use weights and data of "
            "the same classes"
        )


def _replace(cfg: CfgNode, old: str, new: str) -> None:
    for key in _SPLITS:
        cfg.DATASETS[key] = tuple(new if name == old else name for name in cfg.DATASETS[key])
    factors = cfg.DATASETS.get("TRAIN_REPEAT_FACTOR")  # a key of newer versions of Detectron2
    if factors:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(new if name == old else name, factor) for name, factor in factors]
