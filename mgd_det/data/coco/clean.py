"""Data sets in COCO's format without their broken entries."""

import json
import os
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Set

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from tabulate import tabulate

from mgd_det.data.coco.image_check import broken_images
from mgd_det.data.coco.problems import DUPLICATE_ID, MASK_KINDS, Problem
from mgd_det.data.coco.register import check_registered_classes, checker_command, coco_files, find_problems, refuse
from mgd_det.data.coco.whole_numbers import with_whole_numbers
from mgd_det.errors import UserError
from mgd_det.files.atomic_files import write_text_atomically

SUFFIX = "_without_broken"


def original_name(name: str) -> str:
    """Return the name of the data set that one was written from without its broken entries, or else ``name``."""
    return name[: -len(SUFFIX)] if name.endswith(SUFFIX) else name


class WithoutBroken(NamedTuple):
    """A data set that was written without the broken entries of another.

    Attributes:
        name: the name to register it with; "" if the other can be used as it is.
        json_file: its json, or "".
        summary: a table of what was left out, or "".
    """

    name: str = ""
    json_file: str = ""
    summary: str = ""


def without_broken_entries(
    name: str,
    folder: str,
    annotation_keys: Sequence[str] = (),
    *,
    decode: bool = False,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> WithoutBroken:
    """Write the json of a registered data set without its broken entries, if it has any or numbers such as 64.0.

    Three things are left out: broken images with their annotations, broken annotations, and images that lose all their
    annotations by this, which training would treat as background. If only the mask of an annotation is broken and masks
    are not needed, the annotation is kept without its mask.

    Args:
        name: an entry of DATASETS.TRAIN or DATASETS.TEST.
        folder: where ``<name>_without_broken.json`` is written, atomically.
        annotation_keys: as for :func:`mgd_det.data.check_dataset`.
        decode: whether to read every image too. Needed for evaluation, where no image may be skipped later: the
            evaluator would count its objects as missed.
        progress: called with the number of images read so far, and the number of all.

    Returns:
        What was written.

    Raises:
        UserError: the name is unknown, a file is missing, nothing usable is left, or ``folder`` cannot be written.
    """
    files = coco_files(name)
    if files is None:
        return WithoutBroken()
    report, problems = find_problems(name, files, annotation_keys)
    refuse(name, files, [problem for problem in problems if problem.is_fatal], annotation_keys)
    check_registered_classes(name, report)
    if decode:
        problems += broken_images(files.image_root, report.images, problems, progress=progress)
    if not report.converts and not any(problem.breaks for problem in problems):
        return WithoutBroken()

    with open(files.json_file, encoding="utf-8") as file:
        content = with_whole_numbers(json.load(file))
    skipped = _leave_out(content, problems, masks="segmentation" in annotation_keys)
    if not content["images"]:
        raise UserError(
            f"Data set {name!r}: nothing is left without the broken entries of {files.json_file!r}. "
            f"List them with: {checker_command(files, annotation_keys)}"
        )
    json_file = os.path.join(folder, f"{name.replace(os.sep, '_')}{SUFFIX}.json")
    try:
        os.makedirs(folder, exist_ok=True)
        write_text_atomically(json_file, json.dumps(content))
    except (OSError, RecursionError) as error:
        raise UserError(f"{json_file}, the data set without broken entries, cannot be written: {error}") from error
    summary = f"DATASETS.BROKEN_INPUT is skip: left out of {name}\n"
    summary += tabulate(skipped.items(), headers=["broken", "skipped"]) if skipped else "nothing"
    summary += "\nNumbers such as 64.0 are written as whole numbers." * report.converts
    left = f"{len(content['images'])} images, {len(content.get('annotations', []))} annotations"
    summary += f"\n{left} are left, in {json_file}.\nTo list all: {checker_command(files, annotation_keys)}"
    return WithoutBroken(name + SUFFIX, json_file, summary)


def register_without_broken(name: str, cleaned: WithoutBroken) -> None:
    """Register what :func:`without_broken_entries` wrote for ``name``, with the same metadata and images."""
    metadata = MetadataCatalog.get(name).as_dict()
    image_root = metadata["image_root"]
    for key in ("name", "json_file", "original_json_file", "image_root", "evaluator_type"):
        metadata.pop(key, None)
    if cleaned.name in DatasetCatalog:
        DatasetCatalog.remove(cleaned.name)
        MetadataCatalog.remove(cleaned.name)
    register_coco_instances(cleaned.name, metadata, cleaned.json_file, image_root)


def _leave_out(content: Dict[str, Any], problems: List[Problem], masks: bool) -> Dict[str, int]:
    """Remove broken entries from ``content``, and return how many of each kind."""
    kinds: Dict[str, Dict[int, Set[str]]] = {"images": {}, "annotations": {}}
    counts: Counter = Counter()
    for problem in problems:
        # Repeated ids are accepted only in files with COCO's name for them, which the new file does not have.
        if problem.part in kinds and (problem.breaks or problem.kind == DUPLICATE_ID):
            kinds[problem.part].setdefault(problem.place, set()).add(problem.kind)
            counts[problem.kind] += 1

    images = [image for index, image in enumerate(content["images"]) if index not in kinds["images"]]
    there = {image["id"] for image in images}
    kept: List[Dict[str, Any]] = []
    losing: Set[Any] = set()
    for index, annotation in enumerate(content.get("annotations", [])):
        broken = kinds["annotations"].get(index, set())
        loses_mask = bool(broken) and not masks and broken <= set(MASK_KINDS)
        if broken and not loses_mask:
            losing.update(_image_of(annotation))
        elif annotation["image_id"] not in there:
            counts["(annotations of these images)"] += 1
        elif loses_mask:
            kept.append({key: value for key, value in annotation.items() if key != "segmentation"})
            counts["(kept, without its mask)"] += 1
        else:
            kept.append(annotation)
    emptied = losing - {annotation["image_id"] for annotation in kept}
    left = [image for image in images if image["id"] not in emptied]
    if len(left) < len(images):
        counts["(images that lost all annotations)"] = len(images) - len(left)
    content["images"] = left
    if "annotations" in content:
        content["annotations"] = kept
    return dict(counts)


def _image_of(annotation: Any) -> Set[Any]:
    number = annotation.get("image_id") if isinstance(annotation, dict) else None
    return {number} if isinstance(number, (int, float, str)) else set()
