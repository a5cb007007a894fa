"""Scenes of the tasks beyond the first five: one file a family.

A module's `MAKERS` tells how the scene of a task is made: a function `(kit, random, index) -> TaskScene`,
deterministic in its arguments. `EXTRAS = True` says that the module needs the second pack. Modules of this
folder are found by scanning it; nothing else lists them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache
from types import ModuleType

from crab_edge.training.scenes.kit import Maker


@lru_cache(maxsize=1)
def _modules() -> tuple[ModuleType, ...]:
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}") for name in names)


@lru_cache(maxsize=1)
def makers() -> dict[str, Maker]:
    """Task name -> maker."""
    return {task: maker for module in _modules() for task, maker in module.MAKERS.items()}


def needing_extras() -> set[str]:
    """Tasks whose scenes are made of the second pack (voices, faces, figures)."""
    return {task for module in _modules() if getattr(module, "EXTRAS", False) for task in module.MAKERS}
