"""AVE: ten one-second segments, each a class or background."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from crab_edge.results import Event, Result
from crab_edge.tasks.metrics.base import SEGMENTS, Figure, Metric, Sample, majority, normalised, percent


def segment_labels(results: Iterable[Result], seconds: int) -> list[str | None]:
    """The label of each one-second segment, None for background.

    Segment k has the first event in the order of the text with start <= k < end (official rule).
    """
    labels: list[str | None] = [None] * seconds
    for event in results:
        if isinstance(event, Event):
            for k in range(seconds):
                if labels[k] is None and event.start_s <= k < event.end_s:
                    labels[k] = normalised(event.label)
    return labels


def segment_score(sample: Sample) -> float:
    """Share of the clip's segments that are right; the wrong class in range is wrong."""
    truth = segment_labels(sample.truth, sample.seconds)
    predicted = segment_labels(sample.predicted, sample.seconds)
    return sum(a == b for a, b in zip(truth, predicted, strict=True)) / sample.seconds


def best_constant_event(samples: Sequence[Sample]) -> tuple[float, str]:
    """The best accuracy (percent of all segments) that one event, said of every clip, can reach; its name.

    Tries every range for the label that fills most segments, and saying nothing (all background).
    """
    truths = [segment_labels(sample.truth, sample.seconds) for sample in samples]
    total = sum(map(len, truths))
    label, _ = majority(value for truth in truths for value in truth if value is not None)
    as_label, as_nothing = np.zeros(SEGMENTS, int), np.zeros(SEGMENTS, int)
    for truth in truths:
        for k, value in enumerate(truth):
            as_label[k] += value == label
            as_nothing[k] += value is None
    best, name = int(as_nothing.sum()), "always background"
    for start in range(SEGMENTS):
        for end in range(start + 1, SEGMENTS + 1):
            right = as_label[start:end].sum() + as_nothing[:start].sum() + as_nothing[end:].sum()
            if right > best:
                best, name = int(right), f"always {label}, ({start} {end})"
    return percent(best, total), name


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    total = sum(sample.seconds for sample in samples)
    right = sum(round(segment_score(sample) * sample.seconds) for sample in samples)
    baseline, name = best_constant_event(samples)
    classes = {normalised(event.label) for s in samples for event in s.truth if isinstance(event, Event)}
    return [
        Figure("segment accuracy", percent(right, total), len(samples), baseline, name, len(classes)),
    ]


METRICS = (Metric("ave-segments", _figures, segment_score, "segment accuracy"),)
