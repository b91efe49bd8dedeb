"""Distillation: features of teacher and student, reduction, margins and losses.

The files, in the order in which data flows:

- ``pixels``: from the student's normalised images to the teacher's.
- ``features``: which features a backbone offers, and where they are inside it.
- ``feature_hooks``: reads them during a forward.
- ``teacher``: the frozen network; ``conv_bn_fusion`` and ``compilation`` make it faster.
- ``positions``: which student feature learns from which teacher feature.
- ``matching_statistics``: measures costs (``mgd_det.matching``) and ``margins``, and solves the matching.
- ``reducers``: from the teacher's channels to the student's, by the groups of the matching.
- ``masks``: how much each pixel counts in a loss.
- ``losses``, ``logit_losses``, ``box_losses``: functions of tensors; ``fused``: reduction and MGD's loss in one pass.
- ``position_losses``: the losses by their names in the config; ``weighted_losses``: with their weights.
- ``distiller``: norm layers, groups and losses of all positions.
"""

from mgd_det.distillation.box_losses import weighted_giou_loss
from mgd_det.distillation.distiller import Distiller
from mgd_det.distillation.feature_hooks import FeatureHooks, ends_in_activation
from mgd_det.distillation.features import FeatureSpec, distillation_features
from mgd_det.distillation.logit_losses import bernoulli_logit_loss, sigmoid_logit_loss, softmax_logit_loss
from mgd_det.distillation.losses import (
    activation_boundary,
    attention_transfer,
    channel_wise_kl,
    flow_of_solution,
    fsp_matrix,
    partial_l2,
    pearson_distance,
    plain_l2,
)
from mgd_det.distillation.margins import MeasuredMargin, negative_margin
from mgd_det.distillation.masks import box_mask, score_mask
from mgd_det.distillation.matching_statistics import MatchingReport, MatchingStatistics
from mgd_det.distillation.padding import Padding
from mgd_det.distillation.pixels import PixelFormat
from mgd_det.distillation.position_losses import (
    DEFAULT_LOSSES,
    POSITION_LOSS_REGISTRY,
    PositionFeatures,
    PositionLoss,
    register_position_loss,
)
from mgd_det.distillation.positions import Position
from mgd_det.distillation.reducers import absolute_max_pooling, random_drop, sparse_matching
from mgd_det.distillation.teacher import Teacher, TeacherNetwork, TeacherOptions
from mgd_det.distillation.weighted_losses import is_distillation_loss

__all__ = [
    "DEFAULT_LOSSES",
    "Distiller",
    "FeatureSpec",
    "FeatureHooks",
    "MatchingStatistics",
    "MatchingReport",
    "MeasuredMargin",
    "POSITION_LOSS_REGISTRY",
    "Padding",
    "PixelFormat",
    "Position",
    "PositionFeatures",
    "PositionLoss",
    "Teacher",
    "TeacherNetwork",
    "TeacherOptions",
    "absolute_max_pooling",
    "activation_boundary",
    "attention_transfer",
    "bernoulli_logit_loss",
    "box_mask",
    "channel_wise_kl",
    "distillation_features",
    "ends_in_activation",
    "flow_of_solution",
    "fsp_matrix",
    "is_distillation_loss",
    "negative_margin",
    "partial_l2",
    "pearson_distance",
    "plain_l2",
    "random_drop",
    "register_position_loss",
    "score_mask",
    "sigmoid_logit_loss",
    "softmax_logit_loss",
    "sparse_matching",
    "weighted_giou_loss",
]
