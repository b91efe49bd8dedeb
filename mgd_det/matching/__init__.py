"""Channel matching: the cost between student and teacher channels, its optimal assignment, and the choice of channels.

Pure functions of tensors, without Detectron2's classes, so that they serve any network.
"""

from mgd_det.matching.assignment import assign_channels, matched_cost
from mgd_det.matching.channel_selection import Consumer, fold_dropped, select_channels
from mgd_det.matching.cost import ChannelCost
from mgd_det.matching.separable_factors import closest_separable

__all__ = [
    "ChannelCost",
    "Consumer",
    "assign_channels",
    "closest_separable",
    "fold_dropped",
    "matched_cost",
    "select_channels",
]
