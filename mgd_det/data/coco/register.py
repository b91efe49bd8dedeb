"""Register data sets in COCO's format, and check that one can be used before training starts on it."""

import functools
import logging
import os
import shlex
from collections import Counter
from typing import Any, Iterable, List, NamedTuple, Optional, Sequence, Tuple, Union

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from mgd_det.data.coco.check import CocoReport, check_coco_json
from mgd_det.data.coco.image_check import absent_images
from mgd_det.data.coco.problems import MISSING_IMAGE, UNKNOWN_IMAGE, Problem
from mgd_det.data.coco.whole_numbers import read_as_whole_numbers
from mgd_det.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

# Detectron2 also reads this variable once, when it registers its own data sets at import.
DATASETS_ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))

_NAMED_AT_MOST = 3  # problems or classes in one message


class CocoFiles(NamedTuple):
    """The two paths of a data set in COCO's format."""

    json_file: str
    image_root: str


def register_coco_folder(
    name: str,
    json_file: Union[str, os.PathLike],
    image_root: Union[str, os.PathLike],
    *,
    broken_input: str = "refuse",
) -> List[str]:
    """Check a data set in COCO's format and register it with Detectron2.

    A second call with the same paths changes nothing. If the json has numbers such as 64.0 where Detectron2 expects
    whole numbers, a temporary copy with whole numbers is registered (metadata "original_json_file" names the json).

    Args:
        name: the name for DATASETS.TRAIN and DATASETS.TEST.
        json_file: annotations in COCO's instances format; a local file.
        image_root: the folder to which the json's file names are relative.
        broken_input: "refuse" a set with broken entries, or "skip" them: the set is registered as it is, and
            :func:`mgd_det.data.without_broken_entries` can leave them out.

    Returns:
        The class names in the order of Detectron2's class indices, that is, by category id.

    Raises:
        UserError: a file is missing or broken, or ``name`` is taken by other paths.
    """
    files = CocoFiles(os.fspath(json_file), os.fspath(image_root))
    if name in DatasetCatalog:
        known = MetadataCatalog.get(name)
        paths = (_json_file(known), known.get("image_root"))
        if [_absolute(path) for path in paths] != [_absolute(path) for path in files]:
            raise UserError(
                f"The data set name {name!r} is taken: it is registered with json_file {paths[0]!r} and "
                f"image_root {paths[1]!r}. Choose another name."
            )
        files = CocoFiles(*paths)
    report, problems = find_problems(name, files)
    refuse(name, files, [p for p in problems if p.is_fatal or broken_input == "refuse"])
    if name not in DatasetCatalog:
        # Detectron2 reads the classes when it loads the data, which is after the model is built.
        register_coco_instances(name, {"thing_classes": list(report.classes)}, *files)
    read_as_whole_numbers(name, files.json_file, report.converts)
    return list(report.classes)


def check_dataset(name: str, annotation_keys: Sequence[str] = ()) -> None:
    """Check that a registered data set can be used: its json, and that each image exists and is not empty.

    Each process reads the json once, which takes about 20 s for COCO's train2017. For sets of other evaluators than
    COCO's (LVIS, panoptic), only the presence of the files is checked; sets without a json and an image folder, and
    those that are not on a local disk, are not checked. ``tools/check_dataset.py`` also reads the images.

    Args:
        name: an entry of DATASETS.TRAIN or DATASETS.TEST.
        annotation_keys: what every annotation must have for the intended use: "area" and "iscrowd" for COCO's
            evaluator, "segmentation" for masks, "polygons" if no mask may be an RLE, "keypoints" for keypoint heads.

    Raises:
        UserError: the name is unknown, a file is missing, or entries are broken.
    """
    files = coco_files(name)
    if files:
        report, problems = find_problems(name, files, annotation_keys)
        refuse(name, files, problems, annotation_keys)
        check_registered_classes(name, report)
        read_as_whole_numbers(name, files.json_file, report.converts)


def dataset_classes(name: str) -> Optional[List[str]]:
    """Return the class names of a registered data set if they are known without loading it; otherwise None.

    Raises:
        UserError: the name is unknown.
    """
    classes = _metadata(name).get("thing_classes")
    return None if classes is None else list(classes)


def classes_without_loading(name: str) -> Optional[List[str]]:
    """Return the class names of a data set that are registered, or else in its json.

    Args:
        name: of a data set, which need not be registered, and whose files need not exist.

    Returns:
        The names; None if they are not known.
    """
    if name not in DatasetCatalog:
        return None
    classes, metadata = dataset_classes(name), MetadataCatalog.get(name)
    if classes is None and metadata.get("evaluator_type") == "coco":
        classes = classes_of_json(_json_file(metadata))
    return classes


def classes_of_json(json_file: Union[str, os.PathLike]) -> Optional[List[str]]:
    """Return the class names of a json by category id; None if it is no local file, or not in COCO's format."""
    return list(read_report(json_file).classes) or None if os.path.isfile(json_file) else None


def coco_files(name: str) -> Optional[CocoFiles]:
    """Return the files of a registered data set with COCO's evaluator on a local disk; None for any other set.

    Raises:
        UserError: the name is unknown, or the json or the image folder is missing.
    """
    metadata = _metadata(name)
    json_file, image_root = _json_file(metadata), metadata.get("image_root")
    if not json_file or not image_root or "://" in str(json_file) + str(image_root):
        logger.debug(f"The files of {name} are not checked")
        return None
    files = CocoFiles(os.fspath(json_file), os.fspath(image_root))
    _check_presence(name, files)
    return files if metadata.get("evaluator_type") == "coco" else None


def find_problems(name: str, files: CocoFiles, annotation_keys: Sequence[str] = ()) -> Tuple[CocoReport, List[Problem]]:
    """Check the json, and that each image exists and is not empty.

    Args:
        name: of the data set, for errors.
        files: its paths.
        annotation_keys: as for :func:`check_dataset`.

    Returns:
        What the json holds, and all problems.

    Raises:
        UserError: the json or the image folder is missing.
    """
    _check_presence(name, files)
    report = read_report(files.json_file)
    return report, report.problems_for(annotation_keys) + absent_images(files.image_root, report.images)


def refuse(name: str, files: CocoFiles, problems: Iterable[Problem], annotation_keys: Sequence[str] = ()) -> None:
    """Refuse a set that has breaking problems.

    Raises:
        UserError: it counts these problems by kind and shows the first few.
    """
    breaking = [problem for problem in problems if problem.breaks]
    fatal = [problem for problem in breaking if problem.is_fatal]
    if fatal and not fatal[0].part:
        raise UserError(f"Data set {name!r}: " + " ".join(problem.message for problem in fatal))
    if not breaking:
        return
    kinds = Counter(problem.kind for problem in breaking)
    counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    entries = "broken entry" if len(breaking) == 1 else "broken entries"
    message = [f"Data set {name!r}: {len(breaking)} {entries} in {files.json_file!r} ({counts}):"]
    message += [f"  {problem}" for problem in breaking[:_NAMED_AT_MOST]]
    if len(breaking) > _NAMED_AT_MOST:
        message += ["  ..."]
    if UNKNOWN_IMAGE in kinds:
        message += ["If 'images' is meant to be a subset of the annotated images, use DATASETS.BROKEN_INPUT skip."]
        message += ["It gives exactly the subset: these images with all their annotations."]
    if MISSING_IMAGE in kinds:
        message += [_how_to_get(name, files.image_root)]
        message += ["If the folder is meant to be a subset, DATASETS.BROKEN_INPUT skip gives exactly the images in it."]
    ways = f"List them all with: {checker_command(files, annotation_keys)}"
    if not fatal:
        ways += "\nOr train without them: DATASETS.BROKEN_INPUT skip (of tools/train_net.py)"
    raise UserError("\n".join([*message, ways]))


def checker_command(files: CocoFiles, annotation_keys: Sequence[str] = ()) -> str:
    """Return the command line that lists all problems of a set."""
    command = ["python", "tools/check_dataset.py", "--json", files.json_file, "--images", files.image_root]
    for key, flag in (("area", "--eval"), ("segmentation", "--masks"), ("keypoints", "--keypoints")):
        command += [flag] * (key in annotation_keys)
    return shlex.join(command)


def check_registered_classes(name: str, report: CocoReport) -> None:
    """Check that a set is registered with the classes of its json; set them if none are registered.

    Raises:
        UserError: it is registered with other classes.
    """
    metadata, classes = _metadata(name), list(report.classes)
    registered = metadata.get("thing_classes")
    if registered is None:
        metadata.thing_classes = classes
    elif list(registered) != classes:
        raise UserError(
            f"The data set {name!r} is registered with the classes {_shortened(registered)}, but "
            f"{report.json_file!r} has {_shortened(classes)}. Register it with these classes, or export its json again."
        )


def read_report(json_file: Union[str, os.PathLike]) -> CocoReport:
    """Return what is in a local json; it is read again only if it has changed."""
    path, state = os.fspath(json_file), os.stat(json_file)
    return _read_json(path, state.st_mtime_ns, state.st_size)


# Training checks a set more than once, and COCO's json takes seconds to read; a report is small. Time and size are
# in the key, so that a file that has changed is read again.
@functools.lru_cache(maxsize=8)
def _read_json(json_file: str, mtime_ns: int, size: int) -> CocoReport:
    return check_coco_json(json_file)


def _metadata(name: str):
    if name not in DatasetCatalog:
        if name in ("coco_folder_train", "coco_folder_val"):
            split = name.rpartition("_")[2]
            raise UserError(f"The set {name!r} is that of the flags: give --{split}-json and --{split}-images.")
        raise UserError(
            f"There is no data set named {name!r}.{did_you_mean(name, DatasetCatalog.list())} Register your own with "
            "mgd_det.data.register_coco_folder(name, json_file, image_root)."
        )
    return MetadataCatalog.get(name)


def _json_file(metadata) -> Any:
    """Return the json that the user gave; "json_file" may be a copy of it."""
    return metadata.get("original_json_file") or metadata.get("json_file")


def _absolute(path: Union[str, os.PathLike, None]) -> Optional[str]:
    return None if path is None else os.path.abspath(path)


def _shortened(names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} ({', '.join(names[:_NAMED_AT_MOST])}{', ...' if len(names) > _NAMED_AT_MOST else ''})"


def _how_to_get(name: str, path: str) -> str:
    if name.startswith("fashion_scenes_"):
        size = name[len("fashion_scenes_") :].rsplit("_", 1)[0]
        todo = f"Make it: python tools/prepare_fashion_scenes.py {size}"
    else:
        todo = "Correct the path, or put it there."
    root = os.path.abspath(DATASETS_ROOT)
    if os.path.abspath(path).startswith(root + os.sep):
        todo += f" (The environment variable DETECTRON2_DATASETS sets the folder of data sets, now {root!r}.)"
    return todo


def _check_presence(name: str, files: CocoFiles) -> None:
    for path, what, exists in zip(files, ("file", "image folder"), (os.path.isfile, os.path.isdir)):
        if not exists(path):
            raise UserError(f"Data set {name!r}: no {what} {path!r}. {_how_to_get(name, path)}")
