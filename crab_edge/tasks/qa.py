"""Questions about a clip: MUSIC-AVQA."""

from __future__ import annotations

from collections.abc import Sequence

from crab_edge.results import Choice, Result, Unparsed
from crab_edge.tasks import grammars
from crab_edge.tasks import text as read
from crab_edge.tasks.base import MODEL_CONTEXT, Bar, MediaContext, Parsed, Record, Task, required
from crab_edge.tasks.recipes import IMAGE_AUDIO, VIDEO_10_REWINDOW

_EDGES = " .,;:!?\"'`"


def parse_answer(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """The last `<answer>...</answer>`, lower case; the prose before it is the model's reasoning."""
    text = read.clean(answer)
    value = None
    for block in read.blocks(text, ("answer",)):
        stripped = block.text.lower().strip(_EDGES)
        value = stripped or value
    if value is None:
        return (Unparsed(f"no <answer> in {read.quote(text)}"),)
    return (Choice(value),)


def render_answer(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    """One tag a choice."""
    return "".join(f"<answer>{choice.value}</answer>" for choice in read.only(Choice, results))


def _truth_avqa(record: Record) -> Parsed:
    answer = str(required(record, "answer"))
    return parse_answer(answer) if "<answer" in answer.lower() else (Choice(answer.lower().strip(_EDGES)),)


TASKS = (
    Task(
        name="avqa",
        family="question answering",
        media=VIDEO_10_REWINDOW,
        still=IMAGE_AUDIO,
        instruction="Please answer this question: {question}",
        needs_question=True,
        parse=parse_answer,
        render=render_answer,
        truth=_truth_avqa,
        grammar=grammars.answer(),
        form="<answer>WORD OR NUMBER</answer>",
        opens=("<answer>",),
        metric="music-avqa",
        targets=("label",),
        bars={"existential": Bar(over_baseline=20.0), "counting": Bar(over_baseline=20.0)},
    ),
)
