"""What makers of scenes share: the pools of one split, placing objects, and the finished scene."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from crab_edge import tasks
from crab_edge.errors import InputError
from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo
from crab_edge.training.scenes.compose import CANVASES, Stage, Thing, draw_background, draw_cutout, stretch
from crab_edge.training.scenes.extras import Extras
from crab_edge.training.scenes.mixing import SoundEvent, mix
from crab_edge.training.scenes.plan import Planner, collide
from crab_edge.training.scenes.truth import Sample

FPS = 8


@dataclass
class Film:
    """A clip to be drawn: its stage, its seconds, and the sound inside its file (None = a silent file)."""

    stage: Stage
    duration_s: float
    wave: np.ndarray | None = None

    def images(self) -> list[Image.Image]:
        """All frames at 8 a second, at native size."""
        return self.stage.draw(
            [i / FPS for i in range(max(1, round(self.duration_s * FPS)))], self.duration_s
        )

    def frames(self, count: int) -> np.ndarray:
        """uint8 [count, 224, 224, 3]: the frames round(linspace(0, n - 1, count)), as the reference picks."""
        total = max(1, round(self.duration_s * FPS))
        times = [float(i) / FPS for i in np.round(np.linspace(0, total - 1, count))]
        return stretch(self.stage.draw(times, self.duration_s))


@dataclass
class TaskScene:
    """One record's media and truth.

    films and waves (float32 [n], 16 kHz) in the order of the record's fields; `picture` RGB at native size
    and `mask` bool [height, width] of the same size, for tasks that show a still. `frame`: which second of
    the sound the picture belongs to. `used`: keys of all pictures and recordings.
    """

    task: str
    films: list[Film]
    waves: list[np.ndarray]
    samples: list[Sample]
    duration_s: float
    picture: Image.Image | None = None
    mask: np.ndarray | None = None
    frame: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)

    @property
    def image(self) -> np.ndarray | None:
        """uint8 [224, 224, 3] of the still."""
        return None if self.picture is None else stretch([self.picture])[0]


@dataclass(frozen=True)
class Kit:
    """The pools of one split. `test`, `sounds_test`: whether pictures and recordings are held-out ones."""

    catalogue: Catalogue
    planner: Planner
    extras_or_none: Extras | None
    test: bool
    sounds_test: bool

    @property
    def extras(self) -> Extras:
        if self.extras_or_none is None:
            raise InputError(
                "this task needs the pack of voices, faces and figures; run `crab-edge scenes fetch`"
            )
        return self.extras_or_none

    def stage(
        self, random: np.random.Generator, canvas: tuple[int, int] | None = None
    ) -> tuple[Stage, set[str]]:
        """An empty stage over a background of the split, and the background's key."""
        canvas = canvas or CANVASES[int(random.integers(len(CANVASES)))]
        asset = pick(self.planner.backgrounds, random)
        return Stage(canvas, draw_background(asset, canvas, random, not self.test)), {asset.key}

    def mixed(self, events: list[SoundEvent], duration: float, random: np.random.Generator) -> np.ndarray:
        return mix(events, duration, random, not self.test)

    def place(
        self,
        stage: Stage,
        infos: Sequence[ClassInfo],
        random: np.random.Generator,
        *,
        span: tuple[float, float],
        duration: float,
        sizes: tuple[float, float] | None = None,
        still: bool = True,
        columns: bool = False,
    ) -> list[Thing]:
        """Adds one object a class without collisions; those that found no room are left out of the result.

        `columns`: each in a column of its own, in the order given, left to right.
        """
        low, high = sizes or {1: (0.35, 0.7), 2: (0.28, 0.5)}.get(len(infos), (0.22, 0.36))
        placed = []
        for number, info in enumerate(infos):
            asset = pick(info.of("picture", self.test), random)
            size = float(random.uniform(low, high))
            for attempt in range(24):
                if attempt % 8 == 0:
                    shrink = max(size * (1 - 0.2 * (attempt // 8)), 0.18)
                    cutout = draw_cutout(asset, stage.canvas, shrink, random, not self.test)
                half = cutout.width / stage.canvas[0] / 2, cutout.height / stage.canvas[1] / 2
                left, right = (number / len(infos), (number + 1) / len(infos)) if columns else (0.0, 1.0)
                middle = (left + right) / 2
                start = (
                    float(random.uniform(min(left + half[0], middle), max(right - half[0], middle))),
                    float(random.uniform(min(half[1], 0.5), max(1 - half[1], 0.5))),
                )
                goal = start
                if not still and not columns and random.random() < 0.4:
                    goal = (float(random.uniform(min(half[0], 0.5), max(1 - half[0], 0.5))), start[1])
                thing = Thing(info, asset, cutout, size, start, goal, span)
                if not any(collide(thing, other, duration, stage.canvas) for other in stage.things):
                    stage.things.append(thing)
                    placed.append(thing)
                    break
        return placed


Maker = Callable[[Kit, np.random.Generator, int], TaskScene]


def pick(pool: Sequence[Any], random: np.random.Generator) -> Any:
    """One of them; InputError when there is none."""
    if not pool:
        raise InputError("nothing of this split to choose from; run `crab-edge scenes fetch` again")
    return pool[int(random.integers(len(pool)))]


def whole(asset: Asset, label: str, duration: float, gain_db: float = 0.0) -> SoundEvent:
    """A recording that sounds throughout."""
    return SoundEvent(label, asset, 0.0, duration, gain_db)


def sample(task: str, results: Sequence[Any], record: dict[str, Any], *targets: str) -> Sample:
    """The task's own words for these results; the record gets them in the fields `targets`."""
    definition = tasks.get(task)
    answer = definition.render(results)
    question = definition.question(record) if definition.needs_question else None
    lead = definition.media.lead(True, True)
    fields = {**record, **dict.fromkeys(targets, answer)}
    return Sample(task, definition.prompt(question), answer, lead, fields)


def facts(
    things: Sequence[Thing], heard: Sequence[str], seconds: float, note: str | None = None
) -> dict[str, Any]:
    """What the mix is counted from; `note` says what is staged about the scene."""
    seen = [thing.info.label for thing in things]
    out: dict[str, Any] = {
        "objects in view": len(seen),
        "silent object in view": any(label not in heard for label in seen),
        "sounds": len(heard),
        "sounding objects in view": sum(label in heard for label in seen),
        "size, % of the frame's side": [round(100 * thing.size) for thing in things],
        "seconds": seconds,
        "classes in view": seen,
        "classes heard": list(heard),
    }
    if note:
        out["note"] = note
    return out
