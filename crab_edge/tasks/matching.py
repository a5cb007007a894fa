"""Cross-modal matching: which of two videos a sound belongs to (a2v), which of two sounds a video (v2a)."""

from __future__ import annotations

import re

from crab_edge.errors import InputError
from crab_edge.results import Choice, Unparsed
from crab_edge.tasks import text as read
from crab_edge.tasks.base import MODEL_CONTEXT, MediaContext, Parsed, Record, Task, required
from crab_edge.tasks.qa import render_answer
from crab_edge.tasks.recipes import TWO_AUDIOS, TWO_VIDEOS, MediaRecipe

_PICK = re.compile(
    r"(?<![a-z0-9.])(?:(?:video|audio|clip)[ _-]?)?"
    r"(?:(one|first|1st|1)|(?:two|second|2nd|2))(?![a-z0-9]|\.[0-9])",
    re.ASCII,
)

_GRAMMAR = (
    'start: "<answer>" THE? (KIND " ")? PICK (" " KIND)? "</answer>"\n'
    "THE: /[Tt]he /\nKIND: /[Vv]ideo|[Aa]udio|[Cc]lip/\n"
    "PICK: /1|2|1st|2nd|[Oo]ne|[Tt]wo|[Ff]irst|[Ss]econd/\n"
)


def _pick(text: str) -> str | None:
    """ "1" or "2" where the text names just one of them."""
    picks = {"1" if match.group(1) else "2" for match in _PICK.finditer(text.lower())}
    return picks.pop() if len(picks) == 1 else None


def _parse_match(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """Choice "1" or "2" of the last answer that isn't empty: 1, one, first, "the second video"."""
    text = read.clean(answer)
    said = [part for block in read.blocks(text, ("answer",)) if (part := block.text.strip(read.EDGES))]
    if not said:
        return (Unparsed(f"no <answer> in {read.quote(text)}"),)
    value = _pick(said[-1])
    return (Choice(value) if value else Unparsed(f"neither 1 nor 2: {read.quote(said[-1])}"),)


def _match(name: str, media: MediaRecipe, instruction: str, field: str) -> Task:
    def truth(record: Record) -> Parsed:
        given = str(required(record, field))
        value = _pick(given)
        if value is None:
            raise InputError(f"{field} is {given!r}, expected 1 or 2")
        return (Choice(value),)

    return Task(
        name=name,
        family="matching",
        media=media,
        requires=frozenset({"video", "audio"}),
        instruction=instruction,
        parse=_parse_match,
        render=render_answer,
        truth=truth,
        form="<answer>1|2</answer>",
        grammar=_GRAMMAR,
        opens=("<answer>",),
        metric="accuracy",
        targets=("label",),
    )


TASKS = (
    _match(
        "a2v",
        TWO_VIDEOS,
        "Please listen to the audio and indicate which of the two videos matches what you hear.",
        "correct_video",
    ),
    _match(
        "v2a",
        TWO_AUDIOS,
        "Please view the video and indicate which of the two audio clips matches what you see.",
        "correct_audio",
    ),
)
