"""From predictions to figures: parses what a model said, scores it, counts what didn't parse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crab_edge.results import Unparsed
from crab_edge.tasks import metrics
from crab_edge.tasks.base import Bar, MediaContext, Parsed, Task
from crab_edge.tasks.metrics import Figure, Sample, whole_seconds


@dataclass(frozen=True)
class Prediction:
    """What a model said about a record. `text` None: the run failed there, which counts as a wrong answer.

    `parsed` overrides the text where the text alone isn't enough: answers of clips cut into several windows.
    """

    truth: Parsed
    text: str | None
    record: Mapping[str, Any]
    duration_s: float = 10.0
    seconds: float = 0.0
    parsed: Parsed | None = None


@dataclass(frozen=True)
class Line:
    """A figure with what it must reach."""

    figure: Figure
    bar: Bar | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        return None if self.bar is None else self.bar.met(self.figure.value, self.figure.baseline)


@dataclass(frozen=True)
class SplitScore:
    """All figures of one task on one list. `unparsable`: percent of answers of which a part didn't parse."""

    task: str
    split: str
    lines: tuple[Line, ...]
    scores: tuple[float, ...]
    score_name: str
    n: int
    errors: int
    unparsable: float
    seconds_per_sample: float


def sample_of(task: Task, prediction: Prediction) -> Sample:
    """Truth and prediction in the model's own coordinates."""
    if prediction.text is None:
        parsed: Parsed = (Unparsed("no answer"),)
    elif prediction.parsed is not None:
        parsed = prediction.parsed
    else:
        parsed = task.parse(prediction.text, MediaContext(duration_s=prediction.duration_s))
    return Sample(prediction.truth, parsed, whole_seconds(prediction.duration_s), prediction.record)


def score(task: Task, predictions: Sequence[Prediction], variant: str = "") -> SplitScore:
    """The task's metric over all predictions (at least one). `variant` picks bars named `figure@variant`."""
    metric = metrics.get(task.metric)
    samples = [sample_of(task, prediction) for prediction in predictions]
    told = [s for s, p in zip(samples, predictions, strict=True) if p.text is not None]
    broken = sum(any(isinstance(result, Unparsed) for result in sample.predicted) for sample in told)
    timed = [prediction.seconds for prediction in predictions if prediction.text is not None]
    lines = []
    for figure in metric.figures(samples):
        key = f"{figure.name}@{variant}" if variant else figure.name
        lines.append(Line(figure, task.bars.get(key)))
    return SplitScore(
        task=task.name,
        split=f"test_{variant}" if variant else "test",
        lines=tuple(lines),
        scores=tuple(metric.score(sample) for sample in samples),
        score_name=metric.score_name,
        n=len(samples),
        errors=len(samples) - len(told),
        unparsable=100.0 * broken / len(told) if told else 0.0,
        seconds_per_sample=sum(timed) / len(timed) if timed else 0.0,
    )
