"""Distillation: features of teacher and student, reduction, margins and losses."""

from mgd_det.distillation.distiller import Distiller
from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.losses import partial_l2
from mgd_det.distillation.margins import MeasuredMargin, negative_margin
from mgd_det.distillation.measurement import MatchingMeasurement, MatchingReport
from mgd_det.distillation.pixels import PixelFormat
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import absolute_max_pooling, random_drop, sparse_matching
from mgd_det.distillation.taps import FeatureTaps
from mgd_det.distillation.teacher import Teacher

__all__ = [
    "Distiller",
    "FeatureSpec",
    "FeatureTaps",
    "MatchingMeasurement",
    "MatchingReport",
    "MeasuredMargin",
    "PixelFormat",
    "Position",
    "Teacher",
    "absolute_max_pooling",
    "distillation_features",
    "negative_margin",
    "partial_l2",
    "random_drop",
    "sparse_matching",
]
