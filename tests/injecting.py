"""Detectors whose backbone has distillation, and their losses."""

import toy
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from mgd_det.config import without_distillation
from mgd_det.modeling import attach_losses, find_distillation

POSITIONS = ("res2", "res3", "res4", "res5")


def match(detector, batch=None):
    """One update of the matching, without a trainer; the Distillation of the detector."""
    attach_losses(detector)
    distillation = find_distillation(detector)
    distillation.solve_matching(detector, [batch or toy.batch()])
    return distillation


def losses_of(detector, batch=None):
    with EventStorage():
        return detector.train()(batch or toy.batch())


def losses_of_mode_as_it_is(detector):
    with EventStorage():
        return detector(toy.batch())


def plain_student(cfg):
    return build_model(without_distillation(cfg))
