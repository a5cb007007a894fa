"""What there is to draw: results of any form made one, a colour for each label."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from crab_edge_apps._draw.text import Colour

from crab_edge.results import Result, Unparsed, results_from_json

# Told apart by people with any colour vision; after Okabe and Ito, then further ones.
PALETTE: tuple[Colour, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (143, 91, 214),
    (166, 216, 84),
    (64, 224, 208),
    (178, 34, 60),
    (140, 109, 70),
)


class Shown(NamedTuple):
    """One result for drawing."""

    result: Result
    task: str = ""
    question: str | None = None
    window: tuple[float, float] | None = None
    """The seconds of the clip that it is about; None for all of it. Events have their own times."""


def shown(answer: Any) -> list[Shown]:
    """The results of an `Answer`, of a row or answer as JSON, or of a plain sequence of results."""
    task, question, items = "", None, answer
    if isinstance(answer, Mapping):
        items = answer.get("parsed") or ()
        task, question = str(answer.get("task") or ""), answer.get("question")
    elif hasattr(answer, "parsed"):
        items, task, question = answer.parsed, answer.task, answer.question
    out = []
    for item in items:
        if isinstance(item, Mapping):
            (result,), window = results_from_json([item]), item.get("window")
        else:
            result, window = item, getattr(item, "window", None)
        out.append(Shown(result, task, question, (window[0], window[1]) if window else None))
    return out


def anything(answers: Iterable[Any]) -> bool:
    """Whether there is anything to draw."""
    return any(not isinstance(one.result, Unparsed) for answer in answers for one in shown(answer))


def colours(labels: Iterable[str]) -> dict[str, Colour]:
    """A colour for each label: the label's own wherever it appears, the next free one where two collide."""
    out: dict[str, Colour] = {}
    taken: set[int] = set()
    for label in sorted({label.casefold() for label in labels}):
        place = hashlib.blake2b(label.encode("utf-8", "replace"), digest_size=2).digest()
        first = int.from_bytes(place, "big") % len(PALETTE)
        steps = ((first + step) % len(PALETTE) for step in range(len(PALETTE)))
        index = next((step for step in steps if step not in taken), first)
        taken.add(index)
        out[label] = PALETTE[index]
    return out
