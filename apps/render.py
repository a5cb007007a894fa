"""Answers on a terminal: tables for events and boxes, plain lines for the rest, notices apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crab_edge_apps._text import printable
from rich.console import Console
from rich.markup import escape as escape_markup
from rich.table import Table

from crab_edge.results import Answer, Box, Caption, Choice, Event, Mask, Points, Result, Unparsed

if TYPE_CHECKING:
    from crab_edge.clip import Clip
    from crab_edge.session import Model

# Not a module-level console: tests and pipes replace sys.stdout after import.


def escape(text: str) -> str:
    """Text that is neither markup nor control characters to the console."""
    return escape_markup(printable(text))


def _console(stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def heading(clip: Clip, media: Sequence[Path]) -> None:
    """One line on what was opened: names, size, rate, length."""
    facts = [f"{video.width}x{video.height}, {video.fps:.3g} fps" for video in clip.videos]
    facts += [f"{image.width}x{image.height}" for image in clip.images]
    if clip.duration_s > 0:
        facts.append(f"{clip.duration_s:.1f} s")
    facts.append("with sound" if clip.audios else "no sound")
    names = " + ".join(path.name for path in media)
    _console().print(f"[bold]{escape(names)}[/bold] [dim]({', '.join(facts)})[/dim]")


def answer(answer: Answer, model: Model) -> None:
    """One task's answer: its name, the typed results, the time."""
    console = _console()
    spent = answer.timings
    steps = f"{spent.tokens} tokens, {spent.total_s:.2f} s"
    title = f"[bold cyan]{escape(answer.task)}[/bold cyan] [dim]{steps}[/dim]"
    console.print()
    console.print(title)
    results(answer.parsed, console)
    if not answer.parsed or any(isinstance(result, Unparsed) for result in answer.parsed):
        console.print(f"  [dim]the model said:[/dim] {escape(answer.raw) or '(nothing)'}")


def results(parsed: Iterable[Result], console: Console) -> None:
    """Typed results: events and boxes as tables, in the order of the text."""
    parsed = list(parsed)
    events = [result for result in parsed if isinstance(result, Event)]
    boxes = [result for result in parsed if isinstance(result, Box)]
    if events:
        console.print(_events(events))
    if boxes:
        console.print(_boxes(boxes))
    for result in parsed:
        if isinstance(result, Choice):
            console.print(f"  {escape(result.value)}")
        elif isinstance(result, Caption):
            console.print(f"  {escape(result.text)}")
        elif isinstance(result, Points):
            where = " ".join(f"({x:.0f}, {y:.0f})" for x, y in result.xy)
            console.print(f"  {escape(result.label)}: points {where}")
        elif isinstance(result, Mask):
            console.print(
                f"  {escape(result.label)}: mask {result.width}x{result.height}, from {result.source}"
            )
        elif isinstance(result, Unparsed):
            console.print(f"  [yellow]not in the task's form:[/yellow] {escape(result.reason)}")
    if not parsed:
        console.print("  nothing found")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 2), header_style="dim")
    for column in columns:
        table.add_column(column, justify="left" if column in ("event", "object", "in") else "right")
    return table


def _events(events: list[Event]) -> Table:
    table = _table("event", "in", "from", "to")
    for event in events:
        table.add_row(escape(event.label), event.modality, f"{event.start_s:.1f} s", f"{event.end_s:.1f} s")
    return table


def _boxes(boxes: list[Box]) -> Table:
    table = _table("object", "left", "top", "right", "bottom")
    for box in boxes:
        table.add_row(escape(box.label), *(f"{value:.0f}" for value in (box.x1, box.y1, box.x2, box.y2)))
    return table


def understood(answer: Answer) -> None:
    """After a streamed text: the typed results, unless they are the text itself."""
    if any(isinstance(result, Caption) for result in answer.parsed):
        return
    results(answer.parsed, _console())


def notices(answers: Sequence[Answer]) -> None:
    """Each notice once, on stderr, so that piping the results keeps them clean."""
    console = _console(stderr=True)
    for notice in dict.fromkeys(notice for answer in answers for notice in answer.notices):
        console.print(f"[yellow]note:[/yellow] {escape(notice)}")


def footer(model: Model, seconds: float) -> None:
    """The time from start to end, and what ran."""
    console = _console()
    console.print()
    described = model.engine.describe()
    # ONNX Runtime on the CPU is what people expect; anything else is worth a word, a missing GPU above all.
    provider = described.get("provider", "CPUExecutionProvider")
    where = described["name"] + ("" if provider == "CPUExecutionProvider" else f", {provider}")
    console.print(f"[dim]{seconds:.1f} s in all, {model.bundle.identity} on {where}[/dim]")
