"""Hands clips out to workers that may die, and takes every clip's rows back exactly once.

Nothing here knows what a worker is: `_ray` has them on other machines, tests in this process.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from crab_edge.batch import Request, Skip, identify
from crab_edge.errors import CrabError, EngineError
from crab_edge.rows import Row, RowError

if TYPE_CHECKING:
    from crab_edge.clip import Clip

ATTEMPTS = 3
"""A clip whose worker died is tried so often in all; it may be what kills them."""
CLIPS_AT_ONCE = 4
"""Clips given to a worker together, so that it decodes ahead."""
_PATIENCE_S = 120.0
"""Without any worker, so long is waited for a new one."""


@dataclass
class Item:
    """One file on the work list, with the tasks that it lacks."""

    path: Path
    names: tuple[str, ...]
    sha256: str | None = None
    attempts: int = 0
    error: RowError | None = None

    def rows(self, error: RowError) -> list[Row]:
        """Error rows for all of its tasks."""
        return [Row((str(self.path),), name, self.sha256, error=error) for name in self.names]


@dataclass(frozen=True)
class News:
    """What a worker did: it is `ready`, answered a file (`rows`), finished all it was given, or is `dead`."""

    worker: Hashable
    kind: str
    rows: Sequence[Row] = ()
    reason: str = ""


class Crew(Protocol):
    """Workers. None of these calls waits for a worker but `wait`."""

    def start(self) -> Hashable:
        """Begins to start a worker; `wait` tells when it is ready."""

    def give(self, worker: Hashable, work: Sequence[tuple[Path, tuple[str, ...]]], request: Request) -> None:
        """Work for a ready worker: it tells of each file's rows together and then that it has finished."""

    def wait(self, timeout_s: float) -> Iterable[News]:
        """News since the last call; none after the timeout. An error of this call ends the run."""

    def halt(self) -> None:
        """Asks workers to begin no further file."""

    def close(self) -> None:
        """Lets the workers go."""


@dataclass
class CrewProducer:
    """A `crab_edge.batch.Producer` over a crew of `size` workers."""

    crew: Crew
    bundle: str
    engine: dict[str, Any]
    size: int
    idle: set[Hashable] = field(default_factory=set)
    busy: dict[Hashable, list[Item]] = field(default_factory=dict)
    deaths: int = 0
    clock: Callable[[], float] = time.monotonic

    def close(self) -> None:
        """Lets the workers go."""
        self.crew.close()

    def produce(
        self, files: Iterable[Path], request: Request, skip: Skip, stop: threading.Event
    ) -> Iterator[tuple[Row, Clip | None]]:
        """See `Producer`. A worker's death costs nothing but time, unless a clip keeps killing workers."""
        feed = _Feed(files, request, skip, stop, 2 * self.size * CLIPS_AT_ONCE)
        again: deque[Item] = deque()
        halted = False
        alone_since: float | None = None
        fruitless = 0
        try:
            while True:
                if stop.is_set():
                    if not halted:
                        self.crew.halt()
                        halted = True
                else:
                    for item in self._hand_out(feed, again, request):
                        for row in item.rows(item.error or RowError("CrabError", "no reason given")):
                            yield row, None
                if not any(self.busy.values()) and (halted or (feed.empty() and not again)):
                    break
                for news in self.crew.wait(0.1):
                    for row in self._learn(news, halted):
                        yield row, None
                    if news.kind == "rows":
                        fruitless = 0
                    elif news.kind == "dead":
                        fruitless += 1
                        for item in self._bury(news, halted):
                            if item.error is None:
                                again.append(item)
                            else:
                                for row in item.rows(item.error):
                                    yield row, None
                if fruitless > 2 * ATTEMPTS * self.size:
                    raise EngineError(
                        f"{fruitless} workers died in a row and none answered; the last: {news.reason}"
                    )
                if self.idle or self.busy:
                    alone_since = None
                elif alone_since is None:
                    alone_since = self.clock()
                elif self.clock() - alone_since > _PATIENCE_S:
                    raise EngineError(
                        f"no worker has come up for {_PATIENCE_S:.0f} s; check the cluster and run again"
                    )
            feed.check()
        finally:
            feed.close()

    def _hand_out(self, feed: _Feed, again: deque[Item], request: Request) -> list[Item]:
        """Gives idle workers work; returns the items that need none, since they can't be read."""
        failed: list[Item] = []
        for worker in list(self.idle):
            items = [again.popleft()] if again else []
            while not (items and items[0].attempts) and len(items) < CLIPS_AT_ONCE:
                item = feed.take()
                if item is None:
                    break
                (items if item.error is None else failed).append(item)
            if items:
                self.idle.discard(worker)
                self.busy[worker] = items
                self.crew.give(worker, [(item.path, item.names) for item in items], request)
        return failed

    def _learn(self, news: News, halted: bool) -> Sequence[Row]:
        """Notes what a worker did; the rows that are new."""
        if news.kind == "ready":
            self.idle.add(news.worker)
        elif news.kind == "done":
            left = self.busy.pop(news.worker, [])
            self.idle.add(news.worker)
            if left and not halted:
                raise CrabError(f"a worker left out {left[0].path} and {len(left) - 1} further files")
        elif news.kind == "rows" and news.rows:
            mine = self.busy.get(news.worker, [])
            path = news.rows[0].media[0]
            found = next((item for item in mine if str(item.path) == path), None)
            if found is None:
                raise CrabError(f"a worker answered {path}, which it wasn't asked about")
            mine.remove(found)
            return news.rows
        return ()

    def _bury(self, news: News, halted: bool) -> list[Item]:
        """Takes a dead worker's files back and starts another worker in its place.

        Those that it had begun or read ahead come back one by one, so that the one that kills is found.
        """
        self.deaths += 1
        self.idle.discard(news.worker)
        left = self.busy.pop(news.worker, [])
        for item in left:
            item.attempts += 1
            if item.attempts >= ATTEMPTS:
                item.error = RowError.of(
                    EngineError(f"{item.attempts} workers died over this file; the last: {news.reason}")
                )
        if not halted:
            self.crew.start()
            return left
        return [item for item in left if item.error is not None]


class _Feed:
    """The work list, read and hashed in a thread, since it may block and files may be large."""

    def __init__(
        self, files: Iterable[Path], request: Request, skip: Skip, stop: threading.Event, size: int
    ) -> None:
        self._items: queue.Queue[Item] = queue.Queue(maxsize=size)
        self._closed = threading.Event()
        self._ended = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(
            target=self._read, args=(files, request, skip, stop), name="work-list", daemon=True
        )
        self._thread.start()

    def _read(self, files: Iterable[Path], request: Request, skip: Skip, stop: threading.Event) -> None:
        try:
            for path in files:
                if stop.is_set() or self._closed.is_set():
                    return
                # A worker has a working directory of its own.
                path = Path(os.path.abspath(path))
                item = Item(path, request.tasks)
                try:
                    item.sha256 = identify(path)
                except CrabError as error:
                    item.error = RowError.of(error)
                item.names = tuple(n for n in item.names if not skip(item.sha256, str(path), n))
                while item.names and not self._closed.is_set():
                    try:
                        self._items.put(item, timeout=0.2)
                        break
                    except queue.Full:
                        continue
        except Exception as error:
            self._failure = error
        finally:
            self._ended.set()

    def take(self) -> Item | None:
        """The next item, None if there is none at the moment."""
        try:
            return self._items.get_nowait()
        except queue.Empty:
            return None

    def empty(self) -> bool:
        """Whether nothing is left and nothing will come."""
        return self._ended.is_set() and self._items.empty()

    def check(self) -> None:
        """Raises what went wrong with the list itself."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Ends the thread, unless it is in a list that blocks."""
        self._closed.set()
        self._thread.join(timeout=1.0)
