"""`crab-edge train`: a model, or an adapter on a given base, from a recipe; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from crab_edge.training.adapt_recipe import AdapterRecipe
    from crab_edge.training.recipe import Recipe


def _show_launch(name: str | None) -> None:
    if name is None:
        return
    from crab_edge.training.launch import path

    print(path(name))
    raise typer.Exit()


def command(
    recipe: Annotated[
        str,
        typer.Argument(help="A shipped recipe (crab-nano, crab-plus-7b, crab-plus-3b) or a TOML file."),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder of the run; default: runs/RECIPE.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option("--base", help="Directory of the base that an adapter is trained on.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of AV-UIE v2, for an adapter on a given base.")
    ] = None,
    quantise_base: Annotated[
        int | None,
        typer.Option("--quantise-base", help="Bits of the frozen base's linears: 4 (QLoRA), 8 or 0 (as is)."),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Print the memory that training on --base needs, and leave.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh/--resume", help="Start over instead of resuming.")] = False,
    minutes_scale: Annotated[
        float, typer.Option("--minutes-scale", min=0.001, help="Multiply every stage's time limit.")
    ] = 1.0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's choice.")] = None,
    launch_config: Annotated[
        str | None,
        typer.Option(
            "--launch-config",
            callback=_show_launch,
            is_eager=True,
            help="Print the file for `accelerate launch --config_file`: ddp, fsdp or deepspeed_zero2.",
        ),
    ] = None,
) -> None:
    """Train towers, base and adapter, or an adapter on a given base; ends with directories to export."""
    _quiet()
    try:
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        from crab_edge.errors import DependencyError

        raise DependencyError(f"training needs {error.name}: run `pip install 'crab-edge[train]'`") from error
    from crab_edge.errors import InputError
    from crab_edge.training.adapt_recipe import AdapterRecipe, open_recipe

    loaded = open_recipe(recipe, minutes_scale, base=base, data=data, quantise=quantise_base)
    folder = out or Path("runs") / loaded.name
    if isinstance(loaded, AdapterRecipe):
        if memory:
            _print_memory(loaded)
        else:
            _train_adapter(loaded, folder, fresh, threads)
        return
    if memory:
        raise InputError("--memory is for an adapter on a given base: name such a recipe, as crab-plus-7b")
    _train_model(loaded, folder, fresh, threads)


def _quiet() -> None:
    """Silence what libraries say of each other: nothing that the user did or could change."""
    import warnings

    # PEFT asks transformers for a property by its old name.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)


def _train_model(recipe: Recipe, out: Path, fresh: bool, threads: int | None) -> None:
    from crab_edge.training.progress import bar
    from crab_edge.training.run import Trainer, start_over, use_threads

    use_threads(threads)
    if fresh:
        start_over(out)
    with bar() as (say, progress):
        trainer = Trainer(recipe, out, say=say)
        trainer.run.progress = progress
        trainer.train()
        say(
            f"done: {out / 'base'} and {out / 'adapter'}; next: crab-edge export --model {out / 'base'} "
            f"--adapter {out / 'adapter'} --out BUNDLE"
        )


def _train_adapter(recipe: AdapterRecipe, out: Path, fresh: bool, threads: int | None) -> None:
    import os

    from crab_edge.training.adapt import train_adapter
    from crab_edge.training.progress import bar
    from crab_edge.training.run import use_threads

    use_threads(threads)
    with bar() as (say, progress):
        done = train_adapter(recipe, out, say=say, progress=progress, fresh=fresh)
        if os.environ.get("RANK", "0") == "0":
            export = f"crab-edge export --model {recipe.base.path} --adapter {done} --out BUNDLE"
            say(f"done: {done}; next: {export}")


def _print_memory(recipe: AdapterRecipe) -> None:
    from crab_edge.training.memory import memory_table, training_memory

    print(memory_table(recipe, training_memory(recipe)))
