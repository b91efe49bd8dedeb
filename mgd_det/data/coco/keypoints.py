"""Names of a data set's keypoints, which Detectron2 needs to mirror an image: the left eye becomes the right one."""

import re
from typing import Any, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from detectron2.data import MetadataCatalog

from mgd_det.data.coco.check import CocoReport
from mgd_det.data.coco.register import coco_files, read_report
from mgd_det.errors import UserError

_LEFT_RIGHT = re.compile("left|right", re.IGNORECASE)
_L_R = re.compile(r"(?<![a-z])[lr](?![a-z])", re.IGNORECASE)  # l_eye, eye.R
_COCO_KEYPOINTS = 17
_OTHER_SIDE = {"left": "right", "right": "left", "l": "r", "r": "l"}


class Keypoints(NamedTuple):
    """The keypoints of an object in a data set.

    Attributes:
        number: how many there are; None if it is not known.
        names: their names in order; None if they are not known.
        flip_pairs: pairs of names that change places in a mirrored image.
    """

    number: Optional[int] = None
    names: Optional[Tuple[str, ...]] = None
    flip_pairs: Tuple[Tuple[str, str], ...] = ()


def left_right_pairs(names: Sequence[str]) -> List[Tuple[str, str]]:
    """Return the pairs of names that differ in "left" and "right", or in "l" and "r" as a part of their own."""
    pairs = []
    for index, name in enumerate(names):
        for pattern in (_LEFT_RIGHT, _L_R):
            mirrored = pattern.sub(_other_side, name)
            if mirrored in names[index + 1 :]:
                pairs.append((name, mirrored))
                break
    return pairs


def keypoints_of(name: str, names: Sequence[str] = (), flip_pairs: Sequence[Sequence[str]] = ()) -> Keypoints:
    """Find the keypoints of a registered data set.

    Names are those of its metadata ("keypoint_names"), or else ``names``, or else those of the categories of its json.
    Pairs are those of its metadata ("keypoint_flip_map"), or else ``flip_pairs``, or else :func:`left_right_pairs`.

    Args:
        name: of the data set.
        names: of DATASETS.KEYPOINT_NAMES.
        flip_pairs: of DATASETS.KEYPOINT_FLIP_PAIRS.

    Raises:
        UserError: names or pairs cannot be used, or their number is not that of the annotations.
    """
    files = coco_files(name)
    report = read_report(files.json_file) if files else None
    found, source = _registered_or("DATASETS.KEYPOINT_NAMES", names, name, "keypoint_names")
    if found is None and report:
        found, source = _names_of_categories(name, report), f"'keypoints' of the categories of {report.json_file!r}"
    pairs, _ = _registered_or("DATASETS.KEYPOINT_FLIP_PAIRS", flip_pairs, name, "keypoint_flip_map")
    if found is None:
        return Keypoints(report.num_keypoints if report else None)
    if not all(isinstance(text, str) and text for text in found) or len(set(found)) < len(found):
        raise UserError(f"{name}: the keypoints' names {found} of {source} must be non-empty strings, all different")
    if report and len(found) != report.num_keypoints:
        raise UserError(
            f"{name}: the annotations of {report.json_file!r} have {report.num_keypoints} keypoints, but {source} has "
            f"{len(found)} names, {found}: give one name for each"
        )
    if pairs is None:
        pairs = left_right_pairs(found)
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(point in found for point in pair):
            raise UserError(f"{name}: {pair} of DATASETS.KEYPOINT_FLIP_PAIRS is not a pair of the names {found}")
    return Keypoints(len(found), tuple(found), tuple((pair[0], pair[1]) for pair in pairs))


def register_keypoints(name: str, keypoints: Keypoints) -> None:
    """Put names and pairs into the metadata of a data set, where Detectron2 reads them."""
    metadata = MetadataCatalog.get(name)
    if keypoints.names is None:
        return
    # Tuples, as Detectron2's own sets have them: it compares those of several sets to train on.
    if metadata.get("keypoint_names") is None:
        metadata.keypoint_names = keypoints.names
    if metadata.get("keypoint_flip_map") is None:
        metadata.keypoint_flip_map = keypoints.flip_pairs


def require_names(name: str, keypoints: Keypoints) -> None:
    """Check that the keypoints of a set to train on have names.

    Raises:
        UserError: they have none.
    """
    if keypoints.names is None:
        raise UserError(
            f"{name} has no names of its keypoints, without which an image cannot be mirrored: give each category of "
            'the json "keypoints": [...], or set DATASETS.KEYPOINT_NAMES (of tools/train_net.py), or '
            f"MetadataCatalog.get({name!r}).keypoint_names = [...], in the order of the annotations"
        )


def check_number_of_keypoints(name: str, keypoints: Keypoints, key: str, number: int) -> None:
    """Check that a keypoint head has as many keypoints as a data set.

    Args:
        name: of the data set.
        keypoints: its keypoints.
        key: the config key of ``number``.
        number: keypoints of the head.

    Raises:
        UserError: it has another number.
    """
    if keypoints.number not in (None, number):
        raise UserError(
            f"{name} has {keypoints.number} keypoints, but {key} is {number}: set it to {keypoints.number}, or use "
            "weights and data of the same keypoints"
        )


def check_same_keypoints(sets: Mapping[str, Keypoints]) -> None:
    """Check that the data sets of a run have the same names of keypoints in the same order.

    Args:
        sets: keypoints by what a message calls the set. Sets without names are left out.

    Raises:
        UserError: two sets differ.
    """
    named = {name: keypoints.names for name, keypoints in sets.items() if keypoints.names}
    for name, names in named.items():
        first, expected = next(iter(named.items()))
        if names != expected:
            raise UserError(
                f"{name} has the keypoints {list(names)}, but {first} has {list(expected)}: a keypoint is learned by "
                "its place in this list. Export both with the same list"
            )


def check_sigmas(key: str, sigmas: Sequence[Any], number_key: str, number: int) -> None:
    """Check the sigmas by which COCO's evaluator compares keypoints.

    Args:
        key: the config key of ``sigmas``.
        sigmas: one for each keypoint; empty for COCO's own.
        number_key: the config key of ``number``.
        number: keypoints of the head.

    Raises:
        UserError: they are not one number > 0 for each keypoint, or empty for other keypoints than COCO's.
    """
    how = "give one number > 0 for each keypoint, larger where its place is less certain (COCO's are 0.026 to 0.107)"
    if not sigmas:
        if number != _COCO_KEYPOINTS:
            raise UserError(
                f"{key} is empty, which means the sigmas of COCO's {_COCO_KEYPOINTS} keypoints, but {number_key} is "
                f"{number}: {how}, such as {[0.05] * number}"
            )
    elif len(sigmas) != number:
        raise UserError(f"{key} has {len(sigmas)} values, but {number_key} is {number}: {how}")
    elif not all(type(sigma) in (int, float) and 0 < sigma < float("inf") for sigma in sigmas):
        raise UserError(f"{key} is {list(sigmas)}: {how}")


def _other_side(match: "re.Match[str]") -> str:
    side = match.group()
    other = _OTHER_SIDE[side.lower()]
    return other.upper() if side.isupper() else other.title() if side.istitle() else other


def _registered_or(key: str, configured: Sequence[Any], name: str, attribute: str) -> Tuple[Optional[list], str]:
    """Return what a data set is registered with, or else what is configured, and where it is from; None if neither."""
    registered = MetadataCatalog.get(name).get(attribute)
    given, known = _as_lists(configured), _as_lists(registered or ())
    if registered is None:
        return given or None, key
    if given and given != known:
        raise UserError(
            f"{name}: {key} is {given}, but the data set is registered with {attribute} {known}: set {key} to []"
        )
    return known, f"its metadata {attribute!r}"


def _as_lists(values: Sequence[Any]) -> list:
    return [list(value) if isinstance(value, (list, tuple)) else value for value in values]


def _names_of_categories(name: str, report: CocoReport) -> Optional[List[str]]:
    lists = report.keypoint_lists
    if len(lists) > 1:
        raise UserError(
            f"{name}: the categories of {report.json_file!r} have different 'keypoints', {list(lists[0])} and "
            f"{list(lists[1])}. A keypoint head has the same for all classes: give all categories the same list, or "
            "set DATASETS.KEYPOINT_NAMES"
        )
    return list(lists[0]) if lists else None
