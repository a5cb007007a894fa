"""`crab-edge scenes`: fetch the open packages, render records, print a list's mix, write the sample clip."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from crab_edge.errors import InputError

app = typer.Typer(help="Rendered audio-visual scenes for training and evaluation.", no_args_is_help=True)

CacheOption = Annotated[
    Path | None, typer.Option(help="Where packages and the catalogue lie; the user's cache by default.")
]


def _catalogue(cache: Path | None) -> Any:
    from rich.console import Console

    from crab_edge.training.scenes import fetch

    with Console(stderr=True).status("scenes") as status:
        return fetch(cache, progress=lambda what: status.update(f"scenes: {what}"))


def _extras(cache: Path | None) -> Any:
    from rich.console import Console

    from crab_edge.training.scenes import fetch_extras

    with Console(stderr=True).status("voices, faces, figures") as status:
        return fetch_extras(cache, progress=lambda what: status.update(f"voices, faces, figures: {what}"))


@app.command()
def fetch(
    cache: CacheOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Download the packages (about 550 MB) that aren't there yet and build both packs."""
    catalogue = _catalogue(cache)
    extras = _extras(cache)
    summary = catalogue.summary() | extras.summary()
    if as_json:
        typer.echo(json.dumps(summary))
        return
    for name, value in summary.items():
        shown = ", ".join(f"{n} {k}" for k, n in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{name.replace('_', ' ')}: {shown}")
    for pack in (catalogue, extras):
        typer.echo(f"manifest: {pack.path / 'manifest.json'}")


@app.command()
def render(
    out: Annotated[Path, typer.Option(help="Folder of the task folders.")] = Path("AVUIE_2"),
    task: Annotated[list[str] | None, typer.Option(help="A task, or several; all by default.")] = None,
    split: Annotated[str, typer.Option(help="train or test.")] = "test",
    sounds: Annotated[
        str, typer.Option(help="Of test scenes: known or unseen recordings, or both lists.")
    ] = "both",
    count: Annotated[int, typer.Option(min=1, help="Scenes a task and list.")] = 300,
    seed: Annotated[int, typer.Option(help="Another seed, other scenes.")] = 0,
    cache: CacheOption = None,
) -> None:
    """Write scenes as AV-UIE v2 records with their media."""
    from rich.progress import Progress

    from crab_edge.training.scenes import SceneSource
    from crab_edge.training.scenes.avuie import task_names, write_avuie
    from crab_edge.training.scenes.families import needing_extras

    if split not in ("train", "test") or sounds not in ("known", "unseen", "both"):
        raise InputError(
            f"--split is train or test and --sounds known, unseen or both; got {split} and {sounds}"
        )
    names = [n.strip() for part in task or task_names() for n in part.split(",") if n.strip()]
    unknown = [n for n in names if n not in task_names()]
    if unknown:
        raise InputError(f"scenes have no task {unknown[0]!r}; they have {', '.join(task_names())}")
    catalogue = _catalogue(cache)
    extras = _extras(cache) if needing_extras() & set(names) else None
    kinds = ["known"] if split == "train" else ["known", "unseen"] if sounds == "both" else [sounds]
    from rich.console import Console

    with Progress(console=Console(stderr=True)) as bar:
        for kind in kinds:
            source = SceneSource(catalogue, split, kind, seed)  # type: ignore[arg-type]
            for name in names:
                row = bar.add_task(f"{name} {split} {kind}", total=count)

                def show(done: int, row: Any = row) -> None:
                    bar.update(row, completed=done)

                write_avuie(source, out, name, split, count, extras=extras, progress=show)
    typer.echo(f"wrote {', '.join(names)} to {out}; measure with `crab-edge evaluate --data {out}`")


@app.command()
def mix(
    folder: Annotated[Path, typer.Argument(help="Folder of the task folders, or a list file.")] = Path(
        "AVUIE_2"
    ),
) -> None:
    """Print the mix of rendered lists: objects, silent ones, sizes, seconds, classes."""
    from crab_edge.training.scenes.describe import describe_mix

    for line in describe_mix(folder):
        typer.echo(line)


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="The mp4 to write; its provenance goes beside it as SAMPLE.md.")],
    cache: CacheOption = None,
) -> None:
    """Write the ten-second sample clip from public-domain pictures and CC0 recordings."""
    from crab_edge.training.scenes.sample import write_sample

    for path in write_sample(out, cache):
        typer.echo(path)
