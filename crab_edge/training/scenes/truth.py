"""What is true of a scene, said in words: the samples of every task that the scene supports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from crab_edge import tasks
from crab_edge.results import Box, Caption, Choice, Event
from crab_edge.training.scenes.facts import Truth, Vocabulary
from crab_edge.training.scenes.questions import questions


@dataclass(frozen=True)
class Sample:
    """One question and its answer. `metadata`: the fields of the AV-UIE v2 record except media paths."""

    task: str
    instruction: str
    answer: str
    lead: str
    metadata: dict[str, Any] = field(default_factory=dict)


def samples(truth: Truth, vocabulary: Vocabulary, random: np.random.Generator) -> list[Sample]:
    """All samples that the scene supports, the questions in random order."""
    out = []
    if truth.visual == "video" and truth.has_audio:
        out += [s for s in (_ave(truth), _avvp(truth), _avcap(truth)) if s]
    elif truth.visual == "video" or truth.visual is None:
        out += [s for s in (_avvp(truth), _avcap(truth)) if s]
    elif truth.has_audio:
        out += [s for s in (_arig(truth),) if s]
    asked = questions(truth, vocabulary, random)
    random.shuffle(asked)  # type: ignore[arg-type]
    return out + [_avqa(truth, *q) for q in asked]


def lead(truth: Truth, task: str) -> str:
    """The sentence before the media, by the task's own recipe."""
    definition = tasks.get(task)
    recipe = definition.media
    if truth.visual == "image" and not recipe.images:
        recipe = definition.still or tasks.get("arig").media
    return recipe.lead(truth.visual is not None, truth.has_audio)


def _sample(
    truth: Truth,
    task: str,
    results: Sequence[Any],
    metadata: dict[str, Any],
    question: str | None = None,
    answer: str | None = None,
) -> Sample:
    definition = tasks.get(task)
    text = answer if answer is not None else definition.render(results)
    return Sample(task, definition.prompt(question), text, lead(truth, task), metadata)


def _ave(truth: Truth) -> Sample | None:
    """Only where exactly one thing is seen and heard, and nothing else is heard."""
    both = truth.both()
    if len(both) != 1 or len(truth.heard()) != 1:
        return None
    span = both[0].overlap()
    assert span is not None
    events = [Event(both[0].label, *map(float, span), "audio-visual")]
    sample = _sample(truth, "ave", events, {})
    return Sample(
        sample.task,
        sample.instruction,
        sample.answer,
        sample.lead,
        {"event": both[0].label, "start_time": span[0], "end_time": span[1], "label_content": sample.answer},
    )


def _avvp(truth: Truth) -> Sample | None:
    """Event classes only: what can't sound is scenery."""
    events = [Event(f.label, *map(float, f.seen), "visual") for f in truth.seen() if f.event_class and f.seen]
    events += [Event(f.label, *map(float, f.heard), "audio") for f in truth.heard() if f.heard]
    if not events:
        return None
    sample = _sample(truth, "avvp", events, {})
    labels = sorted({e.label for e in events})
    return Sample(
        sample.task,
        sample.instruction,
        sample.answer,
        sample.lead,
        {"event": sample.answer, "labels": labels, "label_content": sample.answer},
    )


def _avcap(truth: Truth) -> Sample | None:
    text = caption(truth)
    if not text:
        return None
    sample = _sample(truth, "avcap", [Caption(text)], {}, answer=text)
    return Sample(sample.task, sample.instruction, sample.answer, sample.lead, {"label_content": text})


def _arig(truth: Truth) -> Sample | None:
    both = [f for f in truth.facts if f.seen and f.heard]
    if len(both) != 1 or len(truth.heard()) != 1 or both[0].box is None:
        return None
    x1, y1, x2, y2 = both[0].box
    sample = _sample(truth, "arig", [Box(both[0].label, x1, y1, x2, y2)], {})
    return Sample(
        sample.task,
        sample.instruction,
        sample.answer,
        sample.lead,
        {
            "a_obj": both[0].label,
            "top_left": [x1, y1],
            "bottom_right": [x2, y2],
            "frame_idx": 0,
            "label_content": sample.answer,
        },
    )


def caption(truth: Truth) -> str:
    """One short sentence a participant, sounding ones first."""
    sentences = []
    for fact in truth.heard() + [f for f in truth.seen() if not f.heard]:
        be = "are" if fact.plural else "is"
        place = {"left": " on the left", "middle": " in the middle", "right": " on the right", None: ""}[
            fact.side
        ]
        subject = fact.named[0].upper() + fact.named[1:]
        if fact.seen and fact.heard:
            start = f"{subject} {be}{place} and" if place else subject
            sentences.append(f"{start} {fact.verb}{_when(fact.heard, truth)}.")
        elif fact.seen:
            sentences.append(f"{subject} {be}{place or ' visible'}{_when(fact.seen, truth)}.")
        elif fact.heard:
            sentences.append(f"{subject} {be} heard{_when(fact.heard, truth)}.")
    return " ".join(sentences)


def _when(span: tuple[int, int], truth: Truth) -> str:
    if truth.visual == "image" or (span[0] == 0 and span[1] >= truth.seconds):
        return ""
    return f" from {span[0]} to {span[1]} seconds"


def _avqa(truth: Truth, modality: str, kind: str, question: str, answer: str) -> Sample:
    sample = _sample(truth, "avqa", [Choice(answer)], {}, question=question)
    return Sample(
        sample.task,
        sample.instruction,
        sample.answer,
        sample.lead,
        {
            "type": json.dumps([modality, kind]),
            "question": question,
            "answer": answer,
            "label": sample.answer,
        },
    )
