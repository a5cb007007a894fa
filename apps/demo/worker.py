"""One thread for the model, one for decoding, each with a bounded queue.

However many people use the page, one answer runs at a time and one clip is decoded at a time, so memory
doesn't grow with the visitors. Jobs run in threads; their events are read in the server's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from crab_edge.errors import CrabError

TICK_S = 0.25


class Busy(CrabError):
    """The queue is full; try again later."""


class Tick:
    """Nothing has happened for a while; `ahead` jobs are to be done first (0: it is running)."""

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead


class Job:
    """Work on its way through a `Worker`. Iterate `events` for what it emits; `result` is its end."""

    def __init__(self, work: Callable[[Job], Any], worker: Worker) -> None:
        self._work = work
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        self._cancelled = threading.Event()
        self.finished = threading.Event()
        self.result: Any = None
        self.failed = False

    def cancel(self) -> None:
        """Asks the job to end soon."""
        self._cancelled.set()

    def cancelled(self) -> bool:
        """Whether it was asked to end."""
        return self._cancelled.is_set()

    def withdraw(self) -> bool:
        """Takes it out of its worker's queue; False if it has begun."""
        return self._worker.withdraw(self)

    def emit(self, event: Any) -> None:
        """From the job's thread: hands an event to whoever reads `events`."""
        self._send("event", event)

    async def events(self) -> AsyncIterator[Any]:
        """What the job emits, `Tick`s while it emits nothing; raises what the job raised.

        Closing it early cancels the job.
        """
        try:
            while True:
                try:
                    kind, value = await asyncio.wait_for(self._events.get(), TICK_S)
                except asyncio.TimeoutError:
                    yield Tick(self._worker.ahead(self))
                    continue
                if kind == "end":
                    self.result = value
                    return
                if kind == "error":
                    raise value
                yield value
        finally:
            self.cancel()
            self.withdraw()  # nobody waits for it any more, so it keeps nobody waiting

    async def wait(self) -> Any:
        """Its result, when what it emits doesn't matter."""
        async for _ in self.events():
            pass
        return self.result

    def run(self) -> None:
        """In the worker's thread."""
        try:
            last: tuple[str, Any] = ("end", self._work(self))
        except BaseException as error:
            self.failed = True
            last = ("error", error)
        # Before its end is told: whoever hears of it finds the job finished.
        self.finished.set()
        self._send(*last)

    def _send(self, kind: str, value: Any) -> None:
        # The loop is closed when the server is.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, (kind, value))


class Worker:
    """A thread that does jobs in the order they came; at most `waiting` wait."""

    def __init__(self, name: str, waiting: int) -> None:
        self._waiting = waiting
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"demo-{name}", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[Job], Any]) -> Job:
        """Queues `work(job)`; Busy when too many wait. To be called in an event loop."""
        job = Job(work, self)
        with self._changed:
            if len(self._jobs) >= self._waiting:
                raise Busy(f"{len(self._jobs)} others are waiting already; try again in a moment")
            self._jobs.append(job)
            self._changed.notify()
        return job

    def ahead(self, job: Job) -> int:
        """How many jobs are done before this one; 0 when it runs."""
        with self._changed:
            if job not in self._jobs:
                return 0
            return self._jobs.index(job) + (self._running is not None)

    def withdraw(self, job: Job) -> bool:
        """Takes a job out that hasn't begun; False if it has."""
        with self._changed:
            if job not in self._jobs:
                return False
            self._jobs.remove(job)
        # Whoever waits for its events, the page's other action included, hears of the end.
        job.finished.set()
        job._send("end", None)
        return True

    def close(self) -> None:
        """Cancels everything and waits for the running job's end."""
        with self._changed:
            self._closed = True
            for job in [*self._jobs, *([self._running] if self._running else [])]:
                job.cancel()
            self._changed.notify()
        self._thread.join(timeout=10)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                self._running = self._jobs.popleft()
            self._running.run()
            with self._changed:
                self._running = None
