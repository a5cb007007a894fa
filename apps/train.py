"""`crab-edge train`: trains a model and its I-LoRA adapter from a recipe; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (crab-nano) or a TOML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.")] = Path("runs/crab-nano"),
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Start over instead of resuming.")] = False,
    minutes_scale: Annotated[
        float, typer.Option("--minutes-scale", min=0.001, help="Multiply every stage's time limit.")
    ] = 1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")] = None,
) -> None:
    """Train towers, base and adapter; ends with OUT/base and OUT/adapter, ready for `crab-edge export`."""
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        from crab_edge.errors import DependencyError

        raise DependencyError(f"training needs {error.name}: run `pip install 'crab-edge[train]'`") from error
    from crab_edge.training.progress import bar
    from crab_edge.training.recipe import load_recipe
    from crab_edge.training.run import Trainer, start_over, use_threads

    loaded = load_recipe(recipe, minutes_scale)
    use_threads(threads)
    if fresh:
        start_over(out)
    with bar() as (say, progress):
        trainer = Trainer(loaded, out, say=say)
        trainer.run.progress = progress
        trainer.train()
        say(
            f"done: {out / 'base'} and {out / 'adapter'}; next: crab-edge export --model {out / 'base'} "
            f"--adapter {out / 'adapter'} --out BUNDLE"
        )
