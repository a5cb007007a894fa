"""Captions of sight and sound (VALOR's task in AV-UIE v2)."""

from __future__ import annotations

from collections.abc import Sequence

from crab_edge.results import Caption, Result, Unparsed
from crab_edge.tasks import text as read
from crab_edge.tasks.base import MODEL_CONTEXT, MediaContext, Parsed, Record, Task, required
from crab_edge.tasks.recipes import IMAGE_AUDIO, VIDEO_10


def _parse_caption(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    text = read.clean(answer)
    return (Caption(text),) if text else (Unparsed("the answer is empty"),)


def _render_caption(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    return " ".join(caption.text for caption in read.only(Caption, results))


def _truth_caption(record: Record) -> Parsed:
    return _parse_caption(str(required(record, "caption", "label_content")))


TASKS = (
    Task(
        name="avcap",
        family="caption",
        media=VIDEO_10,
        still=IMAGE_AUDIO,
        instruction="Please describe this video and audio.",
        parse=_parse_caption,
        render=_render_caption,
        truth=_truth_caption,
        grammar="",
        form="free text",
        metric="caption",
    ),
)
