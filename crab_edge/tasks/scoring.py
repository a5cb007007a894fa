"""From predictions to figures: parses what a model said, scores it, counts what didn't parse."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge.results import Mask, MaskFile, Unparsed
from crab_edge.tasks import metrics
from crab_edge.tasks.base import Bar, MediaContext, Parsed, Task
from crab_edge.tasks.metrics import Figure, Sample, whole_seconds


@dataclass(frozen=True)
class Prediction:
    """What a model said about a record. `text` None: the run failed there, which counts as a wrong answer.

    `parsed` overrides the text where the text alone isn't enough: answers of clips cut into several windows.
    `masks` were made from the answer's box and points; `folder` is where the truth's mask files lie.
    """

    truth: Parsed
    text: str | None
    record: Mapping[str, Any]
    duration_s: float = 10.0
    seconds: float = 0.0
    parsed: Parsed | None = None
    masks: tuple[Mask, ...] = ()
    folder: Path | None = None
    held: bool = False
    """The task's form chose a part of the text, not the model."""


@dataclass(frozen=True)
class Line:
    """A figure with what it must reach and what was published for the official list, if anything."""

    figure: Figure
    bar: Bar | None = None
    published: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the bar is reached; None without a bar."""
        return None if self.bar is None else self.bar.met(self.figure.value, self.figure.baseline)


@dataclass(frozen=True)
class SplitScore:
    """All figures of one task on one list. `unparsable`: percent of answers of which a part didn't parse.

    `held`: percent of answers that left their task's form and were held to it. `seconds_per_sample` is 0
    where nobody took the time. `mask_tools`: what made the answers' masks.
    """

    task: str
    split: str
    lines: tuple[Line, ...]
    scores: tuple[float, ...]
    score_name: str
    n: int
    errors: int
    unparsable: float
    seconds_per_sample: float
    held: float = 0.0
    mask_tools: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedFigure:
    """A published value that `name` of a task's table is to be seen beside."""

    name: str
    value: float
    dataset: str
    source: str


def published(task: Task) -> list[PublishedFigure]:
    """The published figures that the task declares, in its order."""
    declared = getattr(task, "published", ())
    return [PublishedFigure(item.figure, item.value, item.dataset, item.source) for item in declared]


def same_figure(first: str, second: str) -> bool:
    """Whether two names mean one figure: "weighted F1" is "weighted-f1"."""
    return _plain(first) == _plain(second)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9@]+", "", name.lower())


def parsed_of(task: Task, prediction: Prediction) -> Parsed:
    """The prediction's results in the model's own coordinates, its masks last."""
    if prediction.text is None:
        return (Unparsed("no answer"),)
    parsed = prediction.parsed
    if parsed is None:
        parsed = task.parse(prediction.text, MediaContext(duration_s=prediction.duration_s))
    return (*parsed, *prediction.masks)


def sample_of(task: Task, prediction: Prediction) -> Sample:
    """Truth and prediction in the model's own coordinates; InputError when a true mask can't be read."""
    truth = tuple(
        _read_mask(result, prediction.folder) if isinstance(result, MaskFile) else result
        for result in prediction.truth
    )
    seconds = whole_seconds(prediction.duration_s)
    return Sample(truth, parsed_of(task, prediction), seconds, prediction.record)


def _read_mask(file: MaskFile, folder: Path | None) -> Mask:
    # Pictures are opened where masks are scored only.
    from crab_edge import masks
    from crab_edge.tasks.base import FRAME_SIDE

    path = masks.located(file.path, folder)
    bits = masks.resized_bits(masks.read(path), FRAME_SIDE, FRAME_SIDE)
    return masks.from_bits(bits, file.label, "truth")


def score(task: Task, predictions: Sequence[Prediction], variant: str = "") -> SplitScore:
    """The task's metric over all predictions (at least one). `variant` picks bars named `figure@variant`."""
    metric = metrics.get(task.metric)
    samples = [sample_of(task, prediction) for prediction in predictions]
    told = [s for s, p in zip(samples, predictions, strict=True) if p.text is not None]
    broken = sum(any(isinstance(result, Unparsed) for result in sample.predicted) for sample in told)
    timed = [prediction.seconds for prediction in predictions if prediction.text is not None]
    known = published(task)
    lines = []
    for figure in metric.figures(samples):
        key = f"{figure.name}@{variant}" if variant else figure.name
        value = next((item.value for item in known if same_figure(item.name, key)), None)
        lines.append(Line(figure, task.bars.get(key), value))
    return SplitScore(
        task=task.name,
        split=f"test_{variant}" if variant else "test",
        lines=tuple(lines),
        scores=tuple(metric.score(sample) for sample in samples),
        score_name=metric.score_name,
        n=len(samples),
        errors=len(samples) - len(told),
        unparsable=100.0 * broken / len(told) if told else 0.0,
        held=100.0 * sum(prediction.held for prediction in predictions) / len(told) if told else 0.0,
        seconds_per_sample=sum(timed) / len(timed) if timed else 0.0,
        mask_tools=tuple(sorted({mask.source for prediction in predictions for mask in prediction.masks})),
    )
