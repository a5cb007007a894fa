"""The opened clip: its player, or what to do when there is none."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.visitors import Visitor

_ICON = (
    '<svg viewBox="0 0 48 48" fill="none" stroke="currentColor" stroke-width="2.2" stroke-linecap="round" '
    'stroke-linejoin="round"><rect x="5" y="10" width="38" height="28" rx="5"/><path d="M20 18.5v11l9-5.5z"/>'
    '<path d="M11 43h26"/></svg>'
)


def nothing(language: str, max_mb: float, max_minutes: float) -> str:
    """The empty stage."""
    limits = say(language, "limits", mb=f"{max_mb:g}", minutes=f"{max_minutes:g}")
    box = markup.empty(say(language, "empty_title"), say(language, "empty_text"), _ICON)
    return f'<div class="ce-stage ce-drop">{box}<p class="ce-limits">{markup.text(limits)}</p></div>'


def opened(visitor: Visitor, language: str) -> str:
    """Players for the clip's files and one line of facts."""
    assert visitor.session is not None or visitor.look is not None
    players = "".join(_players(visitor))
    unplayable = f'<p class="ce-note ce-unplayable" hidden>{markup.text(say(language, "no_player"))}</p>'
    notices = "".join(f'<p class="ce-note">{markup.text(notice)}</p>' for notice in _notices(visitor))
    return (
        f'<figure class="ce-stage ce-drop" id="ce-player">{players}{unplayable}'
        f'<figcaption class="ce-facts">{_facts(visitor, language)}</figcaption></figure>{notices}'
    )


def url(path: Path) -> str:
    """Where the server gives a file of its private folder."""
    return "gradio_api/file=" + quote(str(path))


def _players(visitor: Visitor) -> list[str]:
    session = visitor.session
    if session is None:
        return []
    clip = session.clip
    pictured = {video.path for video in clip.videos}
    out = []
    for path, name in zip(visitor.media, visitor.names, strict=True):
        source, label = url(path), markup.text(name)
        if path in pictured:
            out.append(
                f'<video src="{source}" controls playsinline preload="metadata" aria-label="{label}"></video>'
            )
        elif any(image.path == path for image in clip.images):
            out.append(f'<img src="{source}" alt="{label}">')
        else:
            out.append(f'<audio src="{source}" controls preload="metadata" aria-label="{label}"></audio>')
    return out


def _facts(visitor: Visitor, language: str) -> str:
    facts = []
    if visitor.session is not None:
        clip = visitor.session.clip
        facts += [f"{video.width} × {video.height}" for video in clip.videos]
        facts += [f"{image.width} × {image.height}" for image in clip.images]
        if clip.duration_s > 0:
            facts.append(f"{clip.duration_s:.1f} s")
        facts.append(say(language, "with_sound" if clip.audios else "no_sound"))
    name = f'<span class="ce-name">{markup.text(" + ".join(visitor.names))}</span>'
    return name + "".join(f"<span>{markup.text(fact)}</span>" for fact in facts)


def _notices(visitor: Visitor) -> list[str]:
    from crab_edge_apps.demo.visitors import renamed

    if visitor.session is None:
        return []
    return [renamed(notice, visitor.media, visitor.names) for notice in visitor.session.notices]
