"""Accuracy of one label a sample: actions, choices, matching."""

from __future__ import annotations

from collections.abc import Sequence

from crab_edge.tasks.metrics.base import Figure, Metric, Sample, label_of, majority, percent


def right(sample: Sample) -> float:
    """1.0 when the first predicted label is the truth's, both normalised."""
    truth = label_of(sample.truth)
    return float(truth is not None and label_of(sample.predicted) == truth)


def accuracy(samples: Sequence[Sample], name: str = "accuracy") -> Figure:
    """Share of right labels, beside always saying the most frequent one."""
    truths = [label_of(sample.truth) or "" for sample in samples]
    label, count = majority(truths)
    return Figure(
        name=name,
        value=percent(sum(map(right, samples)), len(samples)),
        n=len(samples),
        baseline=percent(count, len(samples)),
        baseline_name=f"majority class ({label})",
        classes=len(set(truths)),
    )


METRICS = (Metric("accuracy", lambda samples: [accuracy(samples)], right, "accuracy"),)
