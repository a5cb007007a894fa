"""The progress bar: stage, loss, learning rate, ETA; plain lines every twenty seconds where there is no
terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Say = Callable[[str], None]
Tick = Callable[[str, int, int, dict[str, float]], None]


@contextmanager
def bar(every_s: float = 20.0) -> Iterator[tuple[Say, Tick]]:
    """(say(text), tick(stage, step, steps, {"loss", "lr"})) for one run."""
    console = Console()
    live = console.is_terminal
    last = [0.0, 0.0, 0.0]  # time and step of the last line; when the stage's first tick came
    tasks: dict[str, int] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f} lr {task.fields[lr]:.1e}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not live) as progress:

        def say(text: str) -> None:
            console.print(text, markup=False, highlight=False)

        def tick(stage: str, step: int, steps: int, values: dict[str, float]) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=steps, completed=step, loss=0.0, lr=0.0)
                last[:] = [time.monotonic(), float(step), 0.0]
            progress.update(tasks[stage], completed=step, **values)
            now = time.monotonic()
            if not live and now - last[0] > every_s:
                each = (now - last[0]) / max(step - last[1], 1)
                eta = each * (steps - step) / 60
                say(
                    f"{stage} {step}/{steps} loss {values['loss']:.4f} lr {values['lr']:.2e} "
                    f"{each:.3f} s/step, at most {eta:.1f} min left"
                )
                last[:2] = [now, float(step)]

        yield say, tick
