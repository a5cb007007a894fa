"""Event localisation in time: AVE and UnAV (audio-visual events), LLP (seen and heard apart)."""

from __future__ import annotations

from collections.abc import Sequence

from crab_edge.results import Event, Modality, Result, Unparsed
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
from crab_edge.tasks.recipes import VIDEO_10

_SEPARATORS = " ,;:"
_VISUAL: Modality = "visual"
_AUDIO: Modality = "audio"
_BOTH: Modality = "audio-visual"
_AVVP_TAGS: dict[str, Modality] = {
    "visual_event": _VISUAL,
    "visual": _VISUAL,
    "audio_event": _AUDIO,
    "audio": _AUDIO,
}


def _event(label: str, span: tuple[float, float] | Unparsed, modality: Modality) -> Result:
    if isinstance(span, Unparsed):
        return Unparsed(f"{label[:60]}: {span.reason}")
    return Event(label, *span, modality)


def _block_events(
    block: str, modality: Modality, context: MediaContext, out: list[Result]
) -> tuple[str, bool]:
    """Append a block's events to `out`; returns the last label and whether the block had any range."""
    found, rest = read.ranges(block)
    if not found:
        return block.strip(_SEPARATORS), False
    label = ""
    for index, item in enumerate(found):
        between = item.before.strip(_SEPARATORS)
        if index and between.startswith("and "):
            between = between[4:].strip(_SEPARATORS)
        if index and between.startswith("("):
            out.append(Unparsed(f"can't read the time range {read.quote(between)}"))
        elif between and not (index and between == "and"):
            label = between
        if label:
            out.append(_event(label, read.clip_range(item.values, context), modality))
        else:
            out.append(Unparsed(f"a time range without an event in {read.quote(block)}"))
    if "(" in rest:
        out.append(Unparsed(f"can't read the time range {read.quote(rest.strip(_SEPARATORS))}"))
    return label, True


def _parse_ave(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    text = read.clean(answer)
    out: list[Result] = []
    waiting: str | None = None  # the label of an <event> whose ranges come in <range> (Crab, the predecessor)
    for block in read.blocks(text, ("event", "range")):
        if block.tag == "event":
            if waiting:
                out.append(Unparsed(f"no time range for {read.quote(waiting)}"))
            label, ranged = _block_events(block.text, _BOTH, context, out)
            waiting = None if ranged else label
            if not ranged and not label:
                out.append(Unparsed("an empty <event>"))
            continue
        spans, _ = read.bare_ranges(block.text)
        if not spans or not waiting:
            reason = "a <range> without an <event>" if not waiting else "a <range> without two numbers"
            out.append(Unparsed(f"{reason}: {read.quote(block.text.strip())}"))
        else:
            for found in spans:
                out.append(_event(waiting, read.clip_range(found.values, context), _BOTH))
        waiting = None
    if waiting:
        out.append(Unparsed(f"no time range for {read.quote(waiting)}"))
    return tuple(out) or (Unparsed(f"no <event> in {read.quote(text)}"),)


def _parse_avvp(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    text = read.clean(answer)
    out: list[Result] = []
    for block in read.blocks(text, tuple(_AVVP_TAGS)):
        label, ranged = _block_events(block.text, _AVVP_TAGS[block.tag], context, out)
        if not ranged:
            named = f"no time range for {read.quote(label)}" if label else f"an empty <{block.tag}>"
            out.append(Unparsed(named))
    return tuple(out) or (Unparsed(f"no <visual_event> or <audio_event> in {read.quote(text)}"),)


def _grouped(events: Sequence[Event], context: MediaContext) -> list[tuple[str, str]]:
    """(label, "(s e)(s e)") in order of first mention, in whole seconds of the window."""
    spans: dict[str, list[str]] = {}
    for event in events:
        start, end = read.whole_range(event.start_s - context.start_s, event.end_s - context.start_s)
        spans.setdefault(event.label, []).append(f"({start} {end})")
    return [(label, "".join(parts)) for label, parts in spans.items()]


def _render_ave(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    grouped = _grouped(read.only(Event, results), context)
    if not grouped:
        return ""
    named = ", ".join(f"<event>{label}, {spans}</event>" for label, spans in grouped)
    return f"Therefore, the events and time range are {named}"


def _render_avvp(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    """Audio-visual events are written as both."""
    events = read.only(Event, results)
    text = ""
    for tag, modality in (("visual_event", _VISUAL), ("audio_event", _AUDIO)):
        own = [event for event in events if event.modality in (modality, _BOTH)]
        text += "".join(f"<{tag}>{label},{spans}</{tag}>" for label, spans in _grouped(own, context))
    return text


def _truth_ave(record: Record) -> Parsed:
    event = str(required(record, "event"))
    if "<event>" in event.lower():
        return _parse_ave(event)
    start, end = float(required(record, "start_time")), float(required(record, "end_time"))
    return (Event(event, start, end, _BOTH),)


def _truth_unav(record: Record) -> Parsed:
    return _parse_ave(str(required(record, "label_content", "event")))


def _truth_avvp(record: Record) -> Parsed:
    return _parse_avvp(str(required(record, "event", "label_content")))


_AVE_INSTRUCTION = "Please describe the events and time range that occurred in the video."
_AVE_FORM = "<event>LABEL, (S E)(S E)</event>, ... ; S < E whole seconds, E exclusive"
_AVE_GRAMMAR = (
    "start: event (BETWEEN? event){0,5} BETWEEN?\n"
    'event: "<event>" NAME spans "</event>"\n'
    f'NAME: {grammars.LABEL} ", "\nBETWEEN: {grammars.SEPARATOR}\n{grammars.spans()}'
)
_AVVP_GRAMMAR = (
    "start: (seen | heard) (BETWEEN? (seen | heard)){0,11} BETWEEN?\n"
    'seen: "<visual_event>" NAME spans "</visual_event>"\n'
    'heard: "<audio_event>" NAME spans "</audio_event>"\n'
    f'NAME: {grammars.LABEL} ","\nBETWEEN: {grammars.SEPARATOR}\n{grammars.spans()}'
)

TASKS = (
    Task(
        name="ave",
        family="temporal",
        media=VIDEO_10,
        requires=frozenset({"video", "audio"}),
        instruction=_AVE_INSTRUCTION,
        parse=_parse_ave,
        render=_render_ave,
        truth=_truth_ave,
        form=_AVE_FORM,
        grammar=_AVE_GRAMMAR,
        opens=("<event>",),
        metric="ave-segments",
        bars={"segment accuracy": Bar(at_least=60.0)},
        published=(Published("AVE", "segment accuracy", 83.58),),
    ),
    Task(
        name="unav",
        family="temporal",
        media=VIDEO_10,
        requires=frozenset({"video", "audio"}),
        instruction=_AVE_INSTRUCTION,
        parse=_parse_ave,
        render=_render_ave,
        truth=_truth_unav,
        form=_AVE_FORM,
        grammar=_AVE_GRAMMAR,
        opens=("<event>",),
        metric="unav",
        targets=("label_content",),
    ),
    Task(
        name="avvp",
        family="temporal",
        media=VIDEO_10,
        instruction=(
            "Please determine the events that occur based on the visual and audio information in the video, "
            "as well as the start and end times of these events."
        ),
        parse=_parse_avvp,
        render=_render_avvp,
        truth=_truth_avvp,
        form=(
            "<visual_event>LABEL,(S E)(S E)</visual_event><audio_event>LABEL,(S E)</audio_event>... ; "
            "S < E whole seconds, E exclusive"
        ),
        grammar=_AVVP_GRAMMAR,
        opens=("<visual_event>", "<audio_event>"),
        metric="llp",
        bars={"segment Type@AV": Bar(at_least=45.0)},
        # Which of the segment-level columns it is isn't stated.
        published=(Published("LLP", "not stated", 59.47, "Crab+ paper, segment level"),),
    ),
)
