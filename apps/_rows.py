"""`rows.jsonl`: appended row by row, never rewritten, safe to go on with after a kill."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from crab_edge.errors import CrabError, InputError

if TYPE_CHECKING:
    from crab_edge.batch import Row

NAME = "rows.jsonl"


class RowFile:
    """The rows of one output folder, as a context manager that keeps a second run out.

    A row is known by its file's SHA-256 (its path if it couldn't be read), the bundle, the task, the question
    and whether it was held to the task's grammar: it is written once, whatever the number of runs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bundle: str,
        engine: dict[str, Any],
        question: str | None,
        grammar: bool = False,
    ) -> None:
        self.path = folder / NAME
        self._bundle, self._engine, self._question = bundle, engine, question
        self._grammar = grammar
        self._file: BinaryIO | None = None
        self._known: dict[tuple[str, str], list[str]] = {}
        """Paths of the rows that are there, by content and task."""

    def __enter__(self) -> RowFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b")
        except OSError as error:
            raise InputError(
                f"{self.path}: can't be written ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(
                f"{self.path}: another run is writing it; wait for it or choose another --out"
            ) from None
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read(self) -> None:
        """Learns the rows that are there; a last line without its end was cut by a kill and goes."""
        assert self._file is not None
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            if not line.endswith(b"\n"):
                break
            end += len(line)
            try:
                row = json.loads(line)
                self._learn(row)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):
                raise InputError(
                    f"{self.path}: line {number} is no row of `crab-edge analyze`; choose another --out"
                ) from None
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _learn(self, row: dict[str, Any]) -> None:
        same = row["bundle"] == self._bundle and row.get("grammar", False) == self._grammar
        if same and row.get("question") == self._asked(row["task"]):
            self._remember(row["sha256"], row["media"][0], row["task"])

    def _remember(self, sha256: str | None, media: str, task: str) -> None:
        path = os.path.abspath(media)
        self._known.setdefault((sha256 or path, task), []).append(path)

    def _asked(self, task: str) -> str | None:
        from crab_edge import tasks

        needs = task in tasks.names() and tasks.get(task).needs_question
        return self._question if needs else None

    def claim(self, sha256: str | None, media: str, task: str) -> bool:
        """Whether the row is already there; if not, it counts as there from now on.

        A copy of a file is another clip with rows of its own; a file that was only moved isn't.
        """
        path = os.path.abspath(media)
        known = self._known.get((sha256 or path, task), [])
        if path in known:
            return True
        moved = next((place for place, old in enumerate(known) if not os.path.exists(old)), None)
        if moved is not None:
            known[moved] = path
            return True
        self._remember(sha256, media, task)
        return False

    def add(self, row: Row) -> None:
        """Appends one row; it is with the operating system when this returns."""
        assert self._file is not None
        content = row.to_json(bundle=self._bundle, engine=self._engine, question=self._asked(row.task))
        if self._grammar:
            content["grammar"] = True
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        place = self._file.tell()
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            self._forget(place)
            raise CrabError(
                f"{self.path}: can't be written ({error.strerror}); make room and run the same command again"
            ) from error

    def _forget(self, place: int) -> None:
        """Takes a half-written line back as far as the disk allows; the next run would drop it as well."""
        assert self._file is not None
        try:
            os.ftruncate(self._file.fileno(), place)
        except OSError:
            pass
