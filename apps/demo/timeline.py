"""The time line: thumbnails above what was seen, the spectrogram above what was heard, one axis for all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.look import Look
from crab_edge_apps.demo.texts import say

from crab_edge.results import Answer, Event

# The axis has about so many marks.
_MARKS = 6
_STEPS_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)
_MOST_LANES = 24


@dataclass(frozen=True)
class Lane:
    """Events of one label as one task tells them, in one track."""

    task: str
    label: str
    events: tuple[Event, ...]


def lanes(answers: Iterable[Answer], track: str) -> list[Lane]:
    """A track's ("visual" or "audio") lanes in the order of the text; an event told twice stands once."""
    found: dict[tuple[str, str], dict[tuple[float, float, str], Event]] = {}
    for answer in answers:
        for event in answer.parsed:
            if isinstance(event, Event) and track in event.modality:
                same = (event.start_s, event.end_s, event.modality)
                found.setdefault((answer.task, event.label), {}).setdefault(same, event)
    return [
        Lane(task, label, tuple(sorted(events.values(), key=lambda event: event.start_s)))
        for (task, label), events in found.items()
    ]


def has_events(answers: Sequence[Answer]) -> bool:
    """Whether any of the answers tells of events."""
    return any(isinstance(result, Event) for answer in answers for result in answer.parsed)


def timeline(look: Look | None, answers: Sequence[Answer], language: str, finders: Sequence[str]) -> str:
    """The whole card. `answers`: whose events are shown; `finders`: the tasks that find events here."""
    if look is None or look.duration_s <= 0:
        if look is not None:  # a picture alone has no time
            return ""
        return markup.heading(say(language, "timeline")) + markup.empty("", say(language, "timeline_empty"))
    tasks = list(dict.fromkeys(answer.task for answer in answers if has_events([answer])))
    hint = say(language, "timeline_hint")
    parts = [markup.heading(say(language, "timeline"), hint)]
    duration = look.duration_s
    parts.append(
        f'<div class="ce-timeline" data-duration="{duration:.3f}" role="group" '
        f'aria-label="{markup.text(say(language, "timeline"))}">'
    )
    parts.append(_axis(duration, language))
    several = len(tasks) > 1
    if look.thumbnails:
        parts.append(_row("seen", _strip(look), lanes(answers, "visual"), duration, language, several))
    if look.spectrogram:
        parts.append(_row("heard", _spectrogram(look), lanes(answers, "audio"), duration, language, several))
    parts.append('<div class="ce-over" aria-hidden="true"><div class="ce-playhead"></div></div></div>')
    if not tasks and finders:
        told = say(language, "no_events", tasks=", ".join(finders))
        parts.append(f'<p class="ce-note-quiet">{markup.text(told)}</p>')
    elif tasks:
        told = f"{say(language, 'events_of')} {', '.join(tasks)}"
        parts.append(f'<p class="ce-note-quiet">{markup.text(told)}</p>')
    return "".join(parts)


def _row(track: str, strip: str, rows: list[Lane], duration: float, language: str, several: bool) -> str:
    name = markup.text(say(language, track))
    shown = "".join(_lane(lane, duration, language, several) for lane in rows[:_MOST_LANES])
    return (
        f'<div class="ce-track ce-{track}"><div class="ce-track-name">{name}</div>'
        f'<div class="ce-track-body"><div class="ce-strip" data-scrub>{strip}</div>'
        f'<div class="ce-lanes" data-scrub>{shown}</div></div></div>'
    )


def _lane(lane: Lane, duration: float, language: str, several: bool) -> str:
    bars = []
    for event in lane.events:
        left = 100 * max(0.0, min(1.0, event.start_s / duration))
        width = max(0.6, 100 * max(0.0, min(1.0, event.end_s / duration)) - left)
        span = say(language, "from_to", a=f"{event.start_s:.1f}", b=f"{event.end_s:.1f}")
        how = {"visual": "seen", "audio": "heard"}.get(event.modality, "both")
        spoken = f"{event.label}, {say(language, how)}, {span}"
        both = '<span class="ce-both" aria-hidden="true"></span>' if how == "both" else ""
        task = f'<span class="ce-of">{markup.text(lane.task)}</span>' if several else ""
        bars.append(
            f'<button type="button" class="ce-event" '
            f'style="{markup.colour(lane.label)};left:{left:.3f}%;width:{width:.3f}%" '
            f'data-seek="{event.start_s:.3f}" data-end="{event.end_s:.3f}" '
            f'aria-label="{markup.text(spoken)}" title="{markup.text(spoken)}">'
            f'{both}<span class="ce-label">{markup.text(event.label)}</span>{task}</button>'
        )
    return f'<div class="ce-lane">{"".join(bars)}</div>'


def _axis(duration: float, language: str) -> str:
    step = next((s for s in _STEPS_S if duration / s <= _MARKS), _STEPS_S[-1])
    marks = []
    for number in range(int(duration / step) + 1):
        place = 100 * number * step / duration
        if place > 97:
            break
        marks.append(f'<span style="left:{place:.3f}%">{markup.clock(number * step, tenths=step < 1)}</span>')
    label = markup.text(say(language, "position"))
    return (
        '<div class="ce-track ce-axis-row"><div class="ce-track-name"></div>'
        f'<div class="ce-axis" data-scrub tabindex="0" role="slider" aria-label="{label}" '
        f'aria-valuemin="0" aria-valuemax="{duration:.1f}" aria-valuenow="0" aria-valuetext="0:00">'
        f"{''.join(marks)}</div></div>"
    )


def _strip(look: Look) -> str:
    frames = "".join(f'<img src="{picture}" alt="" draggable="false">' for _, picture in look.thumbnails)
    return f'<div class="ce-frames" aria-hidden="true">{frames}</div>'


def _spectrogram(look: Look) -> str:
    return (
        f'<div class="ce-spectrogram" aria-hidden="true" '
        f"style=\"-webkit-mask-image:url('{look.spectrogram}');mask-image:url('{look.spectrogram}')\"></div>"
    )
