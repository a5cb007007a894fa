"""`crab-edge build-engine`: the engines of a bundle that was exported for this machine, built on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    bundle: Annotated[Path, typer.Argument(help="A bundle that `crab-edge export --target` wrote.")],
    out: Annotated[Path, typer.Option(help="The bundle folder to write.")],
    target: Annotated[
        str | None, typer.Option(help="Which target; default: the one that isn't built yet.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the bundle at --out.")] = False,
) -> None:
    """Build the TensorRT engines of BUNDLE on this machine and publish the bundle that has them at OUT.

    Needs the machine's own TensorRT (on a Jetson JetPack 7.2 or newer) and its GPU. Nobody has run this on
    such a machine yet: what TensorRT says when it refuses is printed as it is.
    """
    from crab_edge_export.device_package import build_engines
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    path = build_engines(bundle, target, out, overwrite=overwrite, report=console.print)
    print(f"{path}: built; check it with `crab-edge doctor`, run it with --engine tensorrt")
