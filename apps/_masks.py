"""Masks for segmentation answers that came without: box and points on the frame of the record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from crab_edge import masks
from crab_edge.results import Mask
from crab_edge.tasks import FRAME_SIDE, Task, metrics
from crab_edge.tasks.scoring import Prediction, parsed_of


def needed(task: Task) -> bool:
    """Whether the task's metric compares masks."""
    return metrics.get(task.metric).needs_masks


def check(tasks: Sequence[Task]) -> None:
    """Before anything runs: DependencyError or InputError when masks are needed and can't be made."""
    if any(needed(task) for task in tasks):
        masks.choose()


def completed(
    task: Task,
    predictions: Sequence[Prediction],
    frames: Sequence[Path | None],
    advance: Callable[[], None] = lambda: None,
) -> list[Prediction]:
    """The predictions, each with the masks of its objects. `frames`: the picture of each, None = unknown.

    As in Crab+'s mask stage, the frame is stretched to 224x224 first. InputError for a picture that is needed
    and isn't there.
    """
    out = []
    for prediction, frame in zip(predictions, frames, strict=True):
        advance()
        parsed = parsed_of(task, prediction)
        if any(isinstance(result, Mask) for result in parsed) or not masks.objects(parsed):
            out.append(prediction)
            continue
        picture = masks.read_frame(frame or "(no picture named)", FRAME_SIDE)
        made = masks.add_masks(parsed, picture)[len(parsed) :]
        out.append(replace(prediction, masks=tuple(item for item in made if isinstance(item, Mask))))
    return out
