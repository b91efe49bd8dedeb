"""Means over seeds, and differences between trainings that share a seed."""

import math
from dataclasses import dataclass
from typing import Mapping, Optional, Sequence

import numpy as np
from scipy.stats import ttest_rel


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        error: its standard error, the sample's standard deviation / sqrt(n); None for one seed.
        n: number of seeds.
    """

    value: float
    error: Optional[float]
    n: int


@dataclass(frozen=True)
class PairedDifference:
    """The mean of differences between two arms, taken seed by seed.

    Attributes:
        mean: of the differences.
        p: probability of so large a difference in either direction if there were none (paired t-test); None if the
            pairs do not allow to tell: fewer than two, or all differences equal.
    """

    mean: Mean
    p: Optional[float]


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """Return the mean of the values, which must not be empty, and its standard error."""
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    return Mean(float(array.mean()), error, len(array))


def paired_difference(of: Mapping[int, float], against: Mapping[int, float]) -> Optional[PairedDifference]:
    """Compare two arms on the seeds that both have.

    Args:
        of, against: score by seed.

    Returns:
        ``of`` - ``against``, or None if they have no seed in common.
    """
    seeds = sorted(set(of) & set(against))
    if not seeds:
        return None
    pairs = np.array([(of[seed], against[seed]) for seed in seeds], dtype=np.float64)
    difference = mean_over_seeds((pairs[:, 0] - pairs[:, 1]).tolist())
    if not difference.error:
        return PairedDifference(difference, None)
    p = float(ttest_rel(pairs[:, 0], pairs[:, 1]).pvalue)
    return PairedDifference(difference, p if math.isfinite(p) else None)
