"""What a batch run shows: how far it is, how long it will take, and the summary at its end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps._text import printable

if TYPE_CHECKING:
    from crab_edge.rows import Row

_LINE_EVERY_S = 30.0


class Figures:
    """Counts rows. `files` is None while nobody knows how many there will be (`--watch`)."""

    def __init__(self, files: int | None, tasks: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.files, self.tasks = files, tasks
        self._clock = clock
        self.started = clock()
        self.known = self.answers = 0
        self.clips = 0
        self.media_s = 0.0
        self.errors: Counter[str] = Counter()
        self._clip: tuple[str, ...] | None = None

    def count(self, row: Row) -> None:
        """Takes one row; those of a clip come one after the other."""
        if row.error is not None:
            self.errors[row.error.type] += 1
        else:
            self.answers += 1
        if row.duration_s is not None and row.media != self._clip:
            self.clips += 1
            self.media_s += row.duration_s
            self._clip = row.media

    @property
    def done(self) -> int:
        """Rows written by this run."""
        return self.answers + sum(self.errors.values())

    @property
    def total(self) -> int | None:
        return None if self.files is None else self.files * self.tasks

    def took_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.started

    def left_s(self) -> float | None:
        """Seconds until the end at the pace so far; rows that were there before don't count as pace."""
        if self.total is None or not self.done:
            return None
        return max(0, self.total - self.known - self.done) * self.took_s() / self.done

    def line(self) -> str:
        """How far the run is, in words."""
        errors = sum(self.errors.values())
        of = "" if self.total is None else f"/{self.total}"
        parts = [f"{self.known + self.done}{of} rows"]
        if errors:
            parts.append(_counted(errors, "error"))
        if self.media_s and self.took_s() > 0:
            parts.append(f"{self.media_s / self.took_s():.1f} x real time")
        left = self.left_s()
        if left is not None:
            parts.append(f"{_duration(left)} left")
        return ", ".join(parts)

    def summary(self, where: Iterable[Path]) -> list[str]:
        """The lines printed at the end."""
        took = self.took_s()
        files = "" if self.files is None else f"{_counted(self.files, 'file')} x "
        lines = [
            f"{files}{_counted(self.tasks, 'task')}: {_counted(self.answers, 'answer')}, "
            f"{_counted(sum(self.errors.values()), 'error')}, {self.known} rows already there"
        ]
        lines += [f"  {number} x {kind}" for kind, number in self.errors.most_common()]
        speed = f", {self.media_s / took:.1f} x real time" if self.media_s and took > 0 else ""
        length = f"{_counted(self.clips, 'clip')}, {self.media_s / 3600:.2f} hours of media"
        lines.append(f"{length} in {_duration(took)}{speed}")
        return [*lines, *(f"rows: {printable(str(path))}" for path in where)]


class Progress:
    """Shows the figures on stderr while the run lasts: a bar on a terminal, else a line now and then."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        self._bar: Any = None
        self._shown_at = figures.took_s()

    def __enter__(self) -> Progress:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                progress.BarColumn(),
                progress.TextColumn("{task.fields[line]}"),
                progress.TextColumn("{task.fields[note]}", markup=False, style="dim"),
            )
            self._bar = progress.Progress(*columns, console=console)
            self._task = self._bar.add_task("analyze", total=self._figures.total, line="", note="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def update(self, note: str = "") -> None:
        """After each row."""
        figures = self._figures
        if self._bar is not None:
            done = figures.known + figures.done
            self._bar.update(self._task, completed=done, line=figures.line(), note=printable(note, keep=""))
        elif figures.took_s() - self._shown_at >= _LINE_EVERY_S:
            self._shown_at = figures.took_s()
            self.say(figures.line())

    def say(self, text: str) -> None:
        """One line on stderr, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
