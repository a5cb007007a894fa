"""A training recipe: one TOML file, validated. Steps decide; `max_minutes` cuts a stage short on a slow
machine.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeVar

import tomllib
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crab_edge.errors import InputError


class Strict(BaseModel):
    """Unknown fields are errors; values don't change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


_Kind = TypeVar("_Kind", bound=Strict)


class StageRecipe(Strict):
    """What every stage has. The learning rate is a cosine of progress = max(step share, time share)."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    lr: float = Field(gt=0)
    warmup_ratio: float = Field(0.03, ge=0, lt=1)
    final_lr_ratio: float = Field(0.0, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    max_minutes: float = Field(gt=0)
    clip_norm: float = Field(1.0, gt=0)
    validate_samples: int = Field(64, ge=0)


class AudioStage(StageRecipe):
    """Audio tower, starting from Whisper tiny.en unless `whisper` is false."""

    whisper: bool = True
    freeze_layers: int = Field(0, ge=0)


class VisionStage(StageRecipe):
    """Vision tower from scratch: `collages` is the share of crowded pictures, the others are stills of
    scenes.
    """

    collages: float = Field(0.0, ge=0, le=1)


class LanguageStage(StageRecipe):
    """Decoder (base) or I-LoRA (adapter) on questions and answers, several of one scene in a sequence.

    `batch` counts clips; `stills_per_clip` stills take one clip's place. `stills_first` is the share of steps
    that see stills only, `stills_share` the share of still steps after that. `soft_numbers` is the width
    (pixels) of the soft targets for box numbers, 0 for plain cross-entropy. `auxiliary` weighs the
    throw-away heads on the hidden states after decoder layer `auxiliary_layer`. `hold_clocks` keeps the first
    attention as it starts (see `starts`). `pointing` weighs the losses that teach answers to fetch boxes (see
    `pointing`). `drills` is how many further questions of each kind a scene is asked, `crowded_share` the
    share of the still steps that see crowded pictures of many objects (both with open scenes only).
    """

    questions: int = Field(8, gt=0)
    stills_per_clip: int = Field(4, gt=0)
    stills_first: float = Field(0.0, ge=0, le=1)
    stills_share: float = Field(0.4, ge=0, le=1)
    soft_numbers: float = Field(0.0, ge=0)
    auxiliary: float = Field(0.0, ge=0)
    auxiliary_layer: int = Field(3, gt=0)
    train_projections: bool = False
    hold_clocks: bool = False
    pointing: float = Field(0.0, ge=0)
    drills: int = Field(0, ge=0)
    crowded_share: float = Field(0.0, ge=0, le=1)


class AdapterStage(LanguageStage):
    """I-LoRA on the frozen base. `towers` wraps the official linears of both encoders too."""

    rank: int = Field(32, gt=0)
    alpha: float = Field(64.0, gt=0)
    experts: int = Field(3, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    towers: bool = True
    train_towers: bool = False


class DataRecipe(Strict):
    """Where scenes come from: the open packages, the synthetic stand-in of the tests, or AV-UIE v2 on
    disk.
    """

    source: Literal["open", "synthetic", "avuie"] = "open"
    cache: str | None = None
    root: str | None = None
    tasks: list[str] | None = None
    workers: int = Field(1, ge=0)


class Recipe(Strict):
    """A whole training run: audio, vision, base, adapter."""

    name: str
    seed: int = 42
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    vocab_size: int = Field(2048, ge=512)
    model: dict[str, Any] = Field(default_factory=dict)
    data: DataRecipe = DataRecipe()
    audio: AudioStage | None = None
    vision: VisionStage | None = None
    base: LanguageStage
    adapter: AdapterStage
    checkpoint_minutes: float = Field(2.0, gt=0)


def load_recipe(name: str | Path, minutes_scale: float = 1.0) -> Recipe:
    """A shipped recipe by name (`crab-nano`) or a TOML file by path; `minutes_scale` scales every time cap.

    InputError names the file and the field that is wrong.
    """
    path, raw = read_recipe(name)
    for stage in ("audio", "vision", "base", "adapter"):
        if isinstance(raw.get(stage), dict) and "max_minutes" in raw[stage]:
            raw[stage]["max_minutes"] = raw[stage]["max_minutes"] * minutes_scale
    return validated(Recipe, raw, path)


def read_recipe(name: str | Path) -> tuple[Path, dict[str, Any]]:
    """(path, content) of a recipe of any kind, by name or path, not validated yet."""
    path = Path(name)
    if path.suffix != ".toml" and not path.exists():
        folder = Path(str(files("crab_edge.training"))) / "recipes"
        path = folder / f"{name}.toml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.toml")))
            raise InputError(f"no recipe named {str(name)!r}: give a TOML file or one of {known}")
    if not path.is_file():
        raise InputError(f"{path}: no such recipe file")
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a TOML file ({error})") from error


def validated(kind: type[_Kind], raw: dict[str, Any], path: Path) -> _Kind:
    """A recipe of this kind; InputError names the file and the field that is wrong."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path}: {field}: {first['msg']}; correct it and run again") from error
