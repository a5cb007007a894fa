"""Events as subtitles, SRT or WebVTT: a cue for each label and time, a file for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps._sinks.files import file_name, ready, replaced
from crab_edge_apps._text import printable

if TYPE_CHECKING:
    from crab_edge.clip import Clip

_PERCEIVED = {"audio": " (heard)", "visual": " (seen)"}
# SRT has no way to escape; what players take for markup is written with signs that look alike.
_SRT_SIGNS = str.maketrans({"<": "\u2039", ">": "\u203a", "{": "(", "}": ")", "\\": "/"})
_VTT_SIGNS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_SHORTEST_MS = 1


def to_srt(events: Iterable[Any]) -> str:
    """Events (typed or as JSON; other results are passed over) as SRT, in order of time."""
    cues = enumerate(_cues(events, ","), 1)
    return "".join(
        f"{n}\n{start} --> {end}\n{text.translate(_SRT_SIGNS)}\n\n" for n, (start, end, text) in cues
    )


def to_vtt(events: Iterable[Any]) -> str:
    """Events (typed or as JSON; other results are passed over) as WebVTT, in order of time."""
    cues = _cues(events, ".")
    return "WEBVTT\n\n" + "".join(
        f"{start} --> {end}\n{text.translate(_VTT_SIGNS)}\n\n" for start, end, text in cues
    )


def _cues(events: Iterable[Any], point: str) -> list[tuple[str, str, str]]:
    """(start, end, text) in order of time; what is seen and heard at the same time is one cue."""
    found: dict[tuple[int, int, str], set[str]] = {}
    for event in events:
        given = event if isinstance(event, Mapping) else vars(event)
        if "start_s" in given:
            start = max(0, round(1000 * given["start_s"]))
            end = max(start + _SHORTEST_MS, round(1000 * given["end_s"]))
            label = printable(" ".join(str(given["label"]).split()), keep="") or "(unnamed)"
            found.setdefault((start, end, label), set()).update(given["modality"].split("-"))
    return [
        (_clock(start, point), _clock(end, point), label + (_PERCEIVED[ways.pop()] if len(ways) == 1 else ""))
        for (start, end, label), ways in sorted(found.items())
    ]


def _clock(milliseconds: int, point: str) -> str:
    seconds, rest = divmod(milliseconds, 1000)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{point}{rest:03d}"


class SubtitleSink:
    """A file for each row of a task that finds events; a row without any gives none."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder, kind
        self._write = to_srt if kind == "srt" else to_vtt

    def begin(self) -> None:
        """Makes the folder."""
        ready(self._folder)

    def add(self, row: dict[str, Any], clip: Clip | None) -> None:
        """Writes the row's events."""
        if any(result.get("type") == "event" for result in row.get("parsed") or ()):
            with replaced(self._folder / file_name(row, f".{self._kind}")) as file:
                file.write(self._write(row["parsed"]))

    def end(self) -> None:
        """Nothing is left open."""

    def close(self) -> None:
        """Nothing is left open."""
