"""From the config's data keys to registered and checked data sets."""

import logging
import os
import time
from typing import List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.utils import comm

from mgd_det.checkpoint.safe_loading import load_pickle
from mgd_det.data import check_dataset, dataset_classes, register_coco_folder, without_broken_entries
from mgd_det.data.coco.clean import WithoutBroken, register_without_broken
from mgd_det.data.mapper import skipped_list
from mgd_det.distributed.ranks import on_main_process
from mgd_det.errors import UserError
from mgd_det.files.downloads import local_copy

logger = logging.getLogger(__name__)

_SPLITS = {"TRAIN": "train", "TEST": "val"}  # key of DATASETS: split of DATASETS.COCO_FOLDER


def use_coco_folders(cfg: CfgNode) -> None:
    """Registers the sets of DATASETS.COCO_FOLDER, and points DATASETS.TRAIN, TEST and NUM_CLASSES to them.

    They are named "coco_folder_train" and "coco_folder_val".

    Raises UserError where a key is missing, a file is missing or broken, or the two have other classes.
    """
    folder, broken_input = cfg.DATASETS.COCO_FOLDER, cfg.DATASETS.BROKEN_INPUT
    if broken_input not in ("refuse", "skip"):
        raise UserError(f'DATASETS.BROKEN_INPUT is {broken_input!r}: set it to "refuse" or "skip"')
    classes = {}
    for key, split in _SPLITS.items():
        json_key, images_key = f"{split.upper()}_JSON", f"{split.upper()}_IMAGES"
        if bool(folder[json_key]) != bool(folder[images_key]):
            raise UserError(
                f"--{split}-json and --{split}-images go together (DATASETS.COCO_FOLDER.{json_key} and {images_key}): "
                "give both or none"
            )
        if not folder[json_key]:
            continue
        name = f"coco_folder_{split}"
        classes[split] = register_coco_folder(name, folder[json_key], folder[images_key], broken_input=broken_input)
        cfg.DATASETS[key] = (name,)
        for head in class_heads(cfg):
            head.NUM_CLASSES = len(classes[split])
    if len(classes) == 2 and classes["train"] != classes["val"]:
        raise UserError(
            f"{folder.VAL_JSON} has other categories than {folder.TRAIN_JSON}: {classes['val']} instead of "
            f"{classes['train']} (by id). Export both from the same list of categories."
        )


def check_proposal_files(cfg: CfgNode) -> None:
    """Raises UserError where the proposals of a config with MODEL.LOAD_PROPOSALS cannot be read, or not safely.

    Detectron2 reads them by an unpickler that runs whatever a file says.
    """
    if not cfg.MODEL.LOAD_PROPOSALS:
        return
    for key in ("PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST"):
        for path in cfg.DATASETS[key]:
            try:
                load_pickle(local_copy(path))
            except Exception as e:  # of the download, the disk and the unpickler
                raise UserError(f"DATASETS.{key} {path}: {e}") from e


def class_heads(cfg: CfgNode) -> List[CfgNode]:
    """The config nodes with a NUM_CLASSES that the detector of ``cfg`` reads."""
    dense = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
    node = dense.get(cfg.MODEL.META_ARCHITECTURE, "ROI_HEADS")
    return [cfg.MODEL[node]] if node in cfg.MODEL else []


def check_datasets(cfg: CfgNode, train: bool, resume: bool = False) -> None:
    """Checks DATASETS.TEST, and TRAIN where ``train`` is True, against their files and the detector of ``cfg``.

    With DATASETS.BROKEN_INPUT "skip", sets with broken entries are written anew without them, under
    OUTPUT_DIR/datasets, and take the place of the old ones in ``cfg``. The images of DATASETS.TEST are read for it,
    all of them: what is evaluated has to be known before. Those of TRAIN are not: a broken one is skipped when
    training meets it. With "refuse", no image is read here, and training or evaluation ends at the first broken one.

    Args:
        resume: whether the list of images that training skipped is continued.

    Raises UserError for what the user has to mend.
    """
    if train and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a data set, or give --train-json and --train-images")
    if train and not resume and comm.is_main_process() and os.path.exists(skipped_list(cfg)):
        os.remove(skipped_list(cfg))
    for name in dict.fromkeys((*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST)):
        try:
            _check_dataset(cfg, name, trained=train and name in cfg.DATASETS.TRAIN, evaluated=name in cfg.DATASETS.TEST)
        except UserError as e:
            folder = cfg.DATASETS.COCO_FOLDER
            if folder.TRAIN_JSON and not folder.VAL_JSON and name in cfg.DATASETS.TEST:
                raise UserError(
                    f"{e}\nIt is the config's set to evaluate on: give --val-json and --val-images as well, or "
                    'DATASETS.TEST "()" to train without evaluation.'
                ) from e
            raise


def _check_dataset(cfg: CfgNode, name: str, trained: bool, evaluated: bool) -> None:
    keys: Tuple[str, ...] = ()
    if evaluated:
        keys += ("area", "iscrowd")
    if cfg.MODEL.MASK_ON:
        keys += ("segmentation",)
        if trained and cfg.INPUT.MASK_FORMAT == "polygon":
            keys += ("polygons",)
    if cfg.DATASETS.BROKEN_INPUT != "skip":
        check_dataset(name, keys)
        _check_classes(cfg, name, dataset_classes(name), evaluated)
        return

    def clean() -> Tuple[WithoutBroken, Optional[List[str]]]:
        folder = os.path.join(cfg.OUTPUT_DIR, "datasets")
        progress = _ProgressLog(f"Reading the images of {name}")
        return without_broken_entries(name, folder, keys, decode=evaluated, progress=progress), dataset_classes(name)

    cleaned, classes = on_main_process(clean)
    _check_classes(cfg, name, classes, evaluated)
    if cleaned.name:
        register_without_broken(name, cleaned)
        logger.warning(cleaned.summary)
        _replace(cfg, name, cleaned.name)


def _check_classes(cfg: CfgNode, name: str, classes: Optional[List[str]], evaluated: bool) -> None:
    for head in class_heads(cfg):
        # To train, the config may have classes to spare; the evaluator knows the data's classes only.
        if classes is not None and (len(classes) > head.NUM_CLASSES or (evaluated and len(classes) < head.NUM_CLASSES)):
            raise UserError(
                f"{name} has {len(classes)} classes, but the {cfg.MODEL.META_ARCHITECTURE} of the config has "
                f"{head.NUM_CLASSES}: set its NUM_CLASSES (MODEL.RETINANET, FCOS or ROI_HEADS) to {len(classes)}, "
                "or use weights and data of the same classes"
            )


def _replace(cfg: CfgNode, old: str, new: str) -> None:
    for key in _SPLITS:
        cfg.DATASETS[key] = tuple(new if name == old else name for name in cfg.DATASETS[key])
    factors = cfg.DATASETS.get("TRAIN_REPEAT_FACTOR")  # a newer key of Detectron2's
    if factors:
        cfg.DATASETS.TRAIN_REPEAT_FACTOR = [(new if name == old else name, factor) for name, factor in factors]


class _ProgressLog:
    """Logs every ten seconds how much is done, and about how long the rest takes."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._start = self._logged = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if now - self._logged > 10:
            self._logged = now
            left = (now - self._start) / done * (total - done)
            logger.info(f"{self._what}: {done}/{total}, about {left:.0f} s left")
