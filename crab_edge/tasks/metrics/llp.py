"""AVVP on LLP: segment- and event-level F of audio, visual and audio-visual events, official averaging.

Per video and class, TP, FP and FN are counted; F = 2TP / (2TP + FP + FN) is averaged over the classes that
truth or prediction has (1.0 when neither has any), then over videos. "Event" pools the counts of audio and
visual per class before F; "Type" is the mean of the audio, visual and audio-visual scores. The official lists
have 25 classes; here the classes are those that occur, so a label outside the list counts as a false class.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab_edge.results import Event, Modality, Result
from crab_edge.tasks.metrics.base import Figure, Metric, Sample, normalised

Grid = NDArray[np.bool_]
#: Order of the scores in every array here.
NAMES = ("A", "V", "AV", "Type@AV", "Event@AV")
#: Rows of [audio, visual] that an event of a modality fills.
_STREAMS: dict[tuple[int, ...], Modality] = {(0, 1): "audio-visual", (0,): "audio", (1,): "visual"}


@dataclass(frozen=True)
class Grids:
    """What is heard and seen: bool [classes, seconds] each."""

    audio: Grid
    visual: Grid

    @property
    def both(self) -> Grid:
        """Heard and seen in the same second."""
        return self.audio & self.visual


def grids(results: Iterable[Result], classes: Sequence[str], seconds: int) -> Grids:
    """Events -> grids; second k is covered when start <= k < end. `classes` are normalised labels."""
    index = {label: row for row, label in enumerate(classes)}
    audio, visual = np.zeros((2, len(classes), seconds), dtype=bool)
    k = np.arange(seconds)
    for event in results:
        if isinstance(event, Event) and normalised(event.label) in index:
            covered = (event.start_s <= k) & (k < event.end_s)
            row = index[normalised(event.label)]
            if event.modality != "visual":
                audio[row] |= covered
            if event.modality != "audio":
                visual[row] |= covered
    return Grids(audio, visual)


def classes_of(*results: Iterable[Result]) -> list[str]:
    """The normalised labels that occur, sorted."""
    return sorted({normalised(event.label) for part in results for event in part if isinstance(event, Event)})


def segment_counts(predicted: Grid, truth: Grid) -> NDArray[np.int64]:
    """int64 [3, classes]: TP, FP, FN over the seconds."""
    return np.stack([(predicted & truth).sum(-1), (predicted & ~truth).sum(-1), (~predicted & truth).sum(-1)])


def runs(row: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Runs of covered seconds as (start, end), end exclusive."""
    padded = np.diff(np.concatenate([[0], row.astype(np.int8), [0]]))
    return list(zip(np.flatnonzero(padded == 1).tolist(), np.flatnonzero(padded == -1).tolist(), strict=True))


def _meets(event: tuple[int, int], others: Sequence[tuple[int, int]]) -> bool:
    for other in others:
        shared = min(event[1], other[1]) - max(event[0], other[0])
        if shared > 0 and shared >= 0.5 * (max(event[1], other[1]) - min(event[0], other[0])):
            return True
    return False


def event_counts(predicted: Grid, truth: Grid) -> NDArray[np.int64]:
    """int64 [3, classes]: TP, FP, FN over events.

    A predicted event that has IoU >= 0.5 with any true one is a TP, else an FP; a true event that no
    predicted one meets is an FN. Not one-to-one, as in the official script.
    """
    counts = np.zeros((3, len(truth)), dtype=np.int64)
    for row in range(len(truth)):
        said, true = runs(predicted[row]), runs(truth[row])
        hits = sum(_meets(event, true) for event in said)
        counts[:, row] = hits, len(said) - hits, sum(not _meets(event, said) for event in true)
    return counts


def class_mean_f(counts: NDArray[np.int64]) -> float:
    """Mean F over the classes that truth or prediction has; 1.0 when there is none."""
    tp, fp, fn = counts
    present = (tp + fp + fn) > 0
    if not present.any():
        return 1.0
    return float(np.mean(2 * tp[present] / (2 * tp + fp + fn)[present]))


def video_scores(sample: Sample, level: str = "segment") -> NDArray[np.float64]:
    """One video's scores in 0..1, float64 [5] in the order of `NAMES`; level "segment" or "event"."""
    classes = classes_of(sample.truth, sample.predicted)
    truth = grids(sample.truth, classes, sample.seconds)
    predicted = grids(sample.predicted, classes, sample.seconds)
    count = segment_counts if level == "segment" else event_counts
    audio = count(predicted.audio, truth.audio)
    visual = count(predicted.visual, truth.visual)
    each = [class_mean_f(audio), class_mean_f(visual), class_mean_f(count(predicted.both, truth.both))]
    return np.array([*each, sum(each) / 3, class_mean_f(audio + visual)])


def best_constant_events(samples: Sequence[Sample], most: int = 6) -> tuple[Event, ...]:
    """The constant answer that greedily maximises segment-level Type@AV on these samples' truth.

    Starting from an empty answer, adds the event (any true class; heard, seen or both; any range of whole
    seconds) that helps most, until none does or `most` are chosen.
    """
    search = _ConstantSearch(samples)
    chosen: list[Event] = []
    while len(chosen) < most:
        event = search.step()
        if event is None:
            break
        chosen.append(event)
    return tuple(chosen)


class _ConstantSearch:
    """Keeps TP, FP, FN of every video and class, so that trying an event touches one class only."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.classes = classes_of(*(sample.truth for sample in samples))
        self.length = max((sample.seconds for sample in samples), default=0)
        n, width = len(samples), len(self.classes)
        self.valid = np.zeros((n, self.length), dtype=bool)
        self.truth = np.zeros((2, n, width, self.length), dtype=bool)
        for i, sample in enumerate(samples):
            own = grids(sample.truth, self.classes, sample.seconds)
            self.truth[:, i, :, : sample.seconds] = own.audio, own.visual
            self.valid[i, : sample.seconds] = True
        self.said = np.zeros((2, width, self.length), dtype=bool)
        # Per score (A, V, AV): sum of F over present classes and their number, [3, n, width].
        self.f = np.zeros((3, n, width))
        self.present = np.zeros((3, n, width), dtype=bool)
        for row in range(width):
            self.f[:, :, row], self.present[:, :, row] = self._class(row, self.said[:, row])
        self.best = self._total(self.f.sum(2), self.present.sum(2))

    def _class(self, row: int, said: Grid) -> tuple[NDArray[np.float64], Grid]:
        truth = self.truth[:, :, row]
        truth = np.concatenate([truth, truth[:1] & truth[1:]])
        told = np.concatenate([said, said[:1] & said[1:]])[:, None] & self.valid
        tp = (told & truth).sum(-1)
        wrong = (told ^ truth).sum(-1)
        present = (tp + wrong) > 0
        return np.where(present, 2 * tp / np.maximum(2 * tp + wrong, 1), 0.0), present

    @staticmethod
    def _total(f: NDArray[np.float64], present: NDArray[np.int64]) -> float:
        return float(np.where(present > 0, f / np.maximum(present, 1), 1.0).mean()) if f.size else 1.0

    def step(self) -> Event | None:
        all_f, all_present = self.f.sum(2), self.present.sum(2)
        best, found = self.best + 1e-12, None
        for row in range(len(self.classes)):
            rest_f, rest_present = all_f - self.f[:, :, row], all_present - self.present[:, :, row]
            for start in range(self.length):
                for end in range(start + 1, self.length + 1):
                    for streams in _STREAMS:
                        said = self.said[:, row].copy()
                        said[list(streams), start:end] = True
                        f, present = self._class(row, said)
                        total = self._total(rest_f + f, rest_present + present)
                        if total > best:
                            best, found = total, (row, start, end, streams, said, f, present)
        if found is None:
            return None
        row, start, end, streams, said, f, present = found
        self.best, self.said[:, row] = best, said
        self.f[:, :, row], self.present[:, :, row] = f, present
        return Event(self.classes[row], float(start), float(end), _STREAMS[streams])


def _figures(samples: Sequence[Sample]) -> list[Figure]:
    constant = best_constant_events(samples)
    named = "; ".join(f"{e.label} {e.modality} ({e.start_s:g} {e.end_s:g})" for e in constant) or "nothing"
    same = [Sample(s.truth, constant, s.seconds, s.record) for s in samples]
    classes = len(classes_of(*(sample.truth for sample in samples)))
    figures = []
    for level in ("segment", "event"):
        ours = 100 * np.mean([video_scores(sample, level) for sample in samples], axis=0)
        trivial = 100 * np.mean([video_scores(sample, level) for sample in same], axis=0)
        for name, value, baseline in zip(NAMES, ours, trivial, strict=True):
            figures.append(
                Figure(
                    f"{level} {name}",
                    float(value),
                    len(samples),
                    float(baseline),
                    f"best constant event set ({named})",
                    classes,
                )
            )
    return figures


def _score(sample: Sample) -> float:
    return float(video_scores(sample)[3])


METRICS = (Metric("llp", _figures, _score, "segment Type@AV"),)
