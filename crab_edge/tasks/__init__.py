"""The unified interface: tasks with their media, instructions, parsers and metrics.

A task is added by one declaration: a `Task` in the tuple `TASKS` of a module of this package (or `register`
from outside it). Reader, prompt, parser, metric and tables follow from it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable

from crab_edge.errors import TaskError
from crab_edge.tasks.base import FRAME_SIDE, MODEL_CONTEXT, Bar, MediaContext, Parsed, Published, Task
from crab_edge.tasks.recipes import IMAGE_AUDIO, VIDEO_10, VIDEO_10_REWINDOW, MediaRecipe

__all__ = [
    "FRAME_SIDE",
    "IMAGE_AUDIO",
    "MODEL_CONTEXT",
    "VIDEO_10",
    "VIDEO_10_REWINDOW",
    "Bar",
    "MediaContext",
    "MediaRecipe",
    "Parsed",
    "Published",
    "Task",
    "all",
    "applicable",
    "distinct",
    "get",
    "names",
    "register",
    "unregister",
]

_registry: dict[str, Task] = {}
_scanned = False


def _tasks() -> dict[str, Task]:
    global _scanned
    if not _scanned:
        found = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
        for name in found:
            for task in getattr(importlib.import_module(f"{__name__}.{name}"), "TASKS", ()):
                register(task)
        _scanned = True
    return _registry


def register(task: Task) -> Task:
    """Add a task; TaskError when another one has its name."""
    if _registry.get(task.name, task) is not task:
        raise TaskError(f"there are two tasks called {task.name}; task names must differ")
    _registry[task.name] = task
    return task


def unregister(name: str) -> None:
    """Take a task out again (tests, notebooks)."""
    _tasks().pop(name, None)


def get(name: str) -> Task:
    """The task of that name; TaskError lists the names."""
    tasks = _tasks()
    if name not in tasks:
        raise TaskError(f"unknown task {name!r}; the tasks are {', '.join(sorted(tasks))}")
    return tasks[name]


def names() -> list[str]:
    """All names, in the families' order."""
    return [task.name for task in all()]


def all() -> list[Task]:
    """All tasks, ordered by family and declaration."""
    return list(_tasks().values())


def applicable(streams: Iterable[str]) -> list[Task]:
    """The tasks made for a clip that has these streams ("video", "image", "audio"), in `all`'s order.

    A kind counts as often as it is named: tasks that compare two videos need it twice. Tasks that need a
    question are among them; whoever runs tasks without one leaves them out.
    """
    given = Counter(streams)
    unknown = set(given) - {"video", "image", "audio"}
    if unknown:
        raise TaskError(f"unknown stream {min(unknown)!r}; streams are video, image and audio")
    return [task for task in all() if task.applies(given.elements())]


def distinct(tasks: Iterable[Task]) -> list[Task]:
    """The first of those tasks that show and ask the same: data sets of one task have one prompt."""
    asked: dict[tuple[MediaRecipe, str], Task] = {}
    for task in tasks:
        asked.setdefault((task.media, task.instruction), task)
    return list(asked.values())
