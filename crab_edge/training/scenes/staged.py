"""Scenes of every other task by number: `TaskScenes(source, extras).scene("s4", 7)`, the same everywhere."""

from __future__ import annotations

import zlib

import numpy as np

from crab_edge.errors import TaskError
from crab_edge.training.scenes.extras import Extras
from crab_edge.training.scenes.families import makers
from crab_edge.training.scenes.kit import Kit, TaskScene
from crab_edge.training.scenes.source import SceneSource


class TaskScenes:
    """Renders the tasks that `SceneSource.clip` and `still` don't, from the same pools and hold-outs.

    split "test": held-out pictures, faces and figures, with training recordings and voices (sounds="known")
    or held-out ones (sounds="unseen"). `extras` is needed by actions and emotions only.
    """

    def __init__(self, source: SceneSource, extras: Extras | None = None) -> None:
        self.source, self.extras = source, extras
        test = source.split == "test"
        self.kit = Kit(source.catalogue, source.planner, extras, test, test and source.sounds == "unseen")

    def __reduce__(self) -> tuple:
        return TaskScenes, (self.source, self.extras)

    @staticmethod
    def tasks() -> list[str]:
        """The tasks rendered here; "avqa-music" means music scenes with avqa's records."""
        return sorted(makers())

    def scene(self, task: str, index: int) -> TaskScene:
        """One record's media and truth, deterministic in (seed, split, task, index)."""
        maker = makers().get(task)
        if maker is None:
            raise TaskError(f"scenes have no task {task!r}; they have {', '.join(self.tasks())}")
        place = 2 * (self.source.split == "test") + (self.source.sounds == "unseen")
        seeds = [self.source.seed, place, 16 + zlib.crc32(task.encode()), index]
        return maker(self.kit, np.random.default_rng(seeds), index)
