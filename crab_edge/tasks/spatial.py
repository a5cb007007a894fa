"""Where in the picture the sound comes from: audio-referred image grounding (ARIG)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from crab_edge.results import Box, Choice, Result, Unparsed
from crab_edge.tasks import grammars
from crab_edge.tasks import text as read
from crab_edge.tasks.base import FRAME_SIDE, MODEL_CONTEXT, Bar, MediaContext, Parsed, Record, Task, required
from crab_edge.tasks.recipes import IMAGE_AUDIO

_NAMED = re.compile(
    r"(?:\bthe )?(?:sounding object|object (?:that is )?(?:making|producing) (?:the )?sounds?"
    r"(?: (?:in|within) the (?:video frame|video|image|frame|picture))?) (?:is|are) ",
    re.IGNORECASE | re.ASCII,
)
#: Where a label ends: the next sentence of the official text, a tag or a bracket with a number.
_LABEL_END = re.compile(
    r"[.,]? (?:and )?(?:its|the) (?:coordinates?|bounding box)|<|[(\[] ?-?[0-9]", re.IGNORECASE | re.ASCII
)
_EDGES = " .,;:"
#: Crab's test lists mark a frame without a sounding object by this x.
_NOTHING_SOUNDS_X = 1000


def _parse_arig(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    text = read.clean(answer)
    starts = list(_NAMED.finditer(text))
    out: list[Result] = []
    # Each sentence that names an object owns the boxes up to the next such sentence.
    edges = [match.start() for match in starts] + [len(text)]
    _boxes_of("", text[: edges[0]], context, out)
    label = ""
    for match, end in zip(starts, edges[1:], strict=True):
        part = text[match.end() : end]
        stop = _LABEL_END.search(part)
        # A sentence that names nothing goes on about the last object.
        label = (part[: stop.start()] if stop else part).strip(_EDGES) or label
        if not _boxes_of(label, part[stop.start() :] if stop else "", context, out) and label:
            out.append(Choice(label))
            out.append(Unparsed(f"no box for {read.quote(label)}"))
    return tuple(out) or (Unparsed(f"no sounding object and no box in {read.quote(text)}"),)


def _boxes_of(label: str, part: str, context: MediaContext, out: list[Result]) -> bool:
    found, _ = read.boxes(part)
    good = 0
    for item in found:
        box = read.frame_box(item.values, context)
        if isinstance(box, Unparsed):
            out.append(box)
        else:
            out.append(Box(label, *box))
            good += 1
    if good and not label:
        out.append(Unparsed("the sounding object isn't named"))
    elif found and not good and label:
        out.append(Choice(label))
    return bool(found)


def _render_arig(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    across, down = FRAME_SIDE / context.width, FRAME_SIDE / context.height
    sentences = []
    for result in results:
        if isinstance(result, Choice):
            sentences.append(f"The sounding object is {result.value}.")
        elif isinstance(result, Box):
            x1, x2 = read.whole_range(result.x1 * across, result.x2 * across)
            y1, y2 = read.whole_range(result.y1 * down, result.y2 * down)
            named = f"The sounding object is {result.label}. " if result.label else ""
            sentences.append(f"{named}Its coordinates are <obj>({x1},{y1})({x2},{y2})</obj>.")
    return " ".join(sentences)


def _pair(value: Any) -> tuple[float, float]:
    first, second = re.findall(r"-?[0-9]+(?:\.[0-9]+)?", value) if isinstance(value, str) else value
    return float(first), float(second)


def _truth_arig(record: Record) -> Parsed | None:
    """top_left and bottom_right, each [x, y] in the 224x224 frame; None where nothing sounds."""
    x1, y1 = _pair(required(record, "top_left"))
    if x1 >= _NOTHING_SOUNDS_X:
        return None
    x2, y2 = _pair(required(record, "bottom_right"))
    return (Box(str(required(record, "a_obj")), x1, y1, x2, y2),)


TASKS = (
    Task(
        name="arig",
        family="spatial",
        media=IMAGE_AUDIO,
        requires=frozenset({"image", "audio"}),
        instruction=(
            "Please recognize the category of object that makes the sound and then output its bounding box."
        ),
        parse=_parse_arig,
        render=_render_arig,
        truth=_truth_arig,
        grammar=(
            'start: "The sounding object is " OBJECT ". Its coordinates are <obj>(" box "</obj>."\n'
            f"OBJECT: {grammars.OBJECT}\n{grammars.box((',', ')(', ',', ')'))}"
        ),
        opens=("The sounding object is",),
        form=(
            "The sounding object is LABEL. Its coordinates are <obj>(X1,Y1)(X2,Y2)</obj>. ; "
            "0..224, X1 < X2, Y1 < Y2"
        ),
        metric="grounding",
        bars={
            "label top-1": Bar(at_least=60.0),
            "label top-1@unseen": Bar(at_least=30.0),
            "cIoU (share IoU >= 0.5)": Bar(at_least=40.0, over_baseline=25.0),
        },
    ),
)
