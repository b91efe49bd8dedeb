"""Pictures of training runs, predictions and channel matchings, written as PNG."""

from mgd_det.visualization.curves import detection_loss, plot_curves, read_metrics
from mgd_det.visualization.matching import MatchedPosition, plot_matched_channels, plot_matching, spread_channels
from mgd_det.visualization.predictions import draw_objects, draw_predictions

__all__ = [
    "MatchedPosition",
    "detection_loss",
    "draw_objects",
    "draw_predictions",
    "plot_curves",
    "plot_matched_channels",
    "plot_matching",
    "read_metrics",
    "spread_channels",
]
