"""What distillation costs: the functions that :mod:`mgd_det.cli.benchmark` measures, and how it measures."""

from mgd_det.benchmark.measures import Spread, interleaved, peak_bytes, ratio
from mgd_det.benchmark.naive import naive_partial_l2
from mgd_det.benchmark.step import DistillationBenchmark

__all__ = ["DistillationBenchmark", "Spread", "interleaved", "naive_partial_l2", "peak_bytes", "ratio"]
