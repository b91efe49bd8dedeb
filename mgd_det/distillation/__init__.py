"""Distillation: features of teacher and student, reduction, margins and losses."""

from mgd_det.distillation.distiller import Distiller, is_distillation_loss
from mgd_det.distillation.feature_hooks import FeatureHooks, ends_in_activation
from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.logit_losses import sigmoid_logit_loss, softmax_logit_loss
from mgd_det.distillation.losses import attention_transfer, channel_wise_kl, partial_l2, pearson_distance, plain_l2
from mgd_det.distillation.margins import MeasuredMargin, negative_margin
from mgd_det.distillation.matching_statistics import MatchingReport, MatchingStatistics
from mgd_det.distillation.pixels import PixelFormat
from mgd_det.distillation.position_losses import (
    POSITION_LOSS_REGISTRY,
    PositionFeatures,
    PositionLoss,
    register_position_loss,
)
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import absolute_max_pooling, random_drop, sparse_matching
from mgd_det.distillation.teacher import Teacher, TeacherNetwork, TeacherOptions

__all__ = [
    "Distiller",
    "FeatureSpec",
    "FeatureHooks",
    "MatchingStatistics",
    "MatchingReport",
    "MeasuredMargin",
    "POSITION_LOSS_REGISTRY",
    "PixelFormat",
    "Position",
    "PositionFeatures",
    "PositionLoss",
    "Teacher",
    "TeacherNetwork",
    "TeacherOptions",
    "absolute_max_pooling",
    "attention_transfer",
    "channel_wise_kl",
    "distillation_features",
    "ends_in_activation",
    "is_distillation_loss",
    "negative_margin",
    "partial_l2",
    "pearson_distance",
    "plain_l2",
    "random_drop",
    "register_position_loss",
    "sigmoid_logit_loss",
    "softmax_logit_loss",
    "sparse_matching",
]
