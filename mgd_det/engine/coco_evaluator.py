"""Detectron2's COCOEvaluator with a fast computation of AP, by the package hotcoco."""

import functools
import importlib.metadata
import logging
import os
import re
from contextlib import contextmanager
from typing import Any, Iterator, List

import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mgd_det.errors import first_line

logger = logging.getLogger(__name__)

# The oldest version whose results are tested to equal those of pycocotools.
_OLDEST = (1, 3)

# Keys of an annotation that are read, always and for each kind of AP: converting the others takes most of the time.
_COMMON = ("id", "image_id", "category_id", "bbox", "area", "iscrowd", "score")
_SHAPES = {"bbox": (), "segm": ("segmentation",), "keypoints": ("keypoints", "num_keypoints")}


class FastCOCOEvaluator(COCOEvaluator):
    """Detectron2's evaluator, much faster where hotcoco is installed, with the same scores.

    Detectron2's own fast evaluation needs its compiled extension, and without it takes pycocotools. This class takes,
    in this order: hotcoco, Detectron2's extension, pycocotools.
    """

    def __init__(self, *args: Any, use_fast_impl: bool = True, **options: Any) -> None:
        """
        Args:
            args: as of COCOEvaluator.
            use_fast_impl: False for pycocotools. The key TEST.FAST_EVAL sets it.
            options: as of COCOEvaluator.
        """
        self._use_hotcoco = use_fast_impl and _has_hotcoco()
        # Detectron2's extension only if it is there, because Detectron2 logs its absence at every evaluation.
        has_extension = coco_evaluation.COCOeval_opt is not COCOeval
        super().__init__(*args, use_fast_impl=use_fast_impl and has_extension and not self._use_hotcoco, **options)

    def _eval_predictions(self, predictions: Any, img_ids: Any = None) -> None:
        if not self._use_hotcoco:
            super()._eval_predictions(predictions, img_ids=img_ids)
            return
        with _computing_by_hotcoco():
            super()._eval_predictions(predictions, img_ids=img_ids)


class _HotcocoEval(COCOeval):
    """pycocotools' interface over hotcoco: the matching and the precisions are hotcoco's, the summary pycocotools'."""

    def evaluate(self) -> None:
        self._hotcoco = None
        try:
            self._hotcoco = self._evaluated()
        except Exception as e:  # whatever hotcoco does not read, such as ids that are text
            logger.warning(
                f"AP is computed by pycocotools, slowly: hotcoco does not take this data set: {first_line(e)}"
            )
            super().evaluate()

    def accumulate(self, p: Any = None) -> None:
        if self._hotcoco is None:
            super().accumulate(p)
        else:
            self._hotcoco.accumulate()
            self.eval = self._hotcoco.eval

    def _evaluated(self) -> Any:
        import hotcoco

        _check_not_forked()
        if any(a["id"] == 0 for a in self.cocoGt.dataset["annotations"]):
            raise ValueError("an annotation has the id 0, which pycocotools counts as not found")
        kept = {*_COMMON, *_SHAPES[self.params.iouType]}

        def converted(coco: COCO) -> Any:
            # A whole data set for the detections too: hotcoco's load_res would replace the areas of pycocotools'.
            parts = [{key: a[key] for key in kept & a.keys()} for a in coco.dataset["annotations"]]
            return hotcoco.COCO({**coco.dataset, "annotations": parts})

        evaluation = hotcoco.COCOeval(converted(self.cocoGt), converted(self.cocoDt), self.params.iouType)
        ours, theirs = evaluation.params, self.params
        for name in ("imgIds", "catIds", "iouThrs", "recThrs", "maxDets", "areaRng", "areaRngLbl"):
            value = getattr(theirs, name)
            setattr(ours, name, value.tolist() if isinstance(value, np.ndarray) else list(value))
        ours.kpt_oks_sigmas = [float(sigma) for sigma in getattr(theirs, "kpt_oks_sigmas", ())]
        evaluation.evaluate()
        return evaluation


class _HotcocoMaxDets(_HotcocoEval):
    """The same with another limit of detections, whose summary is Detectron2's."""

    summarize = coco_evaluation.COCOevalMaxDets.summarize


_started_in: List[int] = []  # the process in which hotcoco has started its threads


def _check_not_forked() -> None:
    """Raise ValueError in a process forked after hotcoco had started threads, for which it would wait forever."""
    if _started_in and _started_in != [os.getpid()]:
        raise ValueError("this process was forked from one that has used it, whose threads are missing here")
    _started_in[:] = [os.getpid()]


@contextmanager
def _computing_by_hotcoco() -> Iterator[None]:
    """Make Detectron2's evaluator compute by hotcoco in the ``with`` block: it takes these classes from its module."""
    replaced = {"COCOeval": _HotcocoEval, "COCOevalMaxDets": _HotcocoMaxDets}
    originals = {name: getattr(coco_evaluation, name) for name in replaced}
    try:
        for name, replacement in replaced.items():
            setattr(coco_evaluation, name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(coco_evaluation, name, original)


@functools.cache  # one line a process, not one an evaluation
def _has_hotcoco() -> bool:
    """Return whether hotcoco can compute the scores; log once what is used instead."""
    needed = ".".join(map(str, _OLDEST))
    try:
        import hotcoco  # noqa: F401

        version = importlib.metadata.version("hotcoco")
    except ImportError:  # also of importlib.metadata
        logger.info(f"AP is computed by pycocotools, slowly: `pip install 'hotcoco>={needed}'` is much faster")
        return False
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST:
        logger.info(f"AP is computed by pycocotools, slowly: hotcoco is {version}, older than {needed}")
        return False
    return True
