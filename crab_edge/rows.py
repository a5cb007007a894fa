"""Rows: what comes of one clip and one task, in memory and as a line of `rows.jsonl`.

`docs/rows.md` describes the line; `row.schema.json` beside this file is its JSON schema.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from crab_edge.errors import InputError
from crab_edge.results import Answer

ROW_VERSION = 3
#: Fields that, with the clip, say which row it is: another value of one makes another row.
ASKED = ("bundle", "task", "question", "grammar", "window_s", "stride_s", "max_new_tokens")


@dataclass(frozen=True)
class RowError:
    """Why there is no answer: the error's type and its message on one line."""

    type: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> RowError:
        """From an exception."""
        return cls(type(error).__name__, " ".join(clean(str(error)).split()) or "no message")


@dataclass(frozen=True)
class Row:
    """What came of one file and one task: an answer or an error. Can be pickled."""

    media: tuple[str, ...]
    """Paths of the clip's files as they were given."""
    task: str
    sha256: str | None
    """Of the file's bytes; None if it couldn't be read."""
    duration_s: float | None = None
    answer: Answer | None = None
    error: RowError | None = None

    def to_json(
        self,
        *,
        bundle: str,
        engine: dict[str, Any],
        question: str | None = None,
        grammar: bool = True,
        window_s: float | None = None,
        stride_s: float | None = None,
        max_new_tokens: int | None = None,
    ) -> dict[str, Any]:
        """The row as it stands in `rows.jsonl`."""
        paths = [os.path.abspath(path) for path in self.media]
        row: dict[str, Any] = {"version": ROW_VERSION, "media": [clean(path) for path in paths]}
        if any(path != text for path, text in zip(paths, row["media"], strict=True)):
            row["media_base64"] = [base64.b64encode(os.fsencode(path)).decode() for path in paths]
        row |= {
            "sha256": self.sha256,
            "duration_s": self.duration_s,
            "bundle": bundle,
            "engine": engine,
            "task": self.task,
            "question": question,
            "grammar": grammar,
            "window_s": window_s,
            "stride_s": stride_s,
            "max_new_tokens": max_new_tokens,
        }
        if self.answer is not None:
            said = self.answer.to_json()
            return row | {name: said[name] for name in ("raw", "parsed", "timings", "notices")}
        error = self.error or RowError("CrabError", "no answer")
        return row | {"error": {"type": error.type, "message": error.message}}


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a row of this version."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("row.schema.json").read_text("utf-8"))
    return found


def clean(text: str) -> str:
    """Text that every JSON reader takes: bytes of a name that aren't UTF-8 become U+FFFD."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def media_paths(row: dict[str, Any]) -> list[Path]:
    """The true paths of a row's files, names that aren't UTF-8 included."""
    if "media_base64" in row:
        return [Path(os.fsdecode(base64.b64decode(text))) for text in row["media_base64"]]
    return [Path(text) for text in row["media"]]


def place(row: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for rows about the same path that ask the same: a later one takes an error row's place."""
    return (*map(str, media_paths(row)), *(row[name] for name in ASKED))


def read_lines(path: str | Path) -> Iterator[tuple[dict[str, Any], int]]:
    """Every line of a row file, with the offset of its end; a last line without its end is left out.

    InputError for a line that is no row of this version, naming it.
    """
    with open(path, "rb") as file:
        yield from _lines(path, file)


def _lines(path: str | Path, file: BinaryIO) -> Iterator[tuple[dict[str, Any], int]]:
    end = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return
        end += len(line)
        yield _row(path, number, line), end


def _row(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        version = row["version"]
        if version == ROW_VERSION:
            place(row)
            row["sha256"]
    except (ValueError, TypeError, KeyError):
        raise InputError(
            f"{path}: line {number} is no row of `crab-edge analyze`; choose another --out"
        ) from None
    if version != ROW_VERSION:
        raise InputError(
            f"{path}: line {number} has row version {version}, expected {ROW_VERSION}; choose another --out"
        )
    return row


def read_rows(path: str | Path, *, without: Collection[int] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a folder or file that `crab-edge analyze` wrote, as dictionaries, each counted once.

    While a run is under way, the file may hold an error row and, later, the row of the same path that takes
    its place; here only the later one comes. `without`: numbers (from 0) of lines to leave out as well.
    InputError for a file that isn't one.
    """
    file = Path(path) / "rows.jsonl" if Path(path).is_dir() else Path(path)
    try:
        # Opened once: a run that ends meanwhile puts another file in its place.
        with file.open("rb") as opened:
            count, gone = _superseded(_lines(file, opened))
            opened.seek(0)
            for number, (row, _) in zip(range(count), _lines(file, opened), strict=False):
                if number not in gone and number not in without:
                    yield row
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}); give the --out of a run") from error


def superseded(path: Path) -> tuple[int, set[int]]:
    """How many rows a file has, and the numbers (from 0) of the error rows whose place a later one takes."""
    return _superseded(read_lines(path))


def _superseded(lines: Iterable[tuple[dict[str, Any], int]]) -> tuple[int, set[int]]:
    waiting: dict[tuple[Any, ...], int] = {}
    gone: set[int] = set()
    count = 0
    for number, (row, _) in enumerate(lines):
        count += 1
        key = place(row)
        earlier = waiting.pop(key, None)
        if earlier is not None:
            gone.add(earlier)
        if "error" in row:
            waiting[key] = number
    return count, gone
