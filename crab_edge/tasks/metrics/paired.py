"""Small differences between two runs over the same samples: paired, pooled over tasks, bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Difference:
    """first - second, in points (0..100): the mean and its interval."""

    points: float
    low: float
    high: float
    n: int
    first: float
    second: float


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, level: float = 0.95, rounds: int = 5000, seed: int = 0
) -> Difference:
    """Percentile bootstrap over samples of the mean of first - second; scores in 0..1, in the same order."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"expected two equally long lists of scores, got shapes {a.shape} and {b.shape}")
    if not len(a):
        raise ValueError("expected at least one pair of scores")
    gap = 100 * (a - b)
    rng = np.random.default_rng(seed)
    means = np.array([gap[rng.integers(0, len(gap), len(gap))].mean() for _ in range(rounds)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    mean_a, mean_b = 100 * float(a.mean()), 100 * float(b.mean())
    return Difference(float(gap.mean()), float(low), float(high), len(gap), mean_a, mean_b)
