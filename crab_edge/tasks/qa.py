"""Questions about a clip: MUSIC-AVQA (avqa) and AVQA with its four options (avqa_thu).

Its readers of `<answer>...</answer>` serve the other families whose answer is a word.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from crab_edge.errors import InputError
from crab_edge.results import Choice, Result, Unparsed
from crab_edge.tasks import grammars
from crab_edge.tasks import text as read
from crab_edge.tasks.base import (
    MODEL_CONTEXT,
    Bar,
    MediaContext,
    Parsed,
    Published,
    Record,
    Task,
    required,
)
from crab_edge.tasks.recipes import IMAGE_AUDIO, VIDEO_10_REWINDOW, VIDEO_10_WHOLE

_YES_NO = re.compile(r"(yes|no) ?[,.;:!]", re.ASCII)


def parse_answer(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """The last `<answer>...</answer>`, lower case; the prose before it is the model's reasoning."""
    text = read.clean(answer)
    value = None
    for block in read.blocks(text, ("answer",)):
        stripped = block.text.lower().strip(read.EDGES)
        value = stripped or value
    if value is None:
        return (Unparsed(f"no <answer> in {read.quote(text)}"),)
    return (Choice(value),)


def render_answer(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    """One tag a choice."""
    return "".join(f"<answer>{choice.value}</answer>" for choice in read.only(Choice, results))


def truth_answer(*fields: str) -> Callable[[Record], Parsed]:
    """A reader of the first of these fields that a record has: a bare answer, or one in its tag."""

    def truth(record: Record) -> Parsed:
        value = str(required(record, *fields))
        if "<answer" in value.lower():
            return parse_answer(value)
        return (Choice(value.lower().strip(read.EDGES)),)

    return truth


def _parse_avqa(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """As `parse_answer`; "yes, there is" is a yes."""
    results = parse_answer(answer, context)
    first = results[0]
    said = _YES_NO.match(first.value) if isinstance(first, Choice) else None
    return (Choice(said.group(1)),) if said else results


def _options(record: Record) -> Any:
    return required(record, "multi_choice")


def _question_thu(record: Record) -> str:
    """The question with its options as the official instruction has them: the list as Python writes it."""
    return f"{required(record, 'question_text')}, options:{_options(record)}"


def _truth_thu(record: Record) -> Parsed:
    """The answer as an option's text; AVQA's own lists give the option's number, from 0."""
    value, options = required(record, "answer"), _options(record)
    if isinstance(options, list):
        known = {str(option).lower().strip(read.EDGES) for option in options}
        given = str(value).strip()
        if given.isdigit() and (isinstance(value, int) or given not in known):
            if int(given) >= len(options):
                raise InputError(f"the answer {given} isn't one of the {len(options)} options")
            value = options[int(given)]
    return (Choice(str(value).lower().strip(read.EDGES)),)


TASKS = (
    Task(
        name="avqa",
        family="question answering",
        media=VIDEO_10_REWINDOW,
        still=IMAGE_AUDIO,
        instruction="Please answer this question: {question}",
        needs_question=True,
        parse=_parse_avqa,
        render=render_answer,
        truth=truth_answer("answer"),
        form="<answer>WORD OR NUMBER</answer>",
        grammar=grammars.answer(),
        opens=("<answer>",),
        metric="music-avqa",
        targets=("label",),
        bars={"existential": Bar(over_baseline=20.0), "counting": Bar(over_baseline=20.0)},
        published=(Published("MUSIC-AVQA", "audio", 79.44),),
    ),
    Task(
        name="avqa_thu",
        family="question answering",
        media=VIDEO_10_WHOLE,
        still=IMAGE_AUDIO,
        instruction="Please answer the question based on the options: {question}",
        needs_question=True,
        question=_question_thu,
        parse=parse_answer,
        render=render_answer,
        truth=_truth_thu,
        form="<answer>OPTION</answer>",
        grammar=grammars.answer(),
        opens=("<answer>",),
        metric="accuracy",
        targets=("label",),
        published=(Published("AVQA", "accuracy", 92.16),),
    ),
)
