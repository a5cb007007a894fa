"""More questions about one scene than its samples ask: a scene's pictures and sounds cost far more to encode
than a question, and a narrow decoder must be asked about every object to learn to look each one up.

Drills are for training alone; no test list has them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from crab_edge import tasks
from crab_edge.results import Box, Choice
from crab_edge.training.scenes.facts import Fact, Truth, Vocabulary
from crab_edge.training.scenes.questions import existence
from crab_edge.training.scenes.truth import Sample
from crab_edge.training.scenes.truth import lead as lead_sentence


@dataclass(frozen=True)
class Drills:
    """Drills of scenes by their lead sentence: what `LanguageBatches` asks for."""

    vocabulary: Vocabulary
    limit: int

    def __call__(self, scene: Any, lead: str, random: np.random.Generator) -> list[Sample]:
        if scene.truth is None:
            return []
        return [s for s in drills(scene.truth, self.vocabulary, random, self.limit) if s.lead == lead]


def drills(truth: Truth, vocabulary: Vocabulary, random: np.random.Generator, limit: int) -> list[Sample]:
    """Up to `limit` drills of each kind, all with the lead sentence of this scene's streams.

    Of a picture: where each object stands, in arig's words; the loss is on the coordinates only, since which
    object sounds is not said by these. Of any scene: whether something is seen or heard, as often present
    as absent, on which side an object stands, whether it sounds.
    """
    sounding, lead = tasks.get("arig"), lead_sentence(truth, "avqa")
    seen, heard = truth.seen(), truth.heard()
    counts = Counter(f.label for f in seen)
    alone = [f for f in seen if counts[f.label] == 1]
    alone = [alone[i] for i in random.permutation(len(alone))[:limit]]
    out = []
    if truth.visual == "image":
        for fact in alone:
            if fact.box is not None:
                text = sounding.render([Box(fact.label, *map(float, fact.box))])
                out.append(Sample("arig", sounding.prompt(None), text, lead, {"loss": "coordinates"}))
    if truth.visual:
        for label, article, yes in _pairs(seen, vocabulary.seen, heard, limit, random):
            verb = "Is" if article else "Are"
            out.append(
                _asked(f"{verb} there {f'{article} {label}'.strip()} in the {truth.visual}?", yes, lead)
            )
        for fact in alone:
            if fact.side is not None and len(seen) > 1:
                verb = "are" if fact.plural else "is"
                out.append(_asked(f"Where {verb} {fact.the}?", fact.side, lead))
    if truth.has_audio:
        for label, article, yes in _pairs(heard, vocabulary.heard, seen, limit, random):
            out.append(_asked(f"Can you hear {f'{article} {label}'.strip()}?", yes, lead))
    if truth.visual and truth.has_audio:
        for fact in alone:
            if fact.event_class:
                verb = "Are" if fact.plural else "Is"
                out.append(_asked(f"{verb} {fact.the} making a sound?", "yes" if fact.heard else "no", lead))
    return out


def _pairs(
    present: list[Fact],
    vocabulary: tuple[tuple[str, str, str], ...],
    others: list[Fact],
    limit: int,
    random: np.random.Generator,
) -> list[tuple[str, str, str]]:
    """(label, article, yes or no), as many present ones as absent ones; at least one absent."""
    taken = {f.label for f in present}
    tempting = [f for f in others if f.event_class]
    chosen = [present[i] for i in random.permutation(len(present))[: max(1, limit // 2)]]
    out = [(f.label, f.article, "yes") for f in chosen]
    for _ in range(max(1, len(chosen))):
        out.append((*existence(False, present, tempting, taken, vocabulary, random), "no"))
    return out


def _asked(question: str, answer: str, lead: str) -> Sample:
    task = tasks.get("avqa")
    return Sample("avqa", task.prompt(question), task.render([Choice(answer)]), lead)
