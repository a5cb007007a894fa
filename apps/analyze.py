"""`crab-edge analyze`: tasks over files and folders, one JSON row for each clip and task."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crab_edge_apps._rows import RowFile

    from crab_edge.batch import Row
    from crab_edge.session import Model


def command(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Media files and folders.")],
    task: Annotated[list[str], typer.Option("--task", "-t", help="Task; repeat it or join with commas.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for rows.jsonl; a second run goes on there.")
    ],
    question: Annotated[str | None, typer.Option(help="For tasks that need a question.")] = None,
    bundle: Annotated[
        Path | None, typer.Option("--bundle", "-b", help="Model bundle; default: the packaged crab-nano.")
    ] = None,
    engine: Annotated[str, typer.Option("--engine", "-e", help="Engine that runs the bundle.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all there are.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    grammar: Annotated[
        bool, typer.Option("--grammar/--no-grammar", help="Hold answers to their task's form.")
    ] = False,
) -> None:
    """Run tasks over many clips; a file that can't be used becomes an error row and the run goes on."""
    from crab_edge_apps._rows import RowFile

    import crab_edge
    from crab_edge import tasks
    from crab_edge.batch import find_media
    from crab_edge.errors import InputError

    names = list(dict.fromkeys(name.strip() for entry in task for name in entry.split(",") if name.strip()))
    if not names:
        raise InputError(f"name at least one task with --task; there are: {', '.join(tasks.names())}")
    for name in names:
        tasks.get(name).prompt(question if tasks.get(name).needs_question else None)
    files = list(find_media(paths))
    if not files:
        raise InputError(f"no media files under {', '.join(map(str, paths))}; check the paths")
    model = crab_edge.load(bundle, engine, threads=threads)
    run = _Run(len(files), len(names))
    described = model.engine.describe()
    if grammar:
        model.grammars()
    of = {"bundle": model.bundle.identity, "engine": described, "question": question, "grammar": grammar}
    with RowFile(out, **of) as rows:
        _work(model, files, names, rows, run, question=question, max_new_tokens=max_tokens, grammar=grammar)
    run.report(rows.path)
    if run.interrupted:
        raise KeyboardInterrupt
    if run.nothing_readable():
        raise InputError(f"none of the {len(files)} files could be read; the reasons are in {rows.path}")


def _work(
    model: Model, files: list[Path], names: list[str], rows: RowFile, run: _Run, **options: Any
) -> None:
    """Rows as they come; the first Ctrl-C lets the clip at hand finish, the second one doesn't."""
    stop = threading.Event()

    def interrupt(*_: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        run.interrupted = True
        stop.set()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        with _progress() as progress:
            bar = progress.add_task("analyze", total=len(files) * len(names), note="")

            def skip(sha256: str | None, media: str, name: str) -> bool:
                known = rows.claim(sha256, media, name)
                if known:
                    run.known += 1
                    progress.advance(bar)
                return known

            for row in model.analyze(files, names, skip=skip, stop=stop, **options):
                rows.add(row)
                run.count(row)
                progress.update(bar, advance=1, note=Path(row.media[0]).name)
    finally:
        signal.signal(signal.SIGINT, before)


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
    )


class _Run:
    """Figures for the summary."""

    def __init__(self, files: int, tasks: int) -> None:
        self.files, self.tasks = files, tasks
        self.started = time.perf_counter()
        self.known = self.answers = 0
        self.errors: Counter[str] = Counter()
        self.seconds: dict[str, float] = {}
        self.interrupted = False

    def count(self, row: Row) -> None:
        """Takes one row."""
        if row.error is not None:
            self.errors[type(row.error).__name__] += 1
        else:
            self.answers += 1
        if row.duration_s is not None:
            self.seconds[row.media[0]] = row.duration_s

    def nothing_readable(self) -> bool:
        """Whether not one file could be opened, neither now nor in an earlier run."""
        return not self.seconds and not self.known

    def report(self, path: Path) -> None:
        """Prints the summary."""
        from rich.console import Console

        took = time.perf_counter() - self.started
        length = sum(self.seconds.values())
        speed = f", {length / took:.1f} x real time" if length and took > 0 else ""
        console = Console(highlight=False, soft_wrap=True)
        console.print(
            f"{self.files} files x {self.tasks} tasks: {self.answers} answers, "
            f"{sum(self.errors.values())} errors, {self.known} rows already there"
        )
        for kind, number in self.errors.most_common():
            console.print(f"  {number} x {kind}")
        console.print(f"{length / 60:.1f} minutes of media in {took:.1f} s{speed}")
        console.print(f"rows: {path}", markup=False)
