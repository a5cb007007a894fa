"""Graphs that an engine opens when they are first used, or ahead of that in threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

GRAPHS = ("decoder", "audio", "vision")


class Opening:
    """`open(name)` once for each graph, whoever asks first. Safe to use from several threads."""

    def __init__(self, open: Callable[[str], Any]) -> None:
        self._open = open
        self._graphs: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    def start(self, name: str, *, threaded: bool = True) -> Future[Any]:
        """Opens a graph that isn't open yet, in a thread of its own or at once; what `open` raises comes
        with the result.
        """
        with self._lock:
            future = self._graphs.get(name)
            if future is not None:
                return future
            future = self._graphs[name] = Future()

        def run() -> None:
            try:
                future.set_result(self._open(name))
            except BaseException as error:
                future.set_exception(error)

        if threaded:
            # No daemon: ONNX Runtime aborts the process when it ends under a session that is being opened.
            threading.Thread(target=run, name=f"open-{name}").start()
        else:
            run()
        return future

    def get(self, name: str) -> Any:
        """The graph, opened here if nobody has begun to."""
        return self.start(name, threaded=False).result()

    def names(self) -> set[str]:
        """The graphs that are open or being opened."""
        with self._lock:
            return set(self._graphs)

    def forget(self, name: str) -> None:
        """The next use opens this graph anew."""
        with self._lock:
            self._graphs.pop(name, None)

    def drop(self, names: Sequence[str]) -> bool:
        """Lets go of these graphs (none named: of all), and says whether one was there."""
        with self._lock:
            closing = [self._graphs.pop(name) for name in names or GRAPHS if name in self._graphs]
        for future in closing:
            # One that is still being opened can't be dropped; nor may its error be lost on the way.
            error = future.exception()
            if error is not None:
                raise error
        return bool(closing)
