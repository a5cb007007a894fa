"""`rows.csv`: one line for each result, in columns that spreadsheets and pandas read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from crab_edge_apps._sinks.files import ready, replaced, trouble
from crab_edge_apps._text import printable

from crab_edge.errors import CrabError

if TYPE_CHECKING:
    from crab_edge.clip import Clip

COLUMNS = (
    "media",
    "sha256",
    "duration_s",
    "bundle",
    "task",
    "question",
    "type",
    "label",
    "modality",
    "start_s",
    "end_s",
    "x1",
    "y1",
    "x2",
    "y2",
    "points",
    "mask",
    "text",
    "raw",
    "error",
)
# Spreadsheets take a cell that begins so for a formula and may run it.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def to_csv(rows: Iterable[Any]) -> str:
    """Rows or answers (as JSON or `Answer`) as CSV: UTF-8 text with a header, one line for each result.

    A row without results has one line; `error` holds an error row's message. `points` are "x y; x y", `mask`
    is COCO's uncompressed run lengths as JSON. Text that a spreadsheet would run gets a leading apostrophe.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerows(lines(row if isinstance(row, Mapping) else row.to_json()))
    return out.getvalue()


def lines(row: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The lines of one row."""
    error = row.get("error")
    same = {name: row.get(name) for name in ("sha256", "duration_s", "bundle", "task", "question", "raw")}
    same["media"] = "; ".join(str(path) for path in row.get("media") or ())
    if error:
        same["error"] = f"{error.get('type')}: {error.get('message')}"
    for result in row.get("parsed") or [{}]:
        cells = {**same, **_columns(result)}
        yield [_cell(cells.get(name)) for name in COLUMNS]


def _columns(result: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in result.items() if name in COLUMNS}
    kind = result.get("type")
    if kind == "points":
        found["points"] = "; ".join(f"{x:g} {y:g}" for x, y in result["xy"])
    elif kind == "mask":
        size = [result["height"], result["width"]]
        found["mask"] = json.dumps(
            {"size": size, "counts": list(result["counts"]), "source": result["source"]},
            separators=(",", ":"),
        )
    elif kind == "choice":
        found["text"] = result["value"]
    elif kind == "unparsed":
        found["text"] = result["reason"]
    return found


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = printable(value.encode("utf-8", "backslashreplace").decode())
    return "'" + text if text.lstrip(" \n").startswith(_FORMULA) else text


class CsvSink:
    """`rows.csv`, rewritten when a run begins and appended to as rows come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._replacing: Any = None
        self._writer: Any = None

    def begin(self) -> None:
        """Starts a new file; the old one stays until `end`."""
        ready(self._path.parent)
        self._replacing = replaced(self._path)
        self._writer = csv.writer(self._replacing.__enter__())
        self._writer.writerow(COLUMNS)

    def add(self, row: dict[str, Any], clip: Clip | None) -> None:
        """Writes the lines of one row; they are with the operating system when this returns."""
        try:
            self._writer.writerows(lines(row))
            if self._file is not None:
                self._file.flush()
        except OSError as error:
            raise trouble(self._path, error) from error

    def end(self) -> None:
        """Puts the new file in place."""
        self._replacing.__exit__(None, None, None)
        self._replacing = None
        try:
            self._file = open(self._path, "a", encoding="utf-8", errors="backslashreplace", newline="")
        except OSError as error:
            raise trouble(self._path, error) from error
        self._writer = csv.writer(self._file)

    def close(self) -> None:
        """Closes the file; a new one that isn't in place yet goes."""
        if self._replacing is not None:
            error = CrabError("closed before its end")
            with suppress(CrabError):
                self._replacing.__exit__(CrabError, error, None)
            self._replacing = None
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except OSError as error:
                raise trouble(self._path, error) from error
