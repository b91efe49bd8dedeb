"""Channel matching: the cost between student and teacher channels, and its optimal assignment.

Pure functions of tensors, without Detectron2's classes, so that they serve any network.
"""

from mgd_det.matching.assignment import assign_channels, matched_cost
from mgd_det.matching.cost import ChannelCost

__all__ = ["ChannelCost", "assign_channels", "matched_cost"]
