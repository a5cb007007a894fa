"""Files that come in while a run lasts: each one once it has stopped growing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

#: Names under which browsers, copy tools and recorders keep what isn't whole yet.
TEMPORARY = (
    ".part",
    ".partial",
    ".tmp",
    ".temp",
    ".crdownload",
    ".download",
    ".filepart",
    ".swp",
    ".lock",
    "~",
)
SETTLE_S = 5.0
POLL_S = 1.0


@dataclass
class _Seen:
    state: tuple[int, int]
    since: float
    taken: bool = False


class Settled:
    """Remembers how files looked, and says which of them have come to rest.

    A file has, when its size and time of change have stayed as they are for `settle_s` seconds; at the first
    look the clock time tells how long that has been. Empty files are still to be written. A file that changes
    later comes again.
    """

    def __init__(self, settle_s: float = SETTLE_S) -> None:
        self.settle_s = settle_s
        self._seen: dict[Path, _Seen] = {}
        self._first = True

    def look(self, files: Iterable[Path], now: float, clock_time: float) -> list[Path]:
        """The files that have come to rest since the last look.

        now: seconds of a clock that never jumps; clock_time: the time of day, as files carry it.
        """
        seen, ready = {}, []
        for path in files:
            state = _state(path)
            if state is None or path in seen:
                continue
            size, changed_ns = state
            entry = self._seen.get(path)
            if entry is None or entry.state != state:
                quiet = clock_time - changed_ns / 1e9 if self._first else 0.0
                entry = _Seen(state, now - max(0.0, quiet))
            seen[path] = entry
            if size and not entry.taken and now - entry.since >= self.settle_s:
                entry.taken = True
                ready.append(path)
        self._seen, self._first = seen, False  # what is gone is forgotten
        return ready


def watch(
    list_files: Callable[[], Iterable[Path]],
    stop: threading.Event,
    *,
    settle_s: float = SETTLE_S,
    poll_s: float = POLL_S,
) -> Iterator[Path]:
    """Files as they come to rest, until `stop`. `list_files` is called again for each look."""
    settled = Settled(settle_s)
    while not stop.is_set():
        for path in settled.look(list_files(), time.monotonic(), time.time()):
            if stop.is_set():
                return
            yield path
        stop.wait(poll_s)


def _state(path: Path) -> tuple[int, int] | None:
    """Size and time of change; None for what isn't there, isn't a file or has a temporary name."""
    if path.name.lower().endswith(TEMPORARY) or path.name.startswith("."):
        return None
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return (info.st_size, info.st_mtime_ns) if os.path.isfile(path) else None
