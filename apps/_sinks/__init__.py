"""What `crab-edge analyze` writes beside `rows.jsonl`: a table, subtitles, annotated videos and pictures.

The rows stay the truth: every sink can be made again from them, and is whenever a run begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from crab_edge_apps._sinks.subtitles import to_srt, to_vtt
from crab_edge_apps._sinks.table import to_csv

from crab_edge.errors import InputError

if TYPE_CHECKING:
    from crab_edge.clip import Clip

__all__ = ["NAMES", "Row", "Sink", "Sinks", "open_sinks", "to_csv", "to_srt", "to_vtt"]

NAMES = ("csv", "srt", "vtt", "video")
#: Folder of the annotated videos and pictures, below the output folder.
DRAWN = "video"

Row = dict[str, Any]


class Sink(Protocol):
    """One form of the rows. A file it can't write is a CrabError; the row is in `rows.jsonl` by then."""

    def begin(self) -> None:
        """The rows that are there already follow, by `add`, then `end`."""

    def add(self, row: Row, clip: Clip | None) -> None:
        """Takes one row; `clip` if it is still open."""

    def end(self) -> None:
        """No more rows that were there before; later ones are new."""

    def close(self) -> None:
        """Releases files."""


def open_sinks(
    names: Sequence[str], out: Path, *, notice: Callable[[str], None] | None = None, **options: Any
) -> Sinks:
    """The sinks named, writing below the folder `out`; a context manager.

    notice: told, in one line, what a sink leaves out. InputError for an unknown name, DependencyError for a
    sink that needs a package which isn't there.
    """
    if options:
        raise TypeError(f"unknown options of sinks: {', '.join(options)}")
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise InputError(
            f"unknown sink {unknown[0]!r}; there are: {', '.join(NAMES)} (JSONL is always written)"
        )
    return Sinks([_open(name, out, notice or (lambda text: None)) for name in dict.fromkeys(names)])


def _open(name: str, out: Path, notice: Callable[[str], None]) -> Sink:
    if name == "csv":
        from crab_edge_apps._sinks.table import CsvSink

        return CsvSink(out / "rows.csv")
    if name in ("srt", "vtt"):
        from crab_edge_apps._sinks.subtitles import SubtitleSink

        return SubtitleSink(out / name, name)
    from crab_edge_apps._sinks.pictures import PictureSink

    return PictureSink(out / DRAWN, notice)


class Sinks:
    """Several sinks as one. `add` before any `rebuild` starts from no rows."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = sinks
        self._begun = False

    def rebuild(self, rows: Iterable[Row]) -> None:
        """Makes the sinks hold exactly these rows. Called when a run begins, with those of earlier runs."""
        self._begun = True
        for sink in self._sinks:
            sink.begin()
        if self._sinks:
            for row in rows:
                for sink in self._sinks:
                    sink.add(row, None)
        for sink in self._sinks:
            sink.end()

    def add(self, row: Row, clip: Clip | None = None) -> None:
        """Takes a new row, which is on disk already. `clip`: what was analysed, if it is open."""
        if not self._begun:
            self.rebuild(())
        for sink in self._sinks:
            sink.add(row, clip)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()
