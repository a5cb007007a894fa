"""`crab-edge import-adapter`: Crab+'s finetune_weights.bin to an adapter directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    file: Annotated[Path, typer.Argument(help="Crab+'s finetune_weights.bin.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The adapter directory to write.")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model; its config.json decides the shapes.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Without the base at hand: 7b or 3b (default: what the file says).")
    ] = None,
    rank: Annotated[int, typer.Option(help="r of the adapter.")] = 128,
    experts: Annotated[int, typer.Option(help="Experts a linear.")] = 3,
    alpha: Annotated[float, typer.Option(help="lora_alpha, which the file doesn't hold.")] = 256,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the adapter at --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Convert FILE to PEFT's form (safetensors), exact to the bit, after checking every key and shape."""
    from crab_edge_apps._adapters import print_report
    from crab_edge_apps._progress import with_progress

    from crab_edge.model.official import import_adapter

    report = with_progress(
        lambda progress: import_adapter(
            file,
            out,
            base=base,
            size=size,
            rank=rank,
            experts=experts,
            alpha=alpha,
            overwrite=overwrite,
            progress=progress,
        ),
        "reading the adapter",
    )
    print_report(report, as_json, "no-ops, which `crab-edge export` leaves out of the graphs")
