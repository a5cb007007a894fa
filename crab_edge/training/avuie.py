"""AV-UIE v2's train lists as scenes: people with the real data train from the folder they have.

`root` is the folder that holds `<task>/train.json` and the media. Every media path is checked before a run
starts. The lists tell answers, not boxes or sounds, so towers aren't pre-trained from them: take towers
from a model that has them, and leave the recipe's audio and vision stages out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crab_edge import avuie, tasks
from crab_edge.clip import Clip
from crab_edge.errors import InputError
from crab_edge.tasks.base import Task
from crab_edge.training.recipe import DataRecipe
from crab_edge.training.sources import Sources

_LABEL_FIELDS = ("event", "a_obj")


@dataclass(frozen=True)
class AvuieSample:
    """One question of a record."""

    task: str
    instruction: str
    answer: str
    lead: str
    metadata: dict[str, Any]


@dataclass(frozen=True)
class AvuieScene:
    """A record's media, decoded, in the form of a rendered scene; what the list doesn't tell is empty."""

    frames: np.ndarray | None
    image: np.ndarray | None
    wave: np.ndarray | None
    duration_s: float
    samples: list[AvuieSample]
    boxes: list = field(default_factory=list)
    sounds: list = field(default_factory=list)


@dataclass(frozen=True)
class _Entry:
    task: Task
    media: tuple[tuple[Path, str], ...]
    record: dict[str, Any]


class AvuieScenes:
    """Records of several lists; `clip(i)` and `still(i)` are fixed shuffles of those with and without
    video.
    """

    def __init__(self, lists: Sequence[tuple[Task, Path]], seed: int = 0) -> None:
        self._all: list[_Entry] = []
        self._video: list[_Entry] = []
        self._image: list[_Entry] = []
        self.labels: set[str] = set()
        missing: list[Path] = []
        for task, path in lists:
            for record in avuie.read_records(path):
                media = tuple(avuie.media_paths(record, task.media, path.parent))
                missing += [p for p, _ in media if not p.is_file()]
                entry = _Entry(task, media, record)
                self._all.append(entry)
                (self._video if any(kind == "video" for _, kind in media) else self._image).append(entry)
                self.labels |= {str(record[f]) for f in _LABEL_FIELDS if isinstance(record.get(f), str)}
        if missing:
            raise InputError(
                f"{len(missing)} media files of the train lists are missing, the first is {missing[0]}: "
                "complete the folder, or leave the task out of data.tasks"
            )
        if not self._video and not self._image:
            raise InputError("the train lists hold no records: check data.root and data.tasks in the recipe")
        shuffle = np.random.default_rng(seed)
        for entries in (self._video, self._image):
            order = shuffle.permutation(len(entries))
            entries[:] = [entries[i] for i in order]

    def __len__(self) -> int:
        """Records of all lists."""
        return len(self._all)

    @property
    def complete(self) -> bool:
        """Whether every record has something to see and something to hear."""
        kinds = ({kind for _, kind in entry.media} for entry in self._all)
        return all("audio" in found and len(found) > 1 for found in kinds)

    def record(self, index: int) -> AvuieScene:
        """The record at a place, list after list, each in its own order."""
        return _open(self._all, index)

    def name(self, index: int) -> str:
        """A record's task and first file, for people."""
        entry = self._all[index]
        return f"{entry.task.name}: {entry.media[0][0] if entry.media else entry.record}"

    def clip(self, index: int) -> AvuieScene:
        """A record with video, or one without where there is none."""
        return _open((self._video or self._image), index)

    def still(self, index: int) -> AvuieScene:
        """A record with a still, or one with video where there is none."""
        return _open((self._image or self._video), index)

    def audio(self, index: int) -> tuple[np.ndarray, list]:
        """Refused: the lists don't say who sounds when."""
        raise InputError(
            "AV-UIE lists don't tell sounds in time: leave [audio] and [vision] out of the recipe"
        )


def _open(entries: list[_Entry], index: int) -> AvuieScene:
    entry = entries[index % len(entries)]
    task, recipe = entry.task, entry.task.media
    frames, image, waves, duration = _media(entry.media, recipe.frames)
    part = avuie.frame_index(entry.record, recipe)
    wave = np.concatenate([recipe.slice_audio(heard, part) for heard in waves]) if waves else None
    question = task.question(entry.record) if task.needs_question else None
    lead = recipe.lead(frames is not None or image is not None, wave is not None)
    sample = AvuieSample(
        task.name, task.prompt(question), avuie.target(entry.record, task), lead, entry.record
    )
    return AvuieScene(frames, image, wave, duration, [sample])


@lru_cache(maxsize=8)
def _media(
    media: tuple[tuple[Path, str], ...], count: int
) -> tuple[np.ndarray | None, np.ndarray | None, list[np.ndarray], float]:
    # Only the named kind of each file: a video's own sound isn't the list's audio file.
    with Clip.open(media, max_minutes=None) as clip:
        # Two videos are shown as one, two sounds heard as one (Crab+ reference).
        frames = np.concatenate([video.frames(count) for video in clip.videos]) if clip.videos else None
        image = clip.images[0].pixels() if clip.images else None
        return frames, image, [audio.waveform() for audio in clip.audios], clip.duration_s


def open_avuie(recipe: DataRecipe) -> Sources:
    """The train lists under `data.root`. The looks between stages are at training records: the lists hold
    no others.

    InputError when the folder, a list or a media file is missing.
    """
    lists = train_lists(recipe)
    train = AvuieScenes(lists)
    labels = tuple(sorted(train.labels)) or ("object",)
    names = [task.name for task, _ in lists]
    return Sources(train, train, labels, None, {"data": {"avuie": names}}, names)


def train_lists(recipe: DataRecipe) -> list[tuple[Task, Path]]:
    """(task, list) of every task that the recipe names, in its order; all that are there if it names none.

    InputError when the folder or a list is missing.
    """
    if not recipe.root:
        raise InputError(
            "data.source is avuie, but data.root isn't set: name the folder that holds <task>/train.json "
            "(--data, or data.root in the recipe)"
        )
    root = Path(recipe.root)
    names = recipe.tasks or [t.name for t in tasks.all() if (root / t.name / "train.json").is_file()]
    lists = []
    for name in names:
        task, path = tasks.get(name), root / name / "train.json"
        if not path.is_file():
            raise InputError(f"{path}: no such list; check data.root and data.tasks in the recipe")
        lists.append((task, path))
    return lists
