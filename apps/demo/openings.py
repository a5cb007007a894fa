"""Clips on their way to a page: the last one chosen wins, and none arrives at a page that was closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crab_edge_apps.demo.worker import Job


class Opening:
    """One clip that a page opens. `unwanted`: another was chosen since, or the page was closed (`left`)."""

    def __init__(self) -> None:
        self.unwanted = False
        self.left = False
        self.language: str | None = None
        self._job: Job | None = None

    def decodes(self, job: Job) -> Job:
        """Says which job decodes it."""
        self._job = job
        if self.unwanted:  # between its queueing and now
            self.drop()
        return job

    def drop(self) -> None:
        """It isn't wanted any more: it leaves the queue, or what it opens is put away."""
        self.unwanted = True
        if self._job is not None:
            self._job.withdraw()


class Openings:
    """The openings under way by Gradio's session hash. Pages are closed in threads, opened in the loop."""

    def __init__(self) -> None:
        self._all: dict[str, list[Opening]] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def begin(self, key: str) -> Iterator[Opening]:
        """An opening for as long as the block lasts; those before it aren't wanted any more."""
        opening = Opening()
        with self._lock:
            before = self._all.setdefault(key, [])
            earlier = list(before)
            before.append(opening)
        for other in earlier:
            other.drop()
        try:
            yield opening
        finally:
            with self._lock:
                self._all[key].remove(opening)
                if not self._all[key]:
                    del self._all[key]

    def of(self, key: str) -> list[Opening]:
        """Those of a page, oldest first."""
        with self._lock:
            return list(self._all.get(key, ()))

    def speak(self, key: str, language: str) -> None:
        """The page's language has changed meanwhile."""
        for opening in self.of(key):
            opening.language = language

    def leave(self, key: str) -> None:
        """The page was closed."""
        for opening in self.of(key):
            opening.left = True
            opening.drop()
