"""Planning a scene: who is in it, where, when, and with which recording. Nothing is drawn or mixed here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crab_edge.training.scenes.catalogue import Asset, ClassInfo
from crab_edge.training.scenes.compose import CANVASES, Stage, Thing, draw_background, draw_cutout
from crab_edge.training.scenes.facts import SIDES, Fact
from crab_edge.training.scenes.mixing import SoundEvent

Box7 = tuple[str, int, int, int, int, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Planner:
    """The pools of one split and the rules by which scenes are drawn from them."""

    test: bool
    unseen: bool
    both: list[ClassInfo]
    audible: list[ClassInfo]
    visible: list[ClassInfo]
    scenery: list[ClassInfo]
    backgrounds: list[Asset]

    def draw(
        self, pool: list[ClassInfo], count: int, taken: set[str], random: np.random.Generator
    ) -> list[ClassInfo]:
        rows = [c for c in pool if c.label not in taken]
        picks = random.permutation(len(rows))[:count]
        return [rows[int(i)] for i in picks]

    def event(self, info: ClassInfo, span: tuple[float, float], random: np.random.Generator) -> SoundEvent:
        pool: list[Asset] = info.of("sound", self.unseen)
        files = [a for a in pool if not a.key.startswith("f:")]
        # Where a class has both, a file and a melody are equally likely.
        if files and len(files) < len(pool) and random.random() < 0.5:
            pool = files
        asset = pool[int(random.integers(len(pool)))]
        return SoundEvent(info.label, asset, span[0], span[1], float(random.uniform(-8.0, 4.0)))

    def plan(
        self, random: np.random.Generator, kind: str, duration: float, still: bool = False
    ) -> tuple[Stage, list[SoundEvent]]:
        """A stage and its sounds; kind: single or double (sounding objects in view), offscreen, silent."""
        canvas = CANVASES[int(random.integers(len(CANVASES)))]
        background = self.backgrounds[int(random.integers(len(self.backgrounds)))]
        stage = Stage(canvas, draw_background(background, canvas, random, not self.test))
        sounding_count = {"single": 1, "double": 2, "offscreen": int(random.random() < 0.35), "silent": 0}[
            kind
        ]
        sounding = self.draw(self.both, sounding_count, set(), random)
        taken = {c.label for c in sounding}
        off = self.draw(self.audible, 1, taken, random) if kind == "offscreen" else []
        taken |= {c.label for c in off}
        if kind == "double":
            extra = int(random.choice([0, 1], p=[0.45, 0.55]))
        elif sounding:
            extra = int(random.choice([0, 1, 2], p=[0.3, 0.4, 0.3]))
        else:
            extra = int(random.choice([1, 2, 3], p=[0.5, 0.3, 0.2]))
        silent: list[ClassInfo] = []
        for _ in range(extra):
            event_class = random.random() < 0.45 or not self.scenery
            silent += self.draw(self.visible if event_class else self.scenery, 1, taken, random)
            taken |= {c.label for c in silent}
        events = []
        windows = []
        for info in sounding + off:
            heard = (0, round(duration)) if still else _window(duration, 0.35, 1, random)
            windows.append(heard)
            events.append(
                self.event(info, (0.0, duration) if still else _blur(heard, duration, random), random)
            )
        self._place(stage, sounding, silent, windows, duration, random, still)
        return stage, events

    def _place(
        self,
        stage: Stage,
        sounding: list[ClassInfo],
        silent: list[ClassInfo],
        windows: list[tuple[int, int]],
        duration: float,
        random: np.random.Generator,
        still: bool,
    ) -> None:
        infos = sounding + silent
        low, high = {1: (0.3, 0.7), 2: (0.22, 0.6)}.get(len(infos), (0.2, 0.45))
        if not self.test:
            low, high = low * 0.85, min(high * 1.12, 0.8)
        for number, info in enumerate(infos):
            pool = info.of("picture", self.test)
            asset = pool[int(random.integers(len(pool)))]
            size = float(random.uniform(low, high))
            seen = (0, round(duration)) if still else _window(duration, 0.6, 2, random)
            if number < len(sounding):
                heard = windows[number]
                if min(seen[1], heard[1]) - max(seen[0], heard[0]) < min(2, heard[1] - heard[0]):
                    seen = (0, round(duration))
            thing = None
            for attempt in range(24):
                if attempt % 8 == 0:
                    cutout = draw_cutout(
                        asset,
                        stage.canvas,
                        max(size * (1 - 0.2 * (attempt // 8)), 0.2),
                        random,
                        not self.test,
                    )
                start, end = self._path(cutout.size, stage.canvas, random, still)
                candidate = Thing(
                    info,
                    asset,
                    cutout,
                    size,
                    start,
                    end,
                    (0.0, duration + 1.0) if still else _blur(seen, duration, random),
                )
                if not any(collide(candidate, other, duration, stage.canvas) for other in stage.things):
                    thing = candidate
                    break
            if thing is not None:
                stage.things.append(thing)
            elif number < len(sounding):
                # A sounding object is never dropped: it gives way to nothing placed later.
                stage.things.append(candidate)

    def _path(
        self, size: tuple[int, int], canvas: tuple[int, int], random: np.random.Generator, still: bool
    ) -> tuple[Point, Point]:
        """Where an object's centre is at the start and at the end; in training it may spill over the edge."""
        half = size[0] / canvas[0] / 2, size[1] / canvas[1] / 2
        spill = 0.0 if self.test else 0.08
        reach = [max(h * (1 - 2 * spill), 0.05) for h in half]

        def somewhere() -> Point:
            x, y = (float(random.uniform(min(r, 0.5), max(1 - r, 0.5))) for r in reach)
            return x, y

        start = somewhere()
        if still or random.random() < 0.7:
            return start, start
        goal = somewhere()
        part = float(random.uniform(0.3, 0.8))
        return start, (start[0] + (goal[0] - start[0]) * part, start[1] + (goal[1] - start[1]) * part)

    def facts(self, stage: Stage, events: list[SoundEvent], duration: float) -> list[Fact]:
        """What is true of every participant, in whole seconds."""
        by_label = {e.label: e for e in events}
        seconds = max(1, round(duration))
        facts = []
        for thing in stage.things:
            event = by_label.pop(thing.info.label, None)
            seen = (round(max(thing.visible[0], 0)), min(round(thing.visible[1]), seconds))
            time = max(thing.visible[0], 0.0)
            box = thing.box(time, duration, stage.canvas)
            facts.append(
                Fact(
                    thing.info.label,
                    thing.info.article,
                    thing.info.verb,
                    bool(thing.info.sounds),
                    seen,
                    _whole(event),
                    _side(thing),
                    box,
                    event.gain_db if event else 0.0,
                )
            )
        off = {c.label: c for c in self.audible}
        for event in by_label.values():
            info = off[event.label]
            facts.append(
                Fact(info.label, info.article, info.verb, True, None, _whole(event), loudness=event.gain_db)
            )
        return facts


def _window(duration: float, whole: float, least: int, random: np.random.Generator) -> tuple[int, int]:
    """Whole seconds (start, end): all of the clip with probability `whole`, else at least `least` long."""
    seconds = round(duration)
    if seconds <= least or random.random() < whole:
        return 0, seconds
    length = int(random.integers(least, seconds))
    start = int(random.integers(0, seconds - length + 1))
    return start, start + length


def _blur(window: tuple[int, int], duration: float, random: np.random.Generator) -> tuple[float, float]:
    """The real times: up to 0.3 s off the whole seconds, so that rounding gives them back."""
    start, end = map(float, window)
    if start > 0:
        start += float(random.uniform(-0.3, 0.3))
    end = end + float(random.uniform(-0.3, 0.3)) if end < duration else duration
    return start, end


def _whole(event: SoundEvent | None) -> tuple[int, int] | None:
    if event is None:
        return None
    start = round(event.start_s)
    return start, max(round(event.end_s), start + 1)


def _side(thing: Thing) -> str | None:
    """Third of the frame in which the object stays; None near a border between thirds."""
    sides = {third(x) for x, _ in (thing.start, thing.end)}
    return sides.pop() if len(sides) == 1 else None


def third(x: float) -> str | None:
    """Side of the frame at x, a share of its width; None near a border between thirds."""
    if min(abs(x - 1 / 3), abs(x - 2 / 3)) < 0.04:
        return None
    return SIDES[min(int(x * 3), 2)]


def collide(a: Thing, b: Thing, duration: float, canvas: tuple[int, int]) -> bool:
    """Whether more than 10 % of the smaller one's box is covered at the start, middle or end."""
    for time in (0.0, duration / 2, duration) if a.moves or b.moves else (0.0,):
        p, q = a.place(time, duration, canvas), b.place(time, duration, canvas)
        wide, high = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
        smaller = min((p[2] - p[0]) * (p[3] - p[1]), (q[2] - q[0]) * (q[3] - q[1]))
        if wide > 0 and high > 0 and wide * high > 0.1 * max(smaller, 1):
            return True
    return False


def boxes(stage: Stage, times: list[float], duration: float) -> list[Box7]:
    rows: list[Box7] = []
    for thing in stage.things:
        label = thing.info.label
        if not thing.moves:
            rows.append((label, *thing.box(0.0, duration, stage.canvas), *thing.visible))
            continue
        for index, time in enumerate(times):
            until = times[index + 1] if index + 1 < len(times) else duration
            if thing.visible[0] <= time < thing.visible[1]:
                rows.append(
                    (label, *thing.box(time, duration, stage.canvas), time, min(until, thing.visible[1]))
                )
    return rows
