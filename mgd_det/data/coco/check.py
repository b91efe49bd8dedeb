"""Find every problem of a json in COCO's instances format, in one pass, without its images."""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Callable, Container, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

from mgd_det.data.coco import problems as kinds
from mgd_det.data.coco.annotation_check import Size, box_problem, is_evaluable, keypoints_problem, mask_problem
from mgd_det.data.coco.problems import Problem, short
from mgd_det.data.coco.whole_numbers import with_whole_numbers

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
    "keypoints": "keypoint heads need as many points of each object, and 'num_keypoints' (MODEL.KEYPOINT_ON)",
}
_LARGEST_ID = 2**63 - 1  # of numpy, in which COCO's evaluator stores ids
_DEEPEST = 100  # levels of nested lists, which COCO's evaluator copies recursively
_FRAMES = 200  # of the stack that are left to Detectron2, which reads the file again
_LARGEST_AREA = 1e10  # COCO's evaluator silently leaves out larger ones

Id = Union[int, str]


class ImageFile(NamedTuple):
    """An image as the json has it; ``place`` is its index in "images"."""

    place: int
    id: Id
    file_name: str
    height: int
    width: int


@dataclass
class CocoReport:
    """What is in a json, and what is wrong with it. :func:`check_coco_json` fills it; nothing changes it later.

    Attributes:
        json_file: its path.
        classes: class names by category id.
        category_ids: the ids of these classes.
        images: the entries of "images" that can be used.
        num_annotations: all entries of "annotations".
        problems: those that do not depend on what the set is used for.
        lacking: for each of OPTIONAL_KEYS, index and id of the annotations without it.
        rle_object: id of the first object (no crowd) whose mask is an RLE, or None.
        not_evaluable: index and id of the annotations whose mask COCO's evaluator cannot read, and training can.
        num_keypoints: points of an object, by most annotations that have some; 0 if none has.
        keypoint_lists: the different lists of keypoints' names that categories have.
        converts: whether numbers such as 64.0 were read as whole numbers (:func:`with_whole_numbers`).
    """

    json_file: str
    classes: Tuple[str, ...] = ()
    category_ids: Tuple[Id, ...] = ()
    images: Tuple[ImageFile, ...] = ()
    num_annotations: int = 0
    problems: List[Problem] = field(default_factory=list)
    lacking: Dict[str, List[Tuple[int, Id]]] = field(default_factory=lambda: {key: [] for key in OPTIONAL_KEYS})
    rle_object: Optional[Id] = None
    not_evaluable: List[Tuple[int, Id]] = field(default_factory=list)
    num_keypoints: int = 0
    keypoint_lists: Tuple[Tuple[str, ...], ...] = ()
    converts: bool = False

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
            problems.append(Problem(kinds.WRONG_VALUE, message, file=self.json_file))
        if "keypoints" in annotation_keys and not self.num_keypoints:
            message = f"No annotation of {self.json_file!r} has 'keypoints', and MODEL.KEYPOINT_ON is True."
            problems.append(Problem(kinds.MISSING_KEY, message, file=self.json_file))
        if "area" in annotation_keys and "segmentation" in annotation_keys:
            message = "COCO's evaluator cannot read a mask whose first polygon has no three points (DATASETS.TEST)"
            problems += broken(kinds.INVALID_POLYGON, self.not_evaluable, message)
        for key, entries in self.lacking.items():
            message = f"no {key!r}, and {OPTIONAL_KEYS[key]}"
            if key in annotation_keys:
                problems += broken(kinds.MISSING_KEY, entries, message)
            elif entries and key != "keypoints":  # many sets have them for some classes only
                message = f"{len(entries)} annotations (the first: {entries[0][1]}) have {message}"
                problems.append(Problem(kinds.MISSING_KEY, message, breaks=False, file=self.json_file))
        return problems


def check_coco_json(json_file: str) -> CocoReport:
    """Read a json and check every entry.

    Keypoints, crowds and extra keys are accepted, and so are several images of one file. Numbers such as 64.0 count as
    the whole numbers that Detectron2 will read. An entry may have several problems; of several entries with the same
    id, the first counts as correct. What occurs in COCO's own files (a box that sticks out of its image or is empty, an
    invalid polygon among valid ones, repeated ids in the minival files) does not break.

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
        return CocoReport(json_file, problems=[Problem(kinds.UNREADABLE_JSON, message, file=json_file)])
    return check_coco_content(json_file, content)


def check_coco_content(json_file: str, content: Any) -> CocoReport:
    """Check the content of ``json_file`` as :func:`check_coco_json` does. The content is not changed."""
    report, converted = CocoReport(json_file), with_whole_numbers(content)
    checker = _Checker(report)
    checker.check_shape(converted)
    if not report.problems:
        checker.check_categories(converted["categories"])
        checker.check_images(converted["images"])
        checker.check_annotations(converted.get("annotations", []))
        report.converts = converted is not content
    return report


class _Checker:
    """Checks the parts of one json in turn and fills the report."""

    def __init__(self, report: CocoReport) -> None:
        self.report = report
        self._json_file = report.json_file
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

    def check_categories(self, entries: List[Any]) -> None:
        names: Dict[Id, str] = {}
        keypoint_lists: Dict[Tuple[str, ...], None] = {}
        for index, entry in enumerate(entries):
            if not self._is_identified("categories", index, entry, int):
                continue
            if _is_text(entry["name"]):
                names[entry["id"]] = entry["name"]
            else:
                problem = Problem(kinds.WRONG_VALUE, f"name {short(entry['name'])} is not text")
                self._add("categories", index, entry, problem)
            keypoints = entry.get("keypoints")
            if keypoints and isinstance(keypoints, list) and all(map(_is_text, keypoints)):
                keypoint_lists[tuple(keypoints)] = None
        self.report.keypoint_lists = tuple(keypoint_lists)
        for name, count in Counter(names.values()).items():
            if count > 1:
                message = f"{count} categories are named {short(name)}"
                self.report.problems.append(Problem(kinds.DUPLICATE_CLASS, message, breaks=False, file=self._json_file))
        self.report.category_ids = tuple(sorted(names))
        self.report.classes = tuple(names[number] for number in self.report.category_ids)

    def check_images(self, entries: List[Any]) -> None:
        images: List[ImageFile] = []
        # All ids must have the same type, since Detectron2 and COCO's evaluator sort them.
        types = Counter(type(entry.get("id")) for entry in entries if isinstance(entry, dict))
        id_type = str if types[str] > types[int] else int
        for index, entry in enumerate(entries):
            # Known even if it cannot be used: its annotations are not at fault.
            if isinstance(entry, dict) and _is_id(entry.get("id"), id_type):
                self._sizes.setdefault(entry["id"], None)
            if not self._is_identified("images", index, entry, id_type):
                continue
            number, file_name, height, width = entry["id"], entry["file_name"], entry["height"], entry["width"]
            if not isinstance(file_name, str) or not file_name:
                problem = Problem(kinds.WRONG_VALUE, f"file_name {short(file_name)} is not text")
                self._add("images", index, entry, problem)
            elif not (_is_length(height) and _is_length(width)):
                message = f"height {short(height)}, width {short(width)} are not two whole numbers > 0"
                self._add("images", index, entry, Problem(kinds.WRONG_VALUE, message))
            else:
                self._sizes[number] = height, width
                images.append(ImageFile(index, number, file_name, height, width))
        self.report.images = tuple(images)

    def check_annotations(self, entries: List[Any]) -> None:
        report = self.report
        report.num_annotations = len(entries)
        points = (entry.get("keypoints") for entry in entries if isinstance(entry, dict))
        lengths = Counter(len(values) for values in points if isinstance(values, list) and values)
        num_values = max(lengths, key=lambda length: lengths[length]) if lengths else 0
        report.num_keypoints = num_values // 3
        for index, entry in enumerate(entries):
            if not self._is_identified("annotations", index, entry, int):
                continue
            number, problems = entry["id"], self._reference_problems(entry)
            size = None if problems else self._sizes[entry["image_id"]]
            if number == 0:
                message = "COCO's evaluator counts a detection of the object with this id as false; count from 1"
                problems.append(Problem(kinds.ID_ZERO, message, breaks=False))
            crowd, segmentation = entry.get("iscrowd", 0), entry.get("segmentation")
            of_mask = mask_problem(segmentation, size) if segmentation else None
            of_parts = (box_problem(entry["bbox"], size), of_mask, keypoints_problem(entry.get("keypoints")))
            problems += filter(None, of_parts)
            if crowd not in (0, 1):
                problems.append(Problem(kinds.WRONG_VALUE, f"iscrowd {short(crowd)} is neither 0 nor 1"))
            if entry.get("ignore", 0) != 0:
                message = "'ignore' is set, which Detectron2 does not read; use 'iscrowd'"
                problems.append(Problem(kinds.WRONG_VALUE, message))
            for problem in problems:
                self._add("annotations", index, entry, problem)

            if not segmentation:
                report.lacking["segmentation"].append((index, number))
            elif not (of_mask and of_mask.breaks or is_evaluable(segmentation)):
                report.not_evaluable.append((index, number))
            if report.rle_object is None and not crowd and isinstance(segmentation, dict) and segmentation:
                report.rle_object = number
            area = entry.get("area")
            if not (type(area) in (int, float) and 0 <= area <= _LARGEST_AREA):
                report.lacking["area"].append((index, number))
            if "iscrowd" not in entry:
                report.lacking["iscrowd"].append((index, number))
            if num_values and not _has_keypoints(entry, num_values):
                report.lacking["keypoints"].append((index, number))

    def _reference_problems(self, annotation: Dict[str, Any]) -> List[Problem]:
        """Check the ids of an annotation's image and category."""
        image, category = annotation["image_id"], annotation["category_id"]
        problems: List[Problem] = []
        if type(image) not in (int, str):
            problems.append(Problem(kinds.WRONG_VALUE, f"image_id {short(image)} is neither a whole number nor text"))
        elif image not in self._sizes:
            problems.append(Problem(kinds.UNKNOWN_IMAGE, f"image_id {short(image)} is not in 'images'"))
        if type(category) is not int:
            problems.append(Problem(kinds.WRONG_VALUE, f"category_id {short(category)} is not a whole number"))
        elif category not in self._ids["categories"]:
            problems.append(Problem(kinds.UNKNOWN_CATEGORY, f"category_id {short(category)} is not in 'categories'"))
        return problems

    def _is_identified(self, part: str, index: int, entry: Any, id_type: type) -> bool:
        """Return whether an entry has all keys and a unique id; if not, add the problem."""
        if not isinstance(entry, dict):
            self._add(part, index, {}, Problem(kinds.WRONG_SHAPE, f"{short(entry)} is not an object"))
            return False
        absent = [key for key in _REQUIRED_KEYS[part] if key not in entry]
        if absent:
            self._add(part, index, entry, Problem(kinds.MISSING_KEY, f"no {', '.join(map(repr, absent))}"))
            return False
        number = entry["id"]
        if not _is_id(number, id_type):
            wanted = "a whole number of 64 bits" if id_type is int else "text, as the others are"
            self._add(part, index, {}, Problem(kinds.WRONG_VALUE, f"id {short(number)} is not {wanted}"))
            return False
        if number in self._ids[part]:
            # COCO's own minival files repeat a few, and Detectron2 accepts files of this name.
            breaks = part != "annotations" or "minival" not in self._json_file
            self._add(part, index, entry, Problem(kinds.DUPLICATE_ID, "an earlier entry has the same id", breaks))
            return False
        self._ids[part].add(number)
        return True

    def _add(self, part: str, index: int, entry: Dict[str, Any], problem: Problem) -> None:
        number = entry.get("id")
        shown = number if _is_id(number, int) or _is_id(number, str) else None
        self.report.problems.append(problem._replace(file=self._json_file, entry=shown, part=part, place=index))

    def _add_fatal(self, reason: str) -> None:
        message = f"{self._json_file!r} is not in COCO's instances format: {reason}. See "
        message += "https://cocodataset.org/#format-data, or export it again as COCO instances."
        self.report.problems.append(Problem(kinds.WRONG_SHAPE, message, file=self._json_file))


def _is_id(value: Any, id_type: type) -> bool:
    return _is_text(value) if id_type is str else type(value) is int and abs(value) <= _LARGEST_ID


def _is_text(value: Any) -> bool:
    """Return whether a value is text that can be encoded, unlike half of a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_keypoints(annotation: Dict[str, Any], num_values: int) -> bool:
    keypoints = annotation.get("keypoints")
    return isinstance(keypoints, list) and len(keypoints) == num_values and type(annotation.get("num_keypoints")) is int


def _is_length(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_deeper(value: Any, levels: int) -> bool:
    """Return whether lists and objects are nested more than ``levels`` deep."""
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(isinstance(part, (dict, list)) and _is_deeper(part, levels - 1) for part in inner)


def _farther_down_the_stack(frames: int, function: Callable[[Any], Any], argument: Any) -> Any:
    """Call ``function(argument)`` so many frames deeper.

    Nested lists need frames too: what only just fits here would not fit when Detectron2 reads the file again.
    """
    return _farther_down_the_stack(frames - 1, function, argument) if frames else function(argument)
