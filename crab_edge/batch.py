"""Many clips through one model: decoding runs ahead in a thread, errors become rows, the run goes on.

`Request` says what is asked of every clip, a `Producer` answers a work list: `LocalProducer` with a model in
this process, others elsewhere.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from crab_edge import tasks as task_registry
from crab_edge.bundle import file_sha256
from crab_edge.clip import Clip
from crab_edge.errors import CrabError, InputError, MediaError
from crab_edge.inputs import find_media
from crab_edge.media_io import check_file, shown
from crab_edge.resolved import WINDOW_S, check_stride, check_window
from crab_edge.results import Answer
from crab_edge.rows import ROW_VERSION, Row, RowError
from crab_edge.session import MAX_NEW_TOKENS, Session

if TYPE_CHECKING:
    from crab_edge.session import Model

__all__ = ["ROW_VERSION", "LocalProducer", "Producer", "Request", "Row", "RowError", "analyze", "find_media"]

#: skip(sha256 or None, path, task): whether the row is left out.
Skip = Callable[[str | None, str, str], bool]
AHEAD = 2


@dataclass(frozen=True)
class Request:
    """What is asked of every clip. Can be pickled.

    `question` goes to the tasks that need one; `grammar` holds answers to their form; `window_s`: long clips
    are cut into windows of so many seconds, 10 to 60, that start `stride_s` apart (default: their length).
    """

    tasks: tuple[str, ...]
    question: str | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    grammar: bool = True
    stride_s: float | None = None
    window_s: float = WINDOW_S

    def check(self) -> Request:
        """Itself; TaskError for an unknown task or a missing question, InputError for what else can't be."""
        if not self.tasks:
            raise InputError(f"name at least one task; there are: {', '.join(task_registry.names())}")
        for name in self.tasks:
            task_registry.get(name).prompt(self.asked(name))
        check_window(self.window_s)
        check_stride(self.stride_s, self.window_s)
        return self

    def prepare(self, model: Model) -> None:
        """Compiles what holds the answers to their forms, before any clip is read.

        DependencyError without llguidance; InputError where no answer of a task is as short as
        `max_new_tokens`.
        """
        if not self.grammar:
            return
        forms = model.grammars()
        for task in map(task_registry.get, self.tasks):
            if task.grammar.strip():
                forms.form(task, limit=self.max_new_tokens)

    @property
    def stride(self) -> float:
        """The stride in seconds, spelled out."""
        return float(self.window_s if self.stride_s is None else self.stride_s)

    def asked(self, task: str) -> str | None:
        """The question as this task gets it."""
        return self.question if task_registry.get(task).needs_question else None

    def answer(self, session: Session, names: Sequence[str]) -> list[Answer]:
        """The answers of these of its tasks, which share the clip's decode and their recipes' prefixes."""
        return session.ask_all(names, self.question, max_new_tokens=self.max_new_tokens, grammar=self.grammar)


class Producer(Protocol):
    """Answers a work list. `bundle` is the bundle's identity, `engine` what the engine says of itself."""

    bundle: str
    engine: dict[str, Any]

    def produce(
        self, files: Iterable[Path], request: Request, skip: Skip, stop: threading.Event
    ) -> Generator[tuple[Row, Clip | None], None, None]:
        """One row for each file and task, as soon as it is there, a file's rows one after the other.

        `files` may be endless and may block until there is another file. `skip` is asked once for each row,
        in this process, before anything is decoded. After `stop` the clips at hand are finished, no further
        ones begun. What is wrong with one file becomes its rows' errors; an exception ends the run. With a
        row comes the opened clip if it is at hand; it is closed when the next clip's row is asked for.
        """
        ...

    def close(self) -> None:
        """Lets go of the engine, or of the other machines."""
        ...


def identify(path: Path) -> str:
    """SHA-256 (hex) of a media file. MediaError if it can't be read or is no regular file."""
    if os.path.isdir(path):  # listing files gives those folders that it couldn't look into
        raise MediaError(f"{shown(path)}: this folder can't be listed; check its permissions")
    try:
        check_file(path)
        return file_sha256(path)
    except OSError as error:
        raise MediaError(f"{shown(path)}: can't be read ({error.strerror}); check its permissions") from error
    except ValueError:
        raise MediaError(f"{shown(path)!r}: no path of a file; check it") from None


def analyze(
    model: Model,
    paths: Iterable[str | Path],
    tasks: Sequence[str],
    *,
    question: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    grammar: bool | None = None,
    stride_s: float | None = None,
    window_s: float = WINDOW_S,
    skip: Skip | None = None,
    ahead: int = AHEAD,
    stop: threading.Event | None = None,
) -> Iterator[Row]:
    """One row for each media file under `paths` and each task, as soon as it is there.

    `paths` as in `find_media`: files, folders, patterns, "@list"; a file that comes twice is answered twice.
    For the options see `Request`; `skip(sha256, media, task)` leaves a row out. Up to `ahead` clips are
    decoded before their turn. `stop` ends the run after the clip at hand. An unknown task raises TaskError
    before anything is read; whatever is wrong with one file becomes its rows' `error`.
    """
    names = [tasks] if isinstance(tasks, str) else tasks
    held = model.grammar if grammar is None else grammar
    asked = (question, max_new_tokens, held, stride_s, window_s)
    request = Request(tuple(dict.fromkeys(names)), *asked).check()
    producer = LocalProducer(model, ahead)
    request.prepare(model)
    files = find_media([paths] if isinstance(paths, (str, Path)) else paths)
    rows = producer.produce(files, request, skip or _skip_nothing, stop or threading.Event())
    return _only_rows(rows)


def _skip_nothing(sha256: str | None, path: str, task: str) -> bool:
    return False


def _only_rows(pairs: Generator[tuple[Row, Clip | None], None, None]) -> Iterator[Row]:
    try:
        for row, _ in pairs:
            yield row
    finally:
        pairs.close()


@dataclass
class _Job:
    path: Path
    names: list[str]
    sha256: str | None = None
    session: Session | None = None
    error: RowError | None = None
    """Not the exception: its traceback would keep the clip."""


class LocalProducer:
    """A producer that runs a model in this process; up to `ahead` clips are decoded before their turn."""

    def __init__(self, model: Model, ahead: int = AHEAD) -> None:
        self.model = model
        self.bundle = model.bundle.identity
        self.engine = model.engine.describe()
        self._ahead = max(1, ahead)

    def close(self) -> None:
        """Nothing: the model is the caller's."""

    def produce(
        self, files: Iterable[Path], request: Request, skip: Skip, stop: threading.Event
    ) -> Generator[tuple[Row, Clip | None], None, None]:
        """See `Producer`."""
        jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=self._ahead)
        abandoned = threading.Event()
        failure: list[Exception] = []

        def put(job: _Job | None) -> None:
            while not abandoned.is_set() and threading.main_thread().is_alive():
                try:
                    return jobs.put(job, timeout=0.2)
                except queue.Full:
                    continue

        def decode_ahead() -> None:
            try:
                for path in files:
                    if abandoned.is_set() or stop.is_set() or not threading.main_thread().is_alive():
                        break
                    job = self._decode(path, request, skip)
                    if job.names:
                        put(job)
                    del job  # or it would outlive its turn while the next file is waited for
            except Exception as error:
                failure.append(error)
            put(None)

        # No daemon: a decoder must not be alive when the interpreter ends.
        decoder = threading.Thread(target=decode_ahead, name="decode-ahead")
        decoder.start()
        try:
            while not stop.is_set() and (job := jobs.get()) is not None:
                yield from self._answer(job, request)
                job = None  # or it would live on while the next one is decoded
            if failure and not stop.is_set():
                raise failure[0]
        finally:
            abandoned.set()
            decoder.join()
            while not jobs.empty():
                job = jobs.get()
                if job is not None and job.session is not None:
                    job.session.clip.close()

    def _decode(self, path: Path, request: Request, skip: Skip) -> _Job:
        """Opens and decodes one file; any error is kept for its rows."""
        job = _Job(path, list(request.tasks))
        before = _state(path)
        try:
            job.sha256 = identify(path)
        except CrabError as error:
            job.error = RowError.of(error)
        job.names = [name for name in job.names if not skip(job.sha256, str(path), name)]
        if job.error is None and job.names:
            try:
                clip = Clip.open([path], max_minutes=None, sha256=[job.sha256 or ""])
                session = Session(self.model, clip, stride_s=request.stride_s, window_s=request.window_s)
                fitting = {task.name for task in session.applicable()}
                session.prepare([name for name in job.names if name in fitting])
                if _state(path) not in (before, None):
                    raise MediaError(
                        f"{shown(path)}: it changed while it was read; run again when it is whole"
                    )
                job.session = session
            except Exception as error:
                job.error = RowError.of(error)
        return job

    def _answer(self, job: _Job, request: Request) -> Generator[tuple[Row, Clip | None], None, None]:
        """The rows of one file: answered together, so that tasks share their prefixes."""
        media = (str(job.path),)
        if job.session is None:
            for name in job.names:
                yield Row(media, name, job.sha256, error=job.error), None
            return
        session = job.session
        with session.clip as clip:
            fitting = {task.name for task in session.applicable()}
            together = [name for name in job.names if name in fitting]
            answers: dict[str, Answer] = {}
            try:
                answers = dict(zip(together, request.answer(session, together), strict=True))
            except Exception:
                answers = {}  # One of them failed: alone, each gets its own answer or its own error.
            for name in job.names:
                failed: RowError | None = None
                if name not in answers:
                    try:
                        (answers[name],) = request.answer(session, [name])
                    except Exception as error:
                        failed = RowError.of(error)
                yield Row(media, name, job.sha256, clip.duration_s, answers.get(name), failed), clip


def _state(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written to; None if it isn't there."""
    try:
        info = os.stat(path)
    except (OSError, ValueError):
        return None
    return info.st_size, info.st_mtime_ns
