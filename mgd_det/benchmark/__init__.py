"""Measuring what distillation costs: parts of tools/benchmark.py."""

from mgd_det.benchmark.measures import Measure, interleaved, peak_bytes
from mgd_det.benchmark.naive import naive_partial_l2
from mgd_det.benchmark.step import DistillationBenchmark

__all__ = ["DistillationBenchmark", "Measure", "interleaved", "naive_partial_l2", "peak_bytes"]
