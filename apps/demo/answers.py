"""Answers as HTML: one card a question, all tasks laid out together, the raw text folded away."""

from __future__ import annotations

from collections.abc import Sequence

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.texts import about, say
from crab_edge_apps.demo.turns import Skipped, Turn

from crab_edge.results import (
    Answer,
    Box,
    Caption,
    Choice,
    Event,
    Mask,
    Points,
    Result,
    Unparsed,
)


def live(language: str, question: str | None, task: str, status: str, said: str = "") -> str:
    """The card of an answer on its way."""
    caret = '<span class="ce-caret" aria-hidden="true"></span>'
    body = f'<p class="ce-stream" aria-live="polite">{markup.text(said)}{caret}</p>' if said else ""
    return (
        f'<article class="ce-answer ce-live">{_asked(question, task)}{body}'
        f'<p class="ce-status" role="status"><span class="ce-spinner" aria-hidden="true"></span>'
        f"{markup.text(status)}</p></article>"
    )


def thread(turns: Sequence[Turn], language: str) -> str:
    """All answers, the newest first."""
    if not turns:
        return markup.empty(say(language, "no_answers_title"), say(language, "no_answers_text"))
    return "".join(_turn(turn, language) for turn in reversed(turns))


def _turn(turn: Turn, language: str) -> str:
    if turn.kind == "all":
        return _all(turn, language)
    (answer,) = turn.answers
    facts = _facts(turn, answer, language)
    return (
        f'<article class="ce-answer">{_asked(answer.question, answer.task)}'
        f"{_results(answer, language)}{_notices(answer.notices)}{facts}{_raw(answer, language)}</article>"
    )


def _all(turn: Turn, language: str) -> str:
    """Every task's results together, then what wasn't run and why."""
    new = sum(not answer.timings.cached_tokens for answer in turn.answers)
    summary = say(
        language,
        "all_summary",
        tasks=len(turn.answers),
        s=markup.seconds(turn.took_s),
        new=new,
        reused=len(turn.answers) - new,
    )
    common = set.intersection(*(set(answer.notices) for answer in turn.answers)) if turn.answers else set()
    cells = "".join(_cell(answer, language, common) for answer in turn.answers)
    skipped = _skipped(turn.skipped, language)
    return (
        f'<article class="ce-answer ce-all">{_asked(turn.question, say(language, "all_tasks"))}'
        f'<div class="ce-grid">{cells}</div>{_notices([n for n in _first(turn) if n in common])}'
        f'<p class="ce-facts"><span>{markup.text(summary)}</span></p>{skipped}</article>'
    )


def _first(turn: Turn) -> tuple[str, ...]:
    return turn.answers[0].notices if turn.answers else ()


def _cell(answer: Answer, language: str, common: set[str]) -> str:
    from crab_edge import tasks

    family = tasks.get(answer.task).family
    purpose = markup.text(about(language, answer.task, family))
    own = [notice for notice in answer.notices if notice not in common]
    return (
        f'<section class="ce-cell"><h3><code>{markup.text(answer.task)}</code><span>{purpose}</span></h3>'
        f"{_results(answer, language)}{_notices(own)}{_raw(answer, language)}</section>"
    )


def _skipped(skipped: Sequence[Skipped], language: str) -> str:
    if not skipped:
        return ""
    rows = "".join(
        f"<li><code>{markup.text(entry.task)}</code> "
        f"<span>{markup.text(about(language, entry.task, entry.family))}</span>"
        f"<em>{markup.text(_why(entry, language))}</em></li>"
        for entry in skipped
    )
    title = markup.text(say(language, "not_run", n=len(skipped)))
    return f'<details class="ce-fold"><summary>{title}</summary><ul class="ce-skipped">{rows}</ul></details>'


def _why(entry: Skipped, language: str) -> str:
    return say(language, entry.why, name=entry.other) if entry.why.startswith("why_") else entry.why


def _asked(question: str | None, task: str) -> str:
    asked = f"<h3>{markup.text(question)}</h3>" if question else ""
    return f'<header class="ce-asked">{asked}<code>{markup.text(task)}</code></header>'


def _results(answer: Answer, language: str) -> str:
    events = [result for result in answer.parsed if isinstance(result, Event)]
    rest = [result for result in answer.parsed if not isinstance(result, Event)]
    parts = [_events(events, language)] if events else []
    parts += [_result(result, language) for result in rest]
    if not parts:
        parts.append(f'<p class="ce-quiet">{markup.text(say(language, "nothing_found"))}</p>')
    return f'<div class="ce-results">{"".join(parts)}</div>'


def _events(events: Sequence[Event], language: str) -> str:
    rows = []
    for event in dict.fromkeys(events):
        how = say(language, {"visual": "seen", "audio": "heard"}.get(event.modality, "both"))
        span = f"{markup.clock(event.start_s, True)} – {markup.clock(event.end_s, True)}"
        rows.append(
            f'<li><button type="button" class="ce-chip" data-seek="{event.start_s:.3f}">'
            f'<span class="ce-dot" style="{markup.colour(event.label)}" aria-hidden="true"></span>'
            f"<b>{markup.text(event.label)}</b><span>{markup.text(how)}</span><span>{span}</span></button></li>"
        )
    return f'<ul class="ce-events">{"".join(rows)}</ul>'


def _result(result: Result, language: str) -> str:
    if isinstance(result, Choice):
        return f'<p class="ce-choice">{markup.text(result.value)}</p>'
    if isinstance(result, Caption):
        return f'<p class="ce-caption">{markup.text(result.text)}</p>'
    if isinstance(result, Unparsed):
        return f'<p class="ce-note">{markup.text(say(language, "unparsed", reason=result.reason))}</p>'
    if isinstance(result, Box):
        place = f"({result.x1:.0f}, {result.y1:.0f}) – ({result.x2:.0f}, {result.y2:.0f})"
    elif isinstance(result, Points):
        place = " ".join(f"({x:.0f}, {y:.0f})" for x, y in result.xy)
    elif isinstance(result, Mask):
        place = f"{result.width} × {result.height}, {result.source}"
    else:
        place = ""
    label = str(getattr(result, "label", ""))
    dot = f'<span class="ce-dot" style="{markup.colour(label)}" aria-hidden="true"></span>'
    return f'<p class="ce-place">{dot}<b>{markup.text(label)}</b><span>{markup.text(place)}</span></p>'


def _facts(turn: Turn, answer: Answer, language: str) -> str:
    spent = answer.timings
    facts = []
    if turn.first_token_s is not None:
        facts.append(say(language, "first_token", s=markup.seconds(turn.first_token_s)))
    if spent.cached_tokens:
        facts.append(say(language, "prefix_reused", n=spent.cached_tokens))
    elif spent.prompt_tokens:
        facts.append(say(language, "prefix_new", n=spent.prompt_tokens))
    if spent.tokens and spent.generate_s > 0:
        facts.append(say(language, "speed", n=spent.tokens, rate=f"{spent.tokens / spent.generate_s:.0f}"))
    if turn.waited_s > 0.2:
        facts.append(say(language, "waited", s=markup.seconds(turn.waited_s)))
    shown = "".join(f"<span>{markup.text(fact)}</span>" for fact in facts)
    kind = " ce-reused" if spent.cached_tokens else ""
    return f'<p class="ce-facts{kind}">{shown}</p>'


def _notices(notices: Sequence[str]) -> str:
    return "".join(f'<p class="ce-note">{markup.text(notice)}</p>' for notice in dict.fromkeys(notices))


def _raw(answer: Answer, language: str) -> str:
    said = answer.raw or say(language, "said_nothing")
    return (
        f'<details class="ce-fold ce-raw"><summary>{markup.text(say(language, "raw"))}</summary>'
        f"<pre>{markup.text(said)}</pre></details>"
    )
