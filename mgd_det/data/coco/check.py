"""Finds every problem of a json in COCO's instances format, in one pass, without its images."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Container, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

from mgd_det.data.coco.annotation_check import Size, box_problem, is_evaluable, keypoints_problem, mask_problem
from mgd_det.data.coco.problems import (
    DUPLICATE_CLASS,
    DUPLICATE_FILE,
    DUPLICATE_ID,
    ID_ZERO,
    INVALID_POLYGON,
    MISSING_KEY,
    UNKNOWN_CATEGORY,
    UNKNOWN_IMAGE,
    UNREADABLE_JSON,
    WRONG_SHAPE,
    WRONG_VALUE,
    Problem,
    short,
)

# What Detectron2's loader reads of each entry.
_REQUIRED_KEYS = {
    "categories": ("id", "name"),
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}
# What only some uses read.
OPTIONAL_KEYS = {
    "area": "COCO's evaluator reads a number from 0 to 1e10 there (DATASETS.TEST)",
    "iscrowd": "COCO's evaluator reads it (DATASETS.TEST)",
    "segmentation": "mask heads learn from it (MODEL.MASK_ON)",
}
_NUMBERS = (int, float)
_LARGEST_ID = 2**63 - 1  # of numpy, in which COCO's evaluator stores ids
_DEEPEST = 100  # levels of nested lists, which COCO's evaluator copies recursively
_FRAMES = 200  # of the stack that are left to Detectron2, which reads the file again
_LARGEST_AREA = 1e10  # COCO's evaluator silently leaves out larger ones

Id = Union[int, float, str]


class ImageFile(NamedTuple):
    """An image as the json has it; ``place`` is its index in "images"."""

    place: int
    id: Id
    file_name: str
    height: int
    width: int


@dataclass(frozen=True)
class CocoReport:
    """What is in a json, and what is wrong with it.

    Attributes:
        json_file: its path.
        classes: class names by category id.
        images: the entries of "images" that can be used.
        num_annotations: all entries of "annotations".
        problems: those that do not depend on what the set is used for.
        lacking: for each of OPTIONAL_KEYS, index and id of the annotations without it.
        rle_object: id of the first object (no crowd) whose mask is an RLE, or None.
        not_evaluable: index and id of the annotations whose mask COCO's evaluator cannot read, and training can.
    """

    json_file: str
    classes: Tuple[str, ...] = ()
    images: Tuple[ImageFile, ...] = ()
    num_annotations: int = 0
    problems: Tuple[Problem, ...] = ()
    lacking: Mapping[str, Sequence[Tuple[int, Id]]] = field(default_factory=dict)
    rle_object: Optional[Id] = None
    not_evaluable: Sequence[Tuple[int, Id]] = ()

    def problems_for(self, annotation_keys: Container[str]) -> List[Problem]:
        """Return all problems for a use that reads certain optional keys.

        For each other key, one note says how many annotations lack it.

        Args:
            annotation_keys: of OPTIONAL_KEYS, and "polygons" if no mask may be an RLE.
        """

        def broken(kind: str, entries: Sequence[Tuple[int, Id]], message: str) -> List[Problem]:
            return [Problem(kind, message, True, self.json_file, id_, "annotations", index) for index, id_ in entries]

        problems = list(self.problems)
        if "polygons" in annotation_keys and self.rle_object is not None:
            message = (
                f"The mask of annotation {self.rle_object} of {self.json_file!r} is an RLE, and INPUT.MASK_FORMAT is "
                "'polygon': set it (in a LazyConfig: dataloader.train.mapper.instance_mask_format) to 'bitmask'."
            )
            problems.append(Problem(WRONG_VALUE, message, file=self.json_file))
        if "area" in annotation_keys and "segmentation" in annotation_keys:
            message = "COCO's evaluator cannot read a mask whose first polygon has no three points (DATASETS.TEST)"
            problems += broken(INVALID_POLYGON, self.not_evaluable, message)
        for key, entries in self.lacking.items():
            message = f"no {key!r}, and {OPTIONAL_KEYS[key]}"
            if key in annotation_keys:
                problems += broken(MISSING_KEY, entries, message)
            elif entries:
                message = f"{len(entries)} annotations (the first: {entries[0][1]}) have {message}"
                problems.append(Problem(MISSING_KEY, message, breaks=False, file=self.json_file))
        return problems


def check_coco_json(json_file: str) -> CocoReport:
    """Read a json and check every entry.

    Keypoints, crowds and extra keys are accepted. An entry may have several problems; of several entries with the
    same id or file name, the first counts as correct. What occurs in COCO's own files (a box that sticks out of its
    image or is empty, an invalid polygon among valid ones, repeated ids in the minival files) does not break.

    Args:
        json_file: a local file. One whose name begins with "image_info", as COCO's test sets, needs no annotations.

    Returns:
        What is in the json, and its problems; a json that cannot be read is one of them.
    """
    try:
        with open(json_file, encoding="utf-8") as file:
            content = _farther_down_the_stack(_FRAMES, json.load, file)
    except (OSError, ValueError, RecursionError) as error:
        message = f"{json_file!r} cannot be read as json: {error}. Make or download it again."
        return CocoReport(json_file, problems=(Problem(UNREADABLE_JSON, message, file=json_file),))
    return check_coco_content(json_file, content)


def check_coco_content(json_file: str, content: Any) -> CocoReport:
    """Check the content of ``json_file`` as :func:`check_coco_json` does. The content is not changed."""
    checker = _Checker(json_file)
    checker.check_shape(content)
    if checker.problems:
        return CocoReport(json_file, problems=tuple(checker.problems))
    annotations = content.get("annotations", [])
    classes = checker.check_categories(content["categories"])
    images = checker.check_images(content["images"])
    checker.check_annotations(annotations)
    return CocoReport(
        json_file,
        tuple(classes),
        tuple(images),
        len(annotations),
        tuple(checker.problems),
        checker.lacking,
        checker.rle_object,
        checker.not_evaluable,
    )


class _Checker:
    """Checks the parts of one json in turn and collects their problems."""

    def __init__(self, json_file: str) -> None:
        self.problems: List[Problem] = []
        self.lacking: Dict[str, List[Tuple[int, Id]]] = {key: [] for key in OPTIONAL_KEYS}
        self.rle_object: Optional[Id] = None
        self.not_evaluable: List[Tuple[int, Id]] = []
        self._json_file = json_file
        self._ids: Dict[str, Set[Id]] = {part: set() for part in _REQUIRED_KEYS}
        self._sizes: Dict[Id, Size] = {}

    def check_shape(self, content: Any) -> None:
        if not isinstance(content, dict):
            self._add_fatal(f"it holds a {type(content).__name__}, not an object")
            return
        without_annotations = os.path.basename(self._json_file).startswith("image_info")
        for part in _REQUIRED_KEYS:
            if part == "annotations" and part not in content and without_annotations:
                continue
            if not isinstance(content.get(part), list):
                self._add_fatal(f"it has no list {part!r}")
            elif not content[part] and part != "annotations":
                self._add_fatal(f"its {part!r} is empty")
        if _is_deeper({part: content[part] for part in content if part not in ("images", "annotations")}, _DEEPEST):
            self._add_fatal(f"its lists or objects are nested more than {_DEEPEST} levels deep")

    def check_categories(self, entries: List[Any]) -> List[str]:
        names: Dict[Id, str] = {}
        id_types = (_commonest_type(entries, _NUMBERS),)
        for index, entry in enumerate(entries):
            if not self._is_identified("categories", index, entry, id_types):
                continue
            if _is_text(entry["name"]):
                names[entry["id"]] = entry["name"]
            else:
                self._add("categories", index, entry, Problem(WRONG_VALUE, f"name {short(entry['name'])} is not text"))
        for name, count in Counter(names.values()).items():
            if count > 1:
                message = f"{count} categories are named {short(name)}"
                self.problems.append(Problem(DUPLICATE_CLASS, message, breaks=False, file=self._json_file))
        return [names[number] for number in sorted(names)]

    def check_images(self, entries: List[Any]) -> List[ImageFile]:
        images: List[ImageFile] = []
        first_ids: Dict[str, Id] = {}
        id_types = (_commonest_type(entries, (int, float, str)),)
        for index, entry in enumerate(entries):
            # Known even if it cannot be used: its annotations are not at fault.
            if isinstance(entry, dict) and _is_id(entry.get("id"), id_types):
                self._sizes.setdefault(entry["id"], None)
            if not self._is_identified("images", index, entry, id_types):
                continue
            number, file_name, height, width = entry["id"], entry["file_name"], entry["height"], entry["width"]
            if not isinstance(file_name, str) or not file_name:
                self._add("images", index, entry, Problem(WRONG_VALUE, f"file_name {short(file_name)} is not text"))
            elif not (_is_length(height) and _is_length(width)):
                message = f"height {short(height)}, width {short(width)} are not two whole numbers > 0"
                self._add("images", index, entry, Problem(WRONG_VALUE, message))
            elif file_name in first_ids:
                message = f"file_name {short(file_name)} is also that of image {first_ids[file_name]}"
                self._add("images", index, entry, Problem(DUPLICATE_FILE, message))
            else:
                first_ids[file_name] = number
                self._sizes[number] = height, width
                images.append(ImageFile(index, number, file_name, height, width))
        return images

    def check_annotations(self, entries: List[Any]) -> None:
        for index, entry in enumerate(entries):
            if not self._is_identified("annotations", index, entry, _NUMBERS):
                continue
            number, problems = entry["id"], self._reference_problems(entry)
            size = None if problems else self._sizes[entry["image_id"]]
            if number == 0:
                message = "COCO's evaluator counts a detection of the object with this id as false; count from 1"
                problems.append(Problem(ID_ZERO, message, breaks=False))
            crowd, segmentation = entry.get("iscrowd", 0), entry.get("segmentation")
            of_mask = mask_problem(segmentation, size) if segmentation else None
            for problem in (box_problem(entry["bbox"], size), of_mask, keypoints_problem(entry.get("keypoints"))):
                if problem:
                    problems.append(problem)
            if crowd not in (0, 1):
                problems.append(Problem(WRONG_VALUE, f"iscrowd {short(crowd)} is neither 0 nor 1"))
            if entry.get("ignore", 0) != 0:
                problems.append(Problem(WRONG_VALUE, "'ignore' is set, which Detectron2 does not read; use 'iscrowd'"))
            for problem in problems:
                self._add("annotations", index, entry, problem)

            if not segmentation:
                self.lacking["segmentation"].append((index, number))
            elif not (of_mask and of_mask.breaks or is_evaluable(segmentation)):
                self.not_evaluable.append((index, number))
            if self.rle_object is None and not crowd and isinstance(segmentation, dict) and segmentation:
                self.rle_object = number
            area = entry.get("area")
            if not (type(area) in _NUMBERS and 0 <= area <= _LARGEST_AREA):
                self.lacking["area"].append((index, number))
            if "iscrowd" not in entry:
                self.lacking["iscrowd"].append((index, number))

    def _reference_problems(self, annotation: Dict[str, Any]) -> List[Problem]:
        """Check the ids of an annotation's image and category."""
        image, category = annotation["image_id"], annotation["category_id"]
        problems: List[Problem] = []
        if type(image) not in (int, float, str):
            problems.append(Problem(WRONG_VALUE, f"image_id {short(image)} is not a number"))
        elif image not in self._sizes:
            problems.append(Problem(UNKNOWN_IMAGE, f"image_id {short(image)} is not in 'images'"))
        if type(category) not in _NUMBERS:
            problems.append(Problem(WRONG_VALUE, f"category_id {short(category)} is not a number"))
        elif category not in self._ids["categories"]:
            problems.append(Problem(UNKNOWN_CATEGORY, f"category_id {short(category)} is not in 'categories'"))
        return problems

    def _is_identified(self, part: str, index: int, entry: Any, id_types: Tuple[type, ...]) -> bool:
        """Return whether an entry has all keys and a unique id; if not, add the problem."""
        if not isinstance(entry, dict):
            self._add(part, index, {}, Problem(WRONG_SHAPE, f"{short(entry)} is not an object"))
            return False
        absent = [key for key in _REQUIRED_KEYS[part] if key not in entry]
        if absent:
            self._add(part, index, entry, Problem(MISSING_KEY, f"no {', '.join(map(repr, absent))}"))
            return False
        number = entry["id"]
        if not _is_id(number, id_types):
            self._add(part, index, {}, Problem(WRONG_VALUE, f"id {short(number)} is not {_ID_KINDS[id_types]}"))
            return False
        if number in self._ids[part]:
            # COCO's own minival files repeat a few, and Detectron2 accepts files of this name.
            breaks = part != "annotations" or "minival" not in self._json_file
            self._add(part, index, entry, Problem(DUPLICATE_ID, "an earlier entry has the same id", breaks))
            return False
        self._ids[part].add(number)
        return True

    def _add(self, part: str, index: int, entry: Dict[str, Any], problem: Problem) -> None:
        number = entry.get("id")
        shown = number if _is_id(number, (int, float, str)) else None
        self.problems.append(problem._replace(file=self._json_file, entry=shown, part=part, place=index))

    def _add_fatal(self, reason: str) -> None:
        message = f"{self._json_file!r} is not in COCO's instances format: {reason}. See "
        message += "https://cocodataset.org/#format-data, or export it again as COCO instances."
        self.problems.append(Problem(WRONG_SHAPE, message, file=self._json_file))


# What an id must be, by the types that it may have.
_ID_KINDS: Dict[Tuple[type, ...], str] = {
    _NUMBERS: "a number of 64 bits",
    (int,): "a whole number of 64 bits, as the others are",
    (float,): "a number with a decimal point, as the others are",
    (str,): "text, as the others are",
}


def _commonest_type(entries: List[Any], types: Tuple[type, ...]) -> type:
    """Return the type of most ids. All must have the same, since Detectron2 and COCO's evaluator sort them."""
    counts = Counter(type(entry.get("id")) for entry in entries if isinstance(entry, dict))
    return max(types, key=lambda kind: counts[kind])


def _is_id(value: Any, types: Tuple[type, ...]) -> bool:
    return type(value) in types and (_is_text(value) if type(value) is str else abs(value) <= _LARGEST_ID)


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be encoded, unlike half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_length(value: Any) -> bool:
    return type(value) in _NUMBERS and 0 < value < 2**31 and value % 1 == 0


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested more than ``levels`` deep."""
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(isinstance(part, (dict, list)) and _is_deeper(part, levels - 1) for part in inner)


def _farther_down_the_stack(frames: int, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call ``function(argument)`` so many frames deeper.

    Nested lists need frames too: what only just fits here would not fit when Detectron2 reads the file again.
    """
    return _farther_down_the_stack(frames - 1, function, argument) if frames else function(argument)
