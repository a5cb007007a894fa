"""One label a sample: accuracy (actions, matching, choices), weighted F1 (MELD), WAR and UAR (DFEW, MAFW).

Labels are compared exactly after `normalised`. An answer that doesn't parse, or names no class of the
truth, is wrong. Where a record lists its options (AVQA: `multi_choice`), an answer may be an option's text
or its letter, and the truth its text or its index from 0.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from crab_edge.tasks.metrics.base import Figure, Metric, Sample, label_of, majority, normalised, percent

_LETTERS = "abcdefgh"


def options_of(record: Mapping[str, Any]) -> list[str]:
    """The normalised options of a multiple-choice record, given as a list or its text; [] for others."""
    given = record.get("multi_choice")
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given)
        except (ValueError, SyntaxError):
            return []
    return [normalised(str(option)) for option in given] if isinstance(given, list | tuple) else []


def truth_label(sample: Sample) -> str | None:
    """The true label; an index into the record's options stands for that option."""
    label, options = label_of(sample.truth), options_of(sample.record)
    if label is not None and label not in options and label.isdigit() and int(label) < len(options):
        return options[int(label)]
    return label


def said_label(sample: Sample) -> str | None:
    """The predicted label; the letter of one of the record's options stands for it ("b", "b dog")."""
    label, options = label_of(sample.predicted), options_of(sample.record)
    if not label or not options or label in options:
        return label
    letter, _, rest = label.partition(" ")
    place = _LETTERS.find(letter) if len(letter) == 1 else -1
    return options[place] if 0 <= place < len(options) and rest in ("", options[place]) else label


def right(sample: Sample) -> float:
    """1.0 when the first predicted label is the truth's."""
    truth = truth_label(sample)
    return float(truth is not None and said_label(sample) == truth)


def accuracy(samples: Sequence[Sample], name: str = "accuracy") -> Figure:
    """Share of right labels, beside always saying the most frequent one."""
    truths = [truth_label(sample) or "" for sample in samples]
    label, count = majority(truths)
    return Figure(
        name=name,
        value=percent(sum(map(right, samples)), len(samples)),
        n=len(samples),
        baseline=percent(count, len(samples)),
        baseline_name=f"majority class ({label})",
        classes=len(set(truths)),
    )


def weighted_f1(truths: Sequence[str], said: Sequence[str | None]) -> float:
    """Mean of the classes' F1 = 2TP / (2TP + FP + FN), weighted by how often the truth has them; 0..1.

    A prediction that is no class of the truth has no weight of its own, it costs its true class a FN.
    """
    support = Counter(truths)
    told = Counter(said)
    hits = Counter(truth for truth, label in zip(truths, said, strict=True) if truth == label)
    total = sum(n * 2 * hits[name] / (n + told[name]) for name, n in support.items())
    return total / len(truths) if truths else 0.0


def recalls(truths: Sequence[str], said: Sequence[str | None]) -> dict[str, float]:
    """Recall of every class that the truth has, 0..1."""
    support = Counter(truths)
    hits = Counter(truth for truth, label in zip(truths, said, strict=True) if truth == label)
    return {name: hits[name] / n for name, n in support.items()}


def _pairs(samples: Sequence[Sample]) -> tuple[list[str], list[str | None], Figure]:
    return [truth_label(s) or "" for s in samples], [said_label(s) for s in samples], accuracy(samples)


def _weighted_figures(samples: Sequence[Sample]) -> list[Figure]:
    """MELD's official figure first, then accuracy."""
    truths, said, plain = _pairs(samples)
    most, _ = majority(truths)
    trivial = 100 * weighted_f1(truths, [most] * len(truths))
    value = 100 * weighted_f1(truths, said)
    named = plain.baseline_name
    return [Figure("weighted F1", value, plain.n, trivial, named, plain.classes), plain]


def _war_uar_figures(samples: Sequence[Sample]) -> list[Figure]:
    """WAR, the weighted average recall, is accuracy; UAR is the plain mean of the classes' recalls."""
    truths, said, plain = _pairs(samples)
    each = recalls(truths, said)
    uar = 100 * sum(each.values()) / len(each)
    named = plain.baseline_name
    return [
        Figure("WAR", plain.value, plain.n, plain.baseline, named, plain.classes),
        Figure("UAR", uar, plain.n, 100 / len(each), named, plain.classes),
    ]


METRICS = (
    Metric("accuracy", lambda samples: [accuracy(samples)], right, "accuracy"),
    Metric("weighted-f1", _weighted_figures, right, "accuracy"),
    Metric("war-uar", _war_uar_figures, right, "accuracy"),
)
