"""`crab-edge doctor`: which engines run on this machine, and what the others lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from crab_edge.doctor import Finding
    from crab_edge.doctor.machine import Machine

COLOURS = {"works": "green", "kernel only": "yellow", "fails": "red", "missing": "dim"}


def command(
    bundle: Annotated[
        Path | None,
        typer.Argument(metavar="[BUNDLE]", help="Bundle to ask; default: the packaged crab-nano."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            "--engine", "-e", help="Examine this engine (onnxruntime) or variant (torch:cuda) only."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that one engine may take.")] = 180.0,
) -> None:
    """Launch a kernel of every engine here and ask the model one question; exit with 3 if none answers."""
    from rich.console import Console

    from crab_edge.bundle import Bundle, default_bundle, sample_clip
    from crab_edge.doctor import chosen, examine
    from crab_edge.doctor.machine import machine
    from crab_edge.errors import CheckError

    names = chosen(engine)
    opened = Bundle.open(default_bundle() if bundle is None else bundle)
    here = machine()
    console = Console(highlight=False, stderr=as_json)
    if not as_json:
        _print_machine(console, here)
    findings: list[Finding] = []
    with console.status("") as status:
        running = examine(names, opened.path, sample_clip(), limit_s=timeout)
        for name in names:
            status.update(f"examining {name}")
            findings.append(next(running))
    if as_json:
        report = {
            "bundle": opened.identity,
            "machine": here.to_json(),
            "engines": [one.to_json() for one in findings],
        }
        print(json.dumps(report, ensure_ascii=False))
    else:
        _print_findings(console, findings)
    if not any(one.state == "works" for one in findings):
        raise CheckError(f"no engine of {', '.join(names)} runs {opened.identity} on this machine")


def _print_machine(console: Console, here: Machine) -> None:
    from crab_edge_apps._sizes import size
    from crab_edge_apps._text import printable
    from rich.markup import escape

    def line(name: str, text: str) -> None:
        console.print(f"[bold]{name:<8}[/bold] {escape(printable(text))}", soft_wrap=True)

    line("system", f"{here.system}, Python {here.python}")
    if here.jetson_linux is not None:
        line("jetson", f"Jetson Linux {here.jetson_linux}, JetPack {here.jetpack}")
    quick = here.cpu_int8 or "none, so 8-bit products are slow"
    line("cpu", f"8-bit instructions: {quick}; vectors: {here.cpu_wide or 'none of use'}")
    if here.memory_bytes is not None:
        free = "?" if here.memory_free_bytes is None else size(here.memory_free_bytes)
        line("memory", f"{free} of {size(here.memory_bytes)} free")
    if here.cuda is not None:
        line("driver", f"{here.driver or 'unknown release'}: CUDA up to {here.cuda}, PTX up to {here.ptx}")
    for index, gpu in enumerate(here.gpus):
        shared = ", memory shared with the CPU" if gpu["integrated"] else ""
        line(
            "gpu",
            (
                f"{index}: {gpu['name']}, compute capability {gpu['capability']}, "
                f"{size(gpu['memory_bytes'])}{shared}"
            ),
        )
    if here.gpu_problem is not None:
        line("gpu", here.gpu_problem)
    console.print()


def _print_findings(console: Console, findings: list[Finding]) -> None:
    from crab_edge_apps._text import printable
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("engine", "", "version", "seconds", "answer"):
        table.add_column(title, overflow="fold", no_wrap=title in ("engine", "", "seconds"))
    for one in findings:
        colour = COLOURS[one.state]
        table.add_row(
            one.engine,
            f"[{colour}]{one.state}[/{colour}]",
            escape(printable(one.facts.get("version", ""))),
            "" if one.seconds is None else f"{one.seconds:.2f}",
            escape(printable("" if one.answer is None else repr(one.answer))),
        )
    console.print(table)
    # Not in the table: commands in them are copied, so they must not be folded.
    for one in findings:
        facts = [f"{name}: {text}" for name, text in one.facts.items() if name not in ("version", "engine")]
        console.print(
            f"\n[bold]{one.engine}[/bold] [dim]{escape(printable(', '.join(facts)))}[/dim]", soft_wrap=True
        )
        for text in (*one.notes, *([one.problem] if one.problem else [])):
            console.print(f"  {escape(printable(text))}", soft_wrap=True)
