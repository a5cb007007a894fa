"""`crab-edge export-adapter`: an adapter directory to a file that the official Crab+ code loads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    adapter: Annotated[Path, typer.Argument(help="The adapter directory.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write, finetune_weights.bin.")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model; its config.json decides the shapes.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Without the base at hand: 7b or 3b (default: what the adapter says).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON.")] = False,
) -> None:
    """Convert ADAPTER to Crab+'s own file: the official keys, order and format, exact to the bit."""
    from crab_edge_apps._adapters import print_report
    from crab_edge_apps._progress import with_progress

    from crab_edge.model.official import export_adapter

    report = with_progress(
        lambda progress: export_adapter(
            adapter, out, base=base, size=size, overwrite=overwrite, progress=progress
        ),
        "reading the adapter",
    )
    print_report(report, as_json, "no-ops")
