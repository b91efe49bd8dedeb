"""The class names of a run's data sets: a class index must mean the same class in all of them."""

import logging
from typing import Dict, List, Mapping, NoReturn, Optional, Sequence

from detectron2.data import DatasetCatalog, MetadataCatalog

from mgd_det.data.coco.register import dataset_classes
from mgd_det.errors import UserError

logger = logging.getLogger(__name__)

# Class names by what a message calls the set ("DATASETS.TRAIN my_set"); None if they are not known.
Classes = Mapping[str, Optional[Sequence[str]]]

# Types of evaluators that do not score objects.
_WITHOUT_OBJECTS = ("sem_seg", "cityscapes_sem_seg")
# Types of evaluators that fail without class names. COCO's is one too if the set has no json, because it writes one.
_NAMING = ("pascal_voc", "cityscapes_instance")

_SHOWN_AT_MOST = 12  # classes of a set, in one message


def class_names(name: str) -> Optional[List[str]]:
    """Return the class names of a registered data set, in the order of the class indices.

    If it is registered without, it is loaded, because its function may set them, as Detectron2's for COCO does.

    Args:
        name: an entry of DATASETS.TRAIN or DATASETS.TEST.

    Returns:
        The names; None if there are none, or if the set is for semantic segmentation only.

    Raises:
        UserError: the name is unknown.
    """
    classes = dataset_classes(name)
    if classes is None and MetadataCatalog.get(name).get("evaluator_type") not in _WITHOUT_OBJECTS:
        DatasetCatalog.get(name)
        classes = dataset_classes(name)
        if classes is None:
            logger.warning(f"{name} is registered without class names (thing_classes), so its classes are not checked")
    return classes


def check_scorable_classes(name: str, key: str = "DATASETS.TEST") -> None:
    """Check that a data set has the class names that its evaluator reads at the end.

    Args:
        name: of the data set.
        key: the config key that names it.

    Raises:
        UserError: the name is unknown, or class names are missing.
    """
    metadata = MetadataCatalog.get(name)
    kind = metadata.get("evaluator_type", "coco")
    needs_names = kind in _NAMING or (kind == "coco" and metadata.get("json_file") is None)
    if needs_names and class_names(name) is None:
        raise UserError(
            f"{key} {name}: the data set is registered without class names, which its evaluation needs. Set "
            f"MetadataCatalog.get({name!r}).thing_classes = [...] where you register it: one name for each class index"
        )


def check_same_classes(trained: Classes, tested: Classes, advice: str = "") -> None:
    """Check that every class index means the same class in all data sets of a run.

    Sets to train on must have equal lists of classes, and so must sets to test on. The former may lack the last
    classes of the latter.

    Args:
        trained: sets to train on.
        tested: sets to evaluate on.
        advice: what to do, instead of correcting the sets.

    Raises:
        UserError: it shows the classes of two sets that differ.
    """
    first: Dict[bool, str] = {}  # whether it is tested: name of the first such set
    for is_tested, sets in ((False, trained), (True, tested)):
        for name, classes in sets.items():
            if classes is None:
                continue
            other = first.setdefault(is_tested, name)
            expected = list(sets[other] or ())
            if list(classes) != expected:
                _refuse(name, classes, other, expected, advice)
    if len(first) == 2:
        learned, scored = list(trained[first[False]] or ()), list(tested[first[True]] or ())
        if scored[: len(learned)] != learned:
            _refuse(first[True], scored, first[False], learned, advice)


def _refuse(name: str, classes: Sequence[str], other: str, expected: Sequence[str], advice: str) -> NoReturn:
    index = next((i for i, (one, two) in enumerate(zip(classes, expected)) if one != two), None)
    difference = ""
    if index is not None:
        difference = f"; the first difference is class {index}: {classes[index]!r} and {expected[index]!r}"
    raise UserError(
        f"{name} has the classes {_shown(classes)}, but {other} has {_shown(expected)}{difference}. A detector knows a "
        "class by its place in this list, which is by category id. "
        + (advice or "Export both from the same list of categories, or register them with the same thing_classes.")
    )


def _shown(classes: Sequence[str]) -> str:
    if len(classes) <= _SHOWN_AT_MOST:
        return str(list(classes))
    return f"{str(list(classes[:_SHOWN_AT_MOST]))[:-1]}, ... ({len(classes)} in all)]"
