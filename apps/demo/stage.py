"""The opened clip: its player, or what to do when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.visitors import Facts, Visitor

_ICON = (
    '<svg viewBox="0 0 48 48" fill="none" stroke="currentColor" stroke-width="2.2" stroke-linecap="round" '
    'stroke-linejoin="round"><rect x="5" y="10" width="38" height="28" rx="5"/><path d="M20 18.5v11l9-5.5z"/>'
    '<path d="M11 43h26"/></svg>'
)


def nothing(language: str, max_mb: float, max_minutes: float) -> str:
    """The empty stage."""
    box = markup.empty(say(language, "empty_title"), say(language, "empty_text"), _ICON)
    return f'<div class="ce-stage ce-drop">{box}</div>{_limits(language, max_mb, max_minutes)}'


def opened(visitor: Visitor, language: str, max_mb: float, max_minutes: float) -> str:
    """Players for the clip's files and one line of facts."""
    players = "".join(
        _player(path, name, kind, size)
        for path, name, kind, size in zip(
            visitor.media, visitor.names, visitor.facts.kinds, _sizes(visitor.facts), strict=True
        )
    )
    unplayable = f'<p class="ce-note ce-unplayable" hidden>{markup.text(say(language, "no_player"))}</p>'
    notices = "".join(f'<p class="ce-note">{markup.text(notice)}</p>' for notice in visitor.facts.notices)
    return (
        f'<figure class="ce-stage ce-drop" id="ce-player">{players}{unplayable}'
        f'<figcaption class="ce-facts">{_facts(visitor, language)}</figcaption></figure>'
        f"{notices}{_limits(language, max_mb, max_minutes)}"
    )


def url(path: Path) -> str:
    """Where the server gives a file of its private folder."""
    return "gradio_api/file=" + quote(str(path))


def _limits(language: str, max_mb: float, max_minutes: float) -> str:
    limits = say(language, "limits", mb=f"{max_mb:g}", minutes=f"{max_minutes:g}")
    return f'<p class="ce-limits">{markup.text(limits)}</p>'


def _sizes(facts: Facts) -> Iterator[tuple[int, int] | None]:
    """(width, height) of each file's picture, None for sounds; `facts.sizes` has videos before images."""
    videos = facts.kinds.count("video")
    queues = {"video": iter(facts.sizes[:videos]), "image": iter(facts.sizes[videos:])}
    for kind in facts.kinds:
        yield next(queues[kind]) if kind in queues else None


def _player(path: Path, name: str, kind: str, size: tuple[int, int] | None) -> str:
    source, label = url(path), markup.text(name)
    # Its room is kept before the browser has read it: the page doesn't jump under a finger.
    room = "" if size is None else f'width="{size[0]}" height="{size[1]}" '
    if kind == "image":
        return f'<img {room}src="{source}" alt="{label}">'
    how = f"{room}playsinline " if kind == "video" else ""
    return f'<{kind} src="{source}" controls {how}preload="metadata" aria-label="{label}"></{kind}>'


def _facts(visitor: Visitor, language: str) -> str:
    facts = [f"{width} × {height}" for width, height in visitor.facts.sizes]
    if visitor.look.duration_s > 0:
        facts.append(f"{visitor.look.duration_s:.1f} s")
    facts.append(say(language, "with_sound" if visitor.facts.sound else "no_sound"))
    name = f'<span class="ce-name">{markup.text(" + ".join(visitor.names))}</span>'
    return name + "".join(f"<span>{markup.text(fact)}</span>" for fact in facts)
