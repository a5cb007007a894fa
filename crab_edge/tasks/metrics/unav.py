"""UnAV: untrimmed clips with many events, scored as temporal detection at temporal IoU thresholds.

The official figure of UnAV-100 is mAP over tIoU 0.1, 0.2 ... 0.9 of detections ranked by confidence. An
answer in words has no confidences, so all its events tie: each class has one operating point, and its
interpolated AP is precision x recall there. That is what stands here as mAP; it is a lower bound, not the
detectors' figure. F1 needs no ranking and stands beside it. AV-UIE v2 uses UnAV for training only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from crab_edge.results import Event, Result
from crab_edge.tasks.metrics.base import Figure, Metric, Sample, normalised

THRESHOLDS = tuple(round(0.1 * k, 1) for k in range(1, 10))
Spans = dict[str, list[tuple[float, float]]]


def spans(results: Iterable[Result]) -> Spans:
    """Normalised label -> its (start, end) in seconds; the same span said twice counts once."""
    found: Spans = defaultdict(list)
    for event in results:
        if isinstance(event, Event):
            span = (event.start_s, event.end_s)
            if span not in found[normalised(event.label)]:
                found[normalised(event.label)].append(span)
    return found


def t_iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Temporal IoU of two spans."""
    shared = min(first[1], second[1]) - max(first[0], second[0])
    return max(0.0, shared) / (max(first[1], second[1]) - min(first[0], second[0]))


def matches(
    said: Sequence[tuple[float, float]], truth: Sequence[tuple[float, float]], threshold: float
) -> int:
    """Number of one-to-one pairs with tIoU >= threshold, the best pairs first."""
    pairs = sorted(
        ((t_iou(a, b), i, j) for i, a in enumerate(said) for j, b in enumerate(truth)), reverse=True
    )
    used: tuple[set[int], set[int]] = (set(), set())
    for value, i, j in pairs:
        if value >= threshold - 1e-9 and i not in used[0] and j not in used[1]:
            used[0].add(i)
            used[1].add(j)
    return len(used[0])


def counts(samples: Sequence[Sample], threshold: float) -> dict[str, tuple[int, int, int]]:
    """Class -> (matched, predicted, true) events over all samples."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for sample in samples:
        said, truth = spans(sample.predicted), spans(sample.truth)
        for label in {*said, *truth}:
            own = said.get(label, []), truth.get(label, [])
            row = total[label]
            row[0] += matches(*own, threshold)
            row[1] += len(own[0])
            row[2] += len(own[1])
    return {label: (row[0], row[1], row[2]) for label, row in total.items()}


def mean_ap(samples: Sequence[Sample], threshold: float) -> float:
    """Mean over the truth's classes of precision x recall, 0..1."""
    each = [
        (hit / told) * (hit / true) if told else 0.0
        for hit, told, true in counts(samples, threshold).values()
        if true
    ]
    return float(np.mean(each)) if each else 0.0


def f1(samples: Sequence[Sample], threshold: float = 0.5) -> float:
    """F1 of all events together, 0..1; 1 when neither truth nor prediction has any."""
    rows = counts(samples, threshold).values()
    hit, told, true = (sum(row[k] for row in rows) for k in range(3))
    return 2 * hit / (told + true) if told + true else 1.0


def _constant(samples: Sequence[Sample]) -> tuple[Event, ...]:
    """The most frequent label over the whole clip: the usual trivial detector."""
    truths = [spans(sample.truth) for sample in samples]
    labels = sorted({label for truth in truths for label in truth})
    if not labels:
        return ()
    end = max(end for truth in truths for own in truth.values() for _, end in own)
    most = max(labels, key=lambda label: sum(label in truth for truth in truths))
    return (Event(most, 0.0, end, "audio-visual"),)


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    constant = _constant(samples)
    same = [Sample(sample.truth, constant, sample.seconds, sample.record) for sample in samples]
    named = "; ".join(f"{e.label} ({e.start_s:g} {e.end_s:g})" for e in constant) or "nothing"
    named = f"most frequent event over the longest time ({named})"
    classes, n = len({label for sample in samples for label in spans(sample.truth)}), len(samples)

    def figure(name: str, value: float, baseline: float) -> Figure:
        return Figure(name, 100 * value, n, 100 * baseline, named, classes)

    average = [float(np.mean([mean_ap(part, t) for t in THRESHOLDS])) for part in (samples, same)]
    return [
        figure("event F1@0.5", f1(samples), f1(same)),
        figure("mAP@0.5 (unranked)", mean_ap(samples, 0.5), mean_ap(same, 0.5)),
        figure("mAP@0.1:0.9 (unranked)", average[0], average[1]),
    ]


METRICS = (Metric("unav", _figures, lambda sample: f1([sample]), "event F1@0.5"),)
