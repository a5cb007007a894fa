"""Many clips through one model: decoding runs ahead in a thread, errors become rows, the run goes on."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge import tasks as task_registry
from crab_edge.bundle import file_sha256
from crab_edge.clip import Clip
from crab_edge.errors import CrabError, InputError, MediaError
from crab_edge.results import Answer
from crab_edge.session import MAX_NEW_TOKENS, Session

if TYPE_CHECKING:
    from crab_edge.session import Model

ROW_VERSION = 1
SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv .gif "
    ".wav .mp3 .m4a .aac .flac .ogg .oga .opus .wma .aiff .aif .amr "
    ".jpg .jpeg .png .webp .bmp .tif .tiff .heic .avif".split()
)
# First bytes of media files, for those without a known suffix: (offset, bytes).
SIGNATURES = (
    (4, b"ftyp"),
    (0, b"\x1a\x45\xdf\xa3"),
    (0, b"RIFF"),
    (0, b"OggS"),
    (0, b"fLaC"),
    (0, b"ID3"),
    (0, b"FLV\x01"),
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n"),
    (0, b"GIF8"),
)


@dataclass(frozen=True)
class Row:
    """What came of one file and one task: an answer or an error."""

    media: tuple[str, ...]
    task: str
    sha256: str | None
    """Of the file's bytes; None if it couldn't be read."""
    duration_s: float | None = None
    answer: Answer | None = None
    error: Exception | None = None

    def to_json(self, *, bundle: str, engine: dict[str, Any], question: str | None = None) -> dict[str, Any]:
        """The row as it stands in `rows.jsonl`."""
        row: dict[str, Any] = {
            "version": ROW_VERSION,
            "media": list(self.media),
            "sha256": self.sha256,
            "duration_s": self.duration_s,
            "bundle": bundle,
            "engine": engine,
        }
        if self.answer is not None:
            return row | self.answer.to_json()
        message = " ".join(str(self.error).split())
        error = {"type": type(self.error).__name__, "message": message}
        return row | {"task": self.task, "question": question, "error": error}


def find_media(paths: Iterable[str | Path]) -> Iterator[Path]:
    """Files as they are given; of folders, every media file below, in order of name.

    In folders a file counts by its suffix or, without a known one, by its first bytes; hidden ones don't.
    """
    for given in paths:
        path = Path(given).expanduser()
        if not path.is_dir():
            yield path
            continue
        unreadable: list[OSError] = []
        for folder, folders, files in os.walk(path, onerror=unreadable.append):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(files):
                file = Path(folder, name)
                if not name.startswith(".") and (file.suffix.lower() in SUFFIXES or _looks_like_media(file)):
                    yield file
        yield from (Path(error.filename) for error in unreadable)


def _looks_like_media(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return any(head[offset : offset + len(magic)] == magic for offset, magic in SIGNATURES)


def analyze(
    model: Model,
    paths: Iterable[str | Path],
    tasks: Sequence[str],
    *,
    question: str | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    grammar: bool = False,
    skip: Callable[[str | None, str, str], bool] | None = None,
    ahead: int = 2,
    stop: threading.Event | None = None,
) -> Iterator[Row]:
    """One row for each media file under `paths` and each task, as soon as it is there.

    `question` goes to the tasks that need one; `grammar` holds answers to their form.
    `skip(sha256, media, task)` leaves a row out. Up to `ahead` clips are decoded before their turn. `stop`
    ends the run after the clip at hand. An unknown task raises TaskError before anything is read; whatever is
    wrong with one file becomes its rows' `error`.
    """
    for name in tasks:
        task = task_registry.get(name)
        task.prompt(question if task.needs_question else None)
    if not tasks:
        raise InputError("name at least one task")
    if grammar:
        model.grammars()
    ask = functools.partial(
        Session.ask_all, question=question, max_new_tokens=max_new_tokens, grammar=grammar
    )
    return _rows(model, find_media(paths), list(tasks), ask, skip, ahead, stop or threading.Event())


Ask = Callable[[Session, Sequence[str]], list[Answer]]


@dataclass
class _Job:
    path: Path
    names: list[str]
    sha256: str | None = None
    session: Session | None = None
    error: Exception | None = None


def _rows(
    model: Model,
    files: Iterator[Path],
    names: list[str],
    ask: Ask,
    skip: Callable[[str | None, str, str], bool] | None,
    ahead: int,
    stop: threading.Event,
) -> Iterator[Row]:
    jobs: queue.Queue[_Job | None] = queue.Queue(maxsize=max(1, ahead))
    abandoned = threading.Event()

    def put(job: _Job | None) -> None:
        while not abandoned.is_set() and threading.main_thread().is_alive():
            try:
                return jobs.put(job, timeout=0.2)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for path in files:
                if abandoned.is_set() or stop.is_set() or not threading.main_thread().is_alive():
                    break
                job = _decode(model, path, names, skip)
                if job.names:
                    put(job)
        except Exception as error:
            put(_Job(Path("."), names, error=error))
        put(None)

    # No daemon: a decoder must not be alive when the interpreter ends.
    producer = threading.Thread(target=produce, name="decode-ahead")
    producer.start()
    try:
        while not stop.is_set() and (job := jobs.get()) is not None:
            yield from _run(job, ask)
    finally:
        abandoned.set()
        producer.join()


def _decode(
    model: Model, path: Path, names: list[str], skip: Callable[[str | None, str, str], bool] | None
) -> _Job:
    """Opens and decodes one file; any error is kept for its rows."""
    job = _Job(path, names)
    try:
        job.sha256 = _hash(path)
    except CrabError as error:
        job.error = error
    if skip is not None:
        job.names = [name for name in names if not skip(job.sha256, str(path), name)]
    if job.error is None and job.names:
        try:
            session = Session(model, Clip.open([path], max_minutes=None))
            fitting = {task.name for task in session.applicable()}
            session.prepare([name for name in job.names if name in fitting])
            job.session = session
        except Exception as error:
            job.error = error
    return job


def _hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise MediaError(f"{path}: can't be read ({error.strerror}); check its permissions") from error


def _run(job: _Job, ask: Ask) -> Iterator[Row]:
    """The rows of one file: answered together, so that tasks share their prefixes."""
    media = (str(job.path),)
    if job.session is None:
        for name in job.names:
            yield Row(media, name, job.sha256, error=job.error)
        return
    session, duration = job.session, job.session.clip.duration_s
    answers: dict[str, Answer] = {}
    errors: dict[str, Exception] = {}
    fitting = {task.name for task in session.applicable()}
    try:
        together = [name for name in job.names if name in fitting]
        answers = dict(zip(together, ask(session, together), strict=True))
    except Exception:
        # One of them failed: alone, each gets its own answer or its own error.
        answers = {}
    for name in job.names:
        if name not in answers:
            try:
                (answers[name],) = ask(session, [name])
            except Exception as error:
                errors[name] = error
        yield Row(media, name, job.sha256, duration, answers.get(name), errors.get(name))
    session.clip.close()
