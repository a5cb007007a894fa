"""Progress bars for work that reports its share and for work that is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
Report = Callable[[str, float], None]


def with_progress(work: Callable[[Report], T], first: str) -> T:
    """Runs `work(report)` under a bar that starts as `first`; none is shown where stderr isn't a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(first, total=1.0)
        return work(lambda what, share: bar.update(task, description=what, completed=share))


def counting(console: Any) -> Any:
    """A bar that counts, with the time that is left, on a rich console; without one nothing is shown."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, disable=console is None)
