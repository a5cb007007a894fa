"""`crab-edge analyze`: tasks over files and folders, one JSON row for each clip and task."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crab_edge_apps._batch_progress import Figures, Progress
    from crab_edge_apps._rows import RowFile

    from crab_edge.batch import Producer, Request


def command(
    task: Annotated[list[str], typer.Option("--task", "-t", help="Task; repeat it or join with commas.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for rows.jsonl; a second run goes on there.")
    ],
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="PATH", help="Files, folders, patterns, @LIST, - (a list on stdin)."),
    ] = None,
    lists: Annotated[
        list[Path] | None, typer.Option("--list", help="File with one path a line; - is stdin.")
    ] = None,
    sink: Annotated[
        list[str] | None, typer.Option("--sink", help="Also write csv, srt, vtt, video; repeat or join.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="For tasks that need a question.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Model bundle; default: the packaged crab-nano.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", "-e", help="Engine, and how: onnxruntime, onnxruntime:cuda, tensorrt, torch:cuda."
        ),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all there are.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    grammar: Annotated[
        bool,
        typer.Option(
            "--grammar/--no-grammar", help="Hold answers to their task's form, or let the model talk."
        ),
    ] = True,
    window: Annotated[
        float,
        typer.Option(
            help="Seconds of the windows that longer clips are cut into, 10 to 60; `plan` says what fits."
        ),
    ] = 10.0,
    stride: Annotated[
        float | None,
        typer.Option(
            help="Seconds from one window of a long clip to the next, from 1; default: a window's length."
        ),
    ] = None,
    retry_errors: Annotated[
        bool, typer.Option("--retry-errors", help="Try rows again that ended in an error.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking for new files until Ctrl-C.")] = False,
    settle: Annotated[
        float, typer.Option(min=0.0, help="With --watch: a file is whole when unchanged for so many seconds.")
    ] = 5.0,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Share the work among a Ray cluster; or: local.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --ray: models at work; default: all that find room.")
    ] = None,
) -> None:
    """Run tasks over many clips; a file that can't be used becomes an error row and the run goes on."""
    from crab_edge_apps._batch_progress import Figures, Progress
    from crab_edge_apps._rows import RowFile

    from crab_edge.batch import Request
    from crab_edge.errors import InputError

    request = Request(tuple(_split(task)), question, max_tokens, grammar, stride, window).check()
    sinks = _sink_names(sink)
    files = _Files(paths or [], lists or [], out)
    known = None if watch else files.listed()
    figures = Figures(None if known is None else len(known), len(request.tasks))
    if workers is not None and ray is None:
        raise InputError("--workers is for --ray; add --ray ADDRESS or leave it out")
    producer = _producer(bundle, engine, threads, request, ray, workers)
    try:
        with (
            RowFile(
                out,
                bundle=producer.bundle,
                engine=producer.engine,
                request=request,
                retry_errors=retry_errors,
            ) as rows,
            Progress(figures) as progress,
            # Outside of the sinks: they may still be drawing when the last row is written.
            _signals(progress) as stop,
            _opened_sinks(sinks, out, progress) as sink_writer,
        ):
            if sink_writer is not None:
                sink_writer.rebuild(rows.rows())
            work = files.watched(stop, settle) if known is None else known
            _work(producer, work, request, rows, sink_writer, figures, progress, stop)
            if sink_writer is not None and rows.replaced:
                sink_writer.rebuild(rows.rows())
    finally:
        producer.close()
    print("\n".join(figures.summary([rows.path])))
    if stop.is_set() and not watch:
        print("crab-edge: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130)
    if known is not None and not figures.clips and not rows.opened:
        raise InputError(f"none of the {len(known)} files could be read; the reasons are in {rows.path}")


def _split(entries: Iterable[str] | None) -> list[str]:
    """Names from repeated options that may hold several with commas, each once."""
    names = (name.strip() for entry in entries or () for name in entry.split(","))
    return list(dict.fromkeys(name for name in names if name))


def _sink_names(entries: Iterable[str] | None) -> list[str]:
    from crab_edge.errors import InputError

    names = [name for name in _split(entries) if name != "jsonl"]
    if names:
        from crab_edge_apps._sinks import NAMES

        for name in names:
            if name not in NAMES:
                raise InputError(
                    f"unknown sink {name!r}; choose of: jsonl (always written), {', '.join(NAMES)}"
                )
    return names


def _opened_sinks(names: list[str], out: Path, progress: Progress) -> Any:
    """The sinks as a context manager, or one that gives None."""
    if not names:
        return nullcontext()
    from crab_edge_apps._sinks import open_sinks

    return open_sinks(names, out, notice=progress.say)


def _producer(
    bundle: Path | None,
    engine: str,
    threads: int | None,
    request: Request,
    ray: str | None,
    workers: int | None,
) -> Producer:
    """Who answers the work list: a model in this process, or workers elsewhere."""
    if ray is not None:
        from crab_edge_apps import _ray

        return _ray.connect(
            ray, bundle=bundle, engine=engine, threads=threads, workers=workers, request=request
        )
    import crab_edge
    from crab_edge.batch import LocalProducer

    model = crab_edge.load(bundle, engine, threads=threads)
    request.prepare(model)
    return LocalProducer(model)


class _Files:
    """The files that the command line names, but for annotated videos under `out`.

    Lists named by --list and on stdin are read once.
    """

    def __init__(self, words: list[str], lists: list[Path], out: Path) -> None:
        from crab_edge_apps._sinks import DRAWN

        from crab_edge.errors import InputError
        from crab_edge.inputs import read_list

        self._drawn = os.path.join(os.path.realpath(out / DRAWN), "")
        self._named: list[str | Path] = []
        for word in words:
            self._named += read_list("-") if word in ("-", "@-") else [word]
        for name in lists:
            self._named += read_list(name)
        if not self._named:
            raise InputError("no media given; name files, folders or patterns, or a list with --list")

    def listed(self) -> list[Path]:
        """All of them, each once; InputError if there are none."""
        from crab_edge.errors import InputError

        files = list({os.path.abspath(path): path for path in self._found()}.values())
        if not files:
            where = ", ".join(str(name) for name in self._named[:3])
            raise InputError(f"no media files under {where}; check the paths")
        return files

    def watched(self, stop: threading.Event, settle_s: float) -> Iterator[Path]:
        """Files as they come in, until `stop`."""
        from crab_edge.watch import watch

        return watch(lambda: self._found(strict=False), stop, settle_s=settle_s)

    def _found(self, strict: bool = True) -> Iterator[Path]:
        from crab_edge.inputs import find_media

        for path in find_media(self._named, strict=strict):
            if not os.path.realpath(path).startswith(self._drawn):
                yield path


def _work(
    producer: Producer,
    files: Iterable[Path],
    request: Request,
    rows: RowFile,
    sinks: Any,
    figures: Figures,
    progress: Progress,
    stop: threading.Event,
) -> None:
    """Rows as they come: first into the row file, then to the sinks."""

    def skip(sha256: str | None, media: str, name: str) -> bool:
        known = rows.claim(sha256, media, name)
        if known:
            figures.known += 1
        return known

    progress.update()
    with closing(producer.produce(files, request, skip, stop)) as produced:
        try:
            for row, clip in produced:
                content = rows.add(row)
                if sinks is not None:
                    sinks.add(content, clip)
                figures.count(row)
                progress.update(Path(row.media[0]).name)
        except BaseException:
            stop.set()  # or a producer that waits for further files would wait for ever
            raise


@contextmanager
def _signals(progress: Progress) -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or SIGTERM) sets; the second one leaves at once.

    Whatever has been written by then is whole, so nothing is waited for.
    """
    stop = threading.Event()

    def interrupt(*_: Any) -> None:
        if stop.is_set():
            progress.close()
            print("crab-edge: interrupted", file=sys.stderr, flush=True)
            os._exit(130)
        stop.set()
        progress.say("stopping after the clip at hand; once more to leave at once")

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
