"""What metrics take and give: samples with truth and prediction in, figures with trivial baselines out."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crab_edge.results import Box, Caption, Choice, Event, Result
from crab_edge.tasks.text import NUMBER_WORDS

#: Official clips have ten one-second segments.
SEGMENTS = 10
#: A clip that misses a whole second by less than this still has it (containers round durations).
_SHORT_BY_S = 0.25


@dataclass(frozen=True)
class Sample:
    """One test record with its prediction, both in the model's own coordinates (seconds, 224x224 pixels).

    `seconds` is the number of whole seconds of the clip, 1..10: the segments that are scored.
    """

    truth: tuple[Result, ...]
    predicted: tuple[Result, ...]
    seconds: int = SEGMENTS
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """One line of a results table. `value` and `baseline` are percentages, or `unit` says otherwise."""

    name: str
    value: float
    n: int
    baseline: float | None = None
    baseline_name: str = ""
    classes: int | None = None
    unit: str = "%"


@dataclass(frozen=True)
class Metric:
    """Figures of many samples, and each sample's own score in 0..1 for paired comparisons.

    `needs_masks`: truth and prediction must hold a `Mask` where there is an object.
    """

    name: str
    figures: Callable[[Sequence[Sample]], list[Figure]]
    score: Callable[[Sample], float]
    score_name: str
    needs_masks: bool = False


def whole_seconds(duration_s: float) -> int:
    """The scored segments of a clip: its whole seconds (0.25 s short of one still counts), 1..10."""
    return max(1, min(SEGMENTS, int(duration_s + _SHORT_BY_S)))


def normalised(text: str) -> str:
    """A label or answer for comparison: lower case, no article, no punctuation, numbers as digits."""
    words = re.sub(r"[^\w+#]+", " ", text.lower().replace("_", " ")).split()
    if len(words) > 1 and words[0] in ("a", "an", "the"):
        words = words[1:]
    return " ".join(str(NUMBER_WORDS[word]) if word in NUMBER_WORDS else word for word in words)


def label_of(results: Iterable[Result]) -> str | None:
    """The normalised label of the first typed result, or None."""
    for result in results:
        if isinstance(result, (Event, Box)) and result.label:
            return normalised(result.label)
        if isinstance(result, Choice):
            return normalised(result.value)
        if isinstance(result, Caption):
            return normalised(result.text)
    return None


def majority(values: Iterable[str]) -> tuple[str, int]:
    """The most frequent value and its count; ties go to the first in alphabetical order."""
    counts = Counter(values)
    if not counts:
        return "", 0
    best = min(counts, key=lambda value: (-counts[value], value))
    return best, counts[best]


def percent(part: float, whole: float) -> float:
    """100 * part / whole; 0 for nothing."""
    return 100.0 * part / whole if whole else 0.0
