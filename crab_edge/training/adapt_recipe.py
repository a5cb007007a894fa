"""The recipe of an adapter on a given base: what Crab+ does with Qwen2.5-Omni.

A TOML file with `kind = "adapter"`. Nothing is learnt but I-LoRA, from records of AV-UIE v2, by epochs; the
learning rate follows the step alone, so that any number of processes, killed any number of times, takes the
same steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crab_edge.training.recipe import DataRecipe, Recipe, Strict, load_recipe, read_recipe, validated


class BaseRecipe(Strict):
    """The frozen base: its directory, and the bits of its linears (0: as they are, in the run's precision).

    `hidden_size` is the width that the recipe is for; `quantise_towers` says whether the encoders' linears
    are quantised too.
    """

    path: str | None = None
    hidden_size: int | None = Field(None, gt=0)
    quantise: Literal[0, 4, 8] = 0
    quantise_towers: bool = False


class AdapterSizes(Strict):
    """I-LoRA's sizes. `towers` wraps the official linears of both encoders, `train_towers` lets them learn.

    Wrapped but not learning is what the official run amounts to: its towers' experts stay exactly zero.
    """

    rank: int = Field(128, gt=0)
    alpha: float = Field(256.0, gt=0)
    experts: int = Field(3, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    towers: bool = True
    train_towers: bool = True


class Steps(Strict):
    """How long and how fast. AdamW with betas 0.9 and 0.999, a linear warm-up, then a cosine to zero.

    `batch` records a process in one forward; `global_batch` records a step over all processes and
    accumulated forwards. `checkpointing` recomputes activations in the backward pass. A checkpoint to resume
    from is written every `checkpoint_steps`; OUT/snapshots keeps the adapter at every `snapshot_share` of the
    run (0: never).
    """

    epochs: float = Field(5.0, gt=0)
    max_steps: int | None = Field(None, gt=0)
    batch: int = Field(4, gt=0)
    global_batch: int = Field(8, gt=0)
    lr: float = Field(1e-4, gt=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    checkpointing: bool = True
    checkpoint_steps: int = Field(500, gt=0)
    snapshot_share: float = Field(0.3, ge=0, le=1)


class AdapterRecipe(Strict):
    """An adapter on the base in a directory."""

    kind: Literal["adapter"]
    name: str
    seed: int = 42
    precision: Literal["auto", "fp32", "bf16"] = "bf16"
    base: BaseRecipe = BaseRecipe()
    data: DataRecipe = DataRecipe(source="avuie")
    adapter: AdapterSizes = AdapterSizes()
    steps: Steps = Steps()


def open_recipe(
    name: str | Path,
    minutes_scale: float = 1.0,
    *,
    base: Path | None = None,
    data: Path | None = None,
    quantise: int | None = None,
) -> Recipe | AdapterRecipe:
    """A recipe of either kind. `base`, `data` and `quantise` set a field of an adapter's recipe.

    InputError for what is wrong, and for options that the recipe's kind doesn't have.
    """
    from crab_edge.errors import InputError

    path, raw = read_recipe(name)
    given = {"--base": base, "--data": data, "--quantise-base": quantise}
    if raw.get("kind") != "adapter":
        wrong = [option for option, value in given.items() if value is not None]
        if wrong:
            raise InputError(
                f"{', '.join(wrong)}: {path.name} trains a base of its own; these options are for recipes of "
                'kind = "adapter", such as crab-plus-7b'
            )
        return load_recipe(name, minutes_scale)
    for part, field, value in (
        ("base", "path", base),
        ("data", "root", data),
        ("base", "quantise", quantise),
    ):
        if value is not None:
            _part(raw, part)[field] = str(value) if isinstance(value, Path) else value
    _part(raw, "data").setdefault("source", "avuie")
    recipe = validated(AdapterRecipe, raw, path)
    if recipe.data.source != "avuie":
        raise InputError(f'{path}: data.source: an adapter learns from "avuie", got "{recipe.data.source}"')
    if recipe.base.path is None:
        raise InputError(f"recipe {recipe.name} needs a base: give --base DIR, or base.path in the recipe")
    if recipe.steps.global_batch % recipe.steps.batch:
        raise InputError(
            f"{path}: steps.global_batch {recipe.steps.global_batch} isn't a multiple of steps.batch "
            f"{recipe.steps.batch}; correct it and run again"
        )
    return recipe


def _part(raw: dict[str, Any], name: str) -> dict[str, Any]:
    part = raw.setdefault(name, {})
    return part if isinstance(part, dict) else {}
