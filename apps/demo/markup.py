"""Small pieces of HTML. Everything that comes from files, people or models passes through `text`."""

from __future__ import annotations

import functools
import html


def text(value: object) -> str:
    """Escaped for element content and quoted attributes; control characters are dropped."""
    shown = "".join(c for c in str(value) if c.isprintable() or c in "\n\t")
    # Gradio fills templates of `${...}` and `{{...}}`: no text may look like one.
    return html.escape(shown, quote=True).replace("$", "&#36;").replace("{", "&#123;").replace("`", "&#96;")


@functools.lru_cache(maxsize=1000)
def colour(label: str) -> str:
    """A style that gives a label its colour: the one it has in annotated pictures and videos."""
    from crab_edge_apps._draw.results import colours

    red, green, blue = next(iter(colours([label]).values()))
    return f"--ce-own:rgb({red},{green},{blue})"


def seconds(value: float) -> str:
    """A duration for people: 8 ms, 0.42 s, 12.3 s."""
    if value < 0.0995:
        return f"{value * 1000:.0f} ms"
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def clock(value: float, tenths: bool = False) -> str:
    """A place in a clip: 0:07 or 0:07.5."""
    minutes, rest = divmod(round(value, 1) if tenths else int(value), 60)
    return f"{int(minutes)}:{rest:04.1f}" if tenths else f"{int(minutes)}:{int(rest):02d}"


def empty(title: str, explanation: str, icon: str = "") -> str:
    """What stands where nothing is yet."""
    mark = f'<div class="ce-empty-icon" aria-hidden="true">{icon}</div>' if icon else ""
    heading = f"<strong>{text(title)}</strong>" if title else ""
    return f'<div class="ce-empty">{mark}{heading}<p>{text(explanation)}</p></div>'


def error(title: str, reason: str) -> str:
    """An error people can read."""
    return f'<div class="ce-error" role="alert"><strong>{text(title)}</strong><p>{text(reason)}</p></div>'


def heading(title: str, hint: str = "") -> str:
    """A card's heading."""
    small = f'<span class="ce-hint">{text(hint)}</span>' if hint else ""
    return f'<div class="ce-heading"><h2>{text(title)}</h2>{small}</div>'
