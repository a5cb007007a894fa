"""Boxes of the sounding object: cIoU in the sound-localisation sense, AUC, and the label beside them.

cIoU here is the share of samples whose box has IoU >= 0.5 with the true one, not the "Complete IoU" loss of
detection. AUC is the area under the success rate over IoU thresholds 0, 0.05, ... 1 (trapezoids), in percent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crab_edge.results import Box
from crab_edge.tasks.base import FRAME_SIDE
from crab_edge.tasks.metrics.base import Figure, Metric, Sample
from crab_edge.tasks.metrics.labels import accuracy, right

Corners = NDArray[np.float64]
_THRESHOLDS = np.linspace(0, 1, 21)


def ious(first: Corners, second: Corners) -> NDArray[np.float64]:
    """IoU of boxes [..., 4] (left, top, right, bottom), broadcast; 0 for boxes without area."""
    low = np.maximum(first[..., :2], second[..., :2])
    high = np.minimum(first[..., 2:], second[..., 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    area = [np.prod(np.clip(box[..., 2:] - box[..., :2], 0, None), axis=-1) for box in (first, second)]
    union = area[0] + area[1] - shared
    return np.where(union > 0, shared / np.where(union > 0, union, 1), 0.0)


def _corners(sample_results: Sequence[object]) -> Corners | None:
    for result in sample_results:
        if isinstance(result, Box):
            return np.array([result.x1, result.y1, result.x2, result.y2], dtype=np.float64)
    return None


def box_iou(sample: Sample) -> float:
    """IoU of the first predicted box with the first true one; 0 without a prediction."""
    predicted, truth = _corners(sample.predicted), _corners(sample.truth)
    return 0.0 if predicted is None or truth is None else float(ious(predicted, truth))


def area_under_success(values: NDArray[np.float64]) -> float:
    """Area under the share of values >= t, for t = 0, 0.05, ... 1, in 0..1."""
    rates = (values[:, None] >= _THRESHOLDS - 1e-9).mean(0)
    return float(((rates[1:] + rates[:-1]) / 2 * np.diff(_THRESHOLDS)).sum())


def best_constant_box(truth: Corners) -> Corners:
    """The box [4] that, said of every picture, has IoU >= 0.5 with most of the true boxes [n, 4].

    Tries every true box and every box on a grid of 14 pixels, then moves its sides in small steps while that
    helps; ties go to the higher mean IoU.
    """
    lines = np.arange(0, FRAME_SIDE + 1, 14, dtype=np.float64)
    pairs = np.array([(low, high) for low in lines for high in lines if low < high])
    across, down = np.repeat(pairs, len(pairs), axis=0), np.tile(pairs, (len(pairs), 1))
    grid = np.stack([across[:, 0], down[:, 0], across[:, 1], down[:, 1]], axis=1)
    best = _best_of(np.concatenate([truth, grid]), truth)
    steps = np.concatenate([np.eye(4) * move for move in (7.0, -7.0, 3.0, -3.0, 1.0, -1.0)])
    for _ in range(50):
        tried = np.concatenate([best[0][None], best[0] + steps])
        better = _best_of(np.clip(tried, 0, FRAME_SIDE), truth)
        if better[1] <= best[1]:
            break
        best = better
    return best[0]


def _best_of(candidates: Corners, truth: Corners) -> tuple[Corners, tuple[float, float]]:
    best: tuple[Corners, tuple[float, float]] = (candidates[0], (-1.0, -1.0))
    for chunk in np.array_split(candidates, max(1, len(candidates) * len(truth) // 500_000)):
        values = ious(chunk[:, None], truth[None])
        shares, means = (values >= 0.5).mean(1), values.mean(1)
        at = int(np.lexsort((means, shares))[-1])
        score = (float(shares[at]), float(means[at]))
        if score > best[1]:
            best = (chunk[at], score)
    return best


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    values = np.array([box_iou(sample) for sample in samples])
    truth = np.stack([box for sample in samples if (box := _corners(sample.truth)) is not None])
    constant = best_constant_box(truth)
    trivial = ious(constant, truth)
    x1, y1, x2, y2 = constant
    named = f"best constant box ({x1:.0f},{y1:.0f})({x2:.0f},{y2:.0f})"
    labels = accuracy(samples, "label top-1")
    n, classes = len(samples), labels.classes
    share, trivial_share = 100 * float((values >= 0.5).mean()), 100 * float((trivial >= 0.5).mean())
    area, trivial_area = 100 * area_under_success(values), 100 * area_under_success(trivial)
    return [
        labels,
        Figure("cIoU (share IoU >= 0.5)", share, n, trivial_share, named, classes),
        Figure("AUC", area, n, trivial_area, named, classes),
    ]


def _score(sample: Sample) -> float:
    return (right(sample) + float(box_iou(sample) >= 0.5)) / 2


METRICS = (Metric("grounding", _figures, _score, "mean of label top-1 and IoU >= 0.5"),)
