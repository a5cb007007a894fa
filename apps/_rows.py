"""`rows.jsonl`: appended row by row, safe to go on with after a kill; an error row may be replaced."""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from crab_edge import rows as layout
from crab_edge.errors import CrabError, InputError

if TYPE_CHECKING:
    from crab_edge.batch import Request
    from crab_edge.rows import Row

NAME = "rows.jsonl"
LOCK = ".rows.lock"
_SYNC_EVERY_S = 1.0


class RowFile:
    """The rows of one output folder, as a context manager that keeps a second run out.

    A row is known by its file's SHA-256 (its path if it couldn't be read), the bundle, the task and what else
    was asked (`layout.ASKED`): it is there once, whatever the number of runs. Error rows count as well,
    unless `retry_errors`: then they are tried again, and the new row takes the old one's place. Error rows
    go once another row says better what became of their file.
    `claim` and `add` may be called from different threads.
    """

    def __init__(
        self,
        folder: Path,
        *,
        bundle: str,
        engine: dict[str, Any],
        request: Request,
        retry_errors: bool = False,
    ) -> None:
        self.path = folder / NAME
        self._bundle, self._engine, self._request = bundle, engine, request
        self._retry_errors = retry_errors
        self._file = self._lock = -1
        self._end = 0
        self._synced_at = 0.0
        self._known: dict[tuple[str, ...], list[str]] = {}
        """Paths of the rows that are there, by content and task."""
        self._paths: set[tuple[str, str]] = set()
        """Path and task of those rows."""
        self._errors: set[tuple[Any, ...]] = set()
        self._failed: dict[tuple[str, str], dict[str, int]] = {}
        """Error rows that ask the same as this run, by content and task: path -> number of the line."""
        self._closed: set[tuple[str, str]] = set()
        """Content and task of rows about files that couldn't be opened."""
        self.opened = False
        """Whether a row that was claimed is about a file that could be opened."""
        self._lines = 0
        self._outdated: set[int] = set()
        self._learning = threading.Lock()
        self.replaced = False
        """Whether an error row has gone in this run: other rows say what it was about."""

    def __enter__(self) -> RowFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path.with_name(LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._hold()
            self._compact()
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._read()
        except OSError as error:
            self._close()
            raise InputError(
                f"{self.path}: can't be written ({error.strerror}); choose another --out"
            ) from error
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._sync()
            if self.replaced or self._outdated:
                self._compact()
        except (OSError, CrabError):
            pass  # The next run does it; until then `read_rows` leaves the old rows out.
        finally:
            self._close()

    def _close(self) -> None:
        for number in (self._file, self._lock):
            if number >= 0:
                os.close(number)
        self._file = self._lock = -1

    def _hold(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{self.path}: another run is writing it; wait for it or choose another --out"
            ) from None

    def _compact(self) -> None:
        """Writes the file anew without the error rows whose place later rows have taken, all or nothing."""
        if not self.path.exists():
            return
        _, gone = layout.superseded(self.path)
        gone |= self._outdated
        if not gone:
            return
        temporary = self.path.with_name(f".{NAME}.new")
        try:
            with open(self.path, "rb") as old, open(temporary, "wb") as new:
                new.writelines(line for number, line in enumerate(old) if number not in gone)
                new.flush()
                os.fsync(new.fileno())
            os.replace(temporary, self.path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def _read(self) -> None:
        """Learns the rows that are there; a last line without its end was cut by a kill and goes."""
        for row, end in layout.read_lines(self.path):
            self._end = end
            self._lines += 1
            asked = {name: row[name] for name in layout.ASKED} == self._asked(row["task"])
            path = str(layout.media_paths(row)[0])
            if asked:
                self._note_opened(row["sha256"], path, row["task"], row.get("duration_s"))
                self._outdate_moved(row["sha256"], path, row["task"])
                if not ("error" in row and self._retry_errors):
                    self._remember(row["sha256"], path, row["task"])
            if "error" in row:
                self._errors.add(layout.place(row))
                if asked:
                    self._failed.setdefault((row["sha256"] or path, row["task"]), {})[path] = self._lines - 1
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)
        os.lseek(self._file, self._end, os.SEEK_SET)

    def _asked(self, task: str) -> dict[str, Any]:
        """What a row says of its bundle and of what was asked."""
        from crab_edge import tasks

        request = self._request
        return {
            "bundle": self._bundle,
            "task": task,
            "question": request.asked(task) if task in tasks.names() else None,
            "grammar": request.grammar,
            "window_s": float(request.window_s),
            "stride_s": request.stride,
            "max_new_tokens": request.max_new_tokens,
        }

    def _remember(self, sha256: str | None, path: str, task: str) -> None:
        self._known.setdefault((sha256 or path, task), []).append(path)
        self._paths.add((path, task))

    def claim(self, sha256: str | None, media: str, task: str) -> bool:
        """Whether the row is already there; if not, it counts as there from now on.

        A copy of a file is another clip with rows of its own; a file that was only moved isn't. A file that
        can't be read (`sha256` None) is done where its path has a row.
        """
        path = os.path.abspath(media)
        with self._learning:
            known = self._known.get((sha256 or path, task), [])
            there = path in known or (sha256 is None and (path, task) in self._paths)
            if not there:
                moved = next((place for place, old in enumerate(known) if not os.path.exists(old)), None)
                if moved is None:
                    self._remember(sha256, path, task)
                    return False
                # An error row that has moved along is this file's own now.
                self._failed.get((sha256 or path, task), {}).pop(known[moved], None)
                known[moved] = path
                self._paths.add((path, task))
            if sha256 is not None:
                self.replaced |= self._outdate_unread(path, task)
            self.opened |= (sha256 or path, task) not in self._closed
            return True

    def _note_opened(self, sha256: str | None, path: str, task: str, duration_s: float | None) -> None:
        change = self._closed.add if duration_s is None else self._closed.discard
        change((sha256 or path, task))

    def _outdate_unread(self, path: str, task: str) -> bool:
        """The error row of what lies at `path` and couldn't be read then goes; whether there is one."""
        unread = self._failed.pop((path, task), {})
        self._outdated.update(unread.values())
        return bool(unread)

    def _outdate_moved(self, sha256: str | None, path: str, task: str) -> bool:
        """With a row for `path`, earlier error rows of its content go if their files did; whether any do."""
        same = self._failed.get((sha256, task), {}) if sha256 is not None else {}
        others = [old for old in same if old != path and not os.path.exists(old)]
        if not others or not os.path.exists(path):
            return False
        known = self._known.get((sha256 or path, task), [])
        known[:] = [old for old in known if old not in others]
        self._outdated.update(same.pop(old) for old in others)
        return True

    def add(self, row: Row) -> dict[str, Any]:
        """Appends one row and returns it as it was written.

        No kill can take it then; against a power cut, rows are synced at most once a second, with the next
        row, and at the end. CrabError if it can't be written: the file is as it was before.
        """
        asked = self._asked(row.task)
        del asked["task"]
        content = row.to_json(engine=self._engine, **asked)
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._take_back()
            raise self._unwritable(error) from error
        self._end += len(line)
        place = layout.place(content)
        path = str(layout.media_paths(content)[0])
        with self._learning:
            self._note_opened(row.sha256, path, row.task, row.duration_s)
            moved = self._outdate_moved(row.sha256, path, row.task)
            self.replaced |= moved or place in self._errors
            key = row.sha256 or path, row.task
            if row.error is not None:
                self._errors.add(place)
                self._failed.setdefault(key, {})[path] = self._lines
            elif key in self._failed:
                self._failed[key].pop(path, None)
            self._lines += 1
        if time.monotonic() - self._synced_at >= _SYNC_EVERY_S:
            self._sync()
        return content

    def _sync(self) -> None:
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._unwritable(error) from error
        self._synced_at = time.monotonic()

    def _unwritable(self, error: OSError) -> CrabError:
        return CrabError(
            f"{self.path}: can't be written ({error.strerror}); make room and run the same command again"
        )

    def _take_back(self) -> None:
        """Half a line goes as far as the disk allows; the next run would drop it as well."""
        try:
            os.ftruncate(self._file, self._end)
            os.lseek(self._file, self._end, os.SEEK_SET)
        except OSError:
            pass

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that are there, each counted once."""
        return layout.read_rows(self.path, without=frozenset(self._outdated))
