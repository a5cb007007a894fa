"""Answers as files: JSON, CSV, SRT, VTT as links that hold their content, the annotated video as a file."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps.demo import markup
from crab_edge_apps.demo.stage import url
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.visitors import Visitor

from crab_edge.results import Answer, Event

if TYPE_CHECKING:
    from crab_edge.session import Model

_KINDS = {
    "json": "application/json",
    "csv": "text/csv",
    "srt": "application/x-subrip",
    "vtt": "text/vtt",
}


def rows(visitor: Visitor, model: Model) -> list[dict[str, Any]]:
    """Every answer about the clip with what it was made from and by; media by the names they were given."""
    about = {
        "media": list(visitor.names),
        "sha256": visitor.facts.sha256,
        "duration_s": visitor.look.duration_s,
        "bundle": model.bundle.identity,
        "engine": model.engine.describe(),
    }
    return [{**about, **answer.to_json()} for answer in answers(visitor)]


def answers(visitor: Visitor) -> list[Answer]:
    """All answers about the clip."""
    return [answer for turn in visitor.turns for answer in turn.answers]


def texts(visitor: Visitor, model: Model) -> dict[str, str]:
    """File type -> content. Subtitles only where there are events."""
    from crab_edge_apps._sinks import to_csv, to_srt, to_vtt

    made = rows(visitor, model)
    out = {"json": json.dumps(made, ensure_ascii=False, indent=1) + "\n", "csv": to_csv(made)}
    events = [result for answer in answers(visitor) for result in answer.parsed if isinstance(result, Event)]
    events = list(dict.fromkeys(events))
    if events:
        out["srt"], out["vtt"] = to_srt(events), to_vtt(events)
    return out


def stem(visitor: Visitor) -> str:
    """What exported files are called: the first medium's name, letters and digits of it."""
    name = Path(visitor.names[0]).stem if visitor.names else "clip"
    return re.sub(r"[^\w-]+", "-", name).strip("-")[:60] or "clip"


def links(visitor: Visitor | None, model: Model, language: str) -> str:
    """The card's content."""
    heading = markup.heading(say(language, "export"))
    if visitor is None or not visitor.turns:
        return heading + markup.empty("", say(language, "export_empty"))
    items = []
    for kind, content in texts(visitor, model).items():
        data = base64.b64encode(content.encode("utf-8", "replace")).decode()
        name = f"{stem(visitor)}.{kind}"
        items.append(
            f'<a class="ce-button" download="{markup.text(name)}" '
            f'href="data:{_KINDS[kind]};charset=utf-8;base64,{data}">{kind.upper()}</a>'
        )
    return f'{heading}<div class="ce-links">{"".join(items)}</div>'


def video_link(visitor: Visitor, path: Path, language: str) -> str:
    """A link to the annotated video."""
    name = markup.text(f"{stem(visitor)}.annotated.mp4")
    label = markup.text(say(language, "export_file_video"))
    return (
        f'<div class="ce-links"><a class="ce-button" download="{name}" href="{url(path)}">{label}</a></div>'
    )


def make_video(visitor: Visitor, progress: Callable[[float], None]) -> Path:
    """Draws all answers into the clip's video; in the decoding thread. `progress` gets the share done.

    The one made before stays, since the page may still be loading it; older ones go.
    """
    from crab_edge_apps._draw import annotate_video

    video = visitor.media[visitor.facts.kinds.index("video")]
    out = visitor.folder / f"annotated-{visitor.number}.mp4"
    annotate_video(video, _told(visitor), out, progress=progress)
    (visitor.folder / f"annotated-{visitor.number - 2}.mp4").unlink(missing_ok=True)
    visitor.number += 1
    return out


def _told(visitor: Visitor) -> Sequence[Answer]:
    """The last answer of each task and question."""
    return list({(answer.task, answer.question): answer for answer in answers(visitor)}.values())
