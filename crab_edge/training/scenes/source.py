"""Scenes by number: `SceneSource(catalogue, split).clip(7)` is the same scene everywhere, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from crab_edge.errors import InputError
from crab_edge.training.scenes.catalogue import Catalogue
from crab_edge.training.scenes.compose import Stage, stretch
from crab_edge.training.scenes.facts import Truth, Vocabulary
from crab_edge.training.scenes.mixing import mix
from crab_edge.training.scenes.plan import Box7, Planner, boxes
from crab_edge.training.scenes.truth import Sample, samples

FPS = 8
FRAMES = 10
KINDS = ("single", "double", "offscreen", "silent")
KIND_SHARES = (0.42, 0.33, 0.18, 0.07)


@dataclass
class RenderedScene:
    """A scene and everything true of it.

    frames uint8 [10, 224, 224, 3] (clips) or image uint8 [224, 224, 3] (stills); wave float32 [n] at 16 kHz.
    A stream that the scene lacks is None. boxes: (label, x1, y1, x2, y2, from_s, to_s) in 224-pixel units; a
    moving object has one row per frame. sounds: (label, start_s, end_s). `stage` draws it at native size.
    """

    frames: np.ndarray | None
    image: np.ndarray | None
    wave: np.ndarray | None
    duration_s: float
    boxes: list[Box7]
    samples: list[Sample]
    sounds: list[tuple[str, float, float]] = field(default_factory=list)
    truth: Truth | None = None
    stage: Stage | None = None

    def sample(self, task: str) -> Sample | None:
        """The first sample of a task."""
        return next((s for s in self.samples if s.task == task), None)


class SceneSource:
    """Renders scenes of one split.

    split "train": training pictures, recordings and backgrounds. split "test": held-out pictures and
    backgrounds, with training recordings (sounds="known") or held-out ones (sounds="unseen").
    """

    def __init__(
        self,
        catalogue: Catalogue,
        split: Literal["train", "test"],
        sounds: Literal["known", "unseen"] = "known",
        seed: int = 0,
    ) -> None:
        if split not in ("train", "test") or sounds not in ("known", "unseen"):
            raise InputError(f"split is train or test, sounds known or unseen; got {split!r}, {sounds!r}")
        self.catalogue, self.split, self.sounds, self.seed = catalogue, split, sounds, seed
        self._test = split == "test"
        self._unseen = self._test and sounds == "unseen"
        audible, visible = catalogue.audible(self._unseen), catalogue.visible(self._test)
        heard = {c.label for c in audible}
        silent = [c for c in catalogue.silent_pictures if c.of("picture", self._test)]
        self.planner = Planner(
            self._test,
            self._unseen,
            both=[c for c in visible if c.label in heard],
            audible=audible,
            visible=visible,
            # Classes without any recording can't be events: they are scenery too.
            scenery=silent + [c for c in visible if not c.sounds],
            backgrounds=[b for b in catalogue.backgrounds if b.test == self._test],
        )
        if not self.planner.both or not self.planner.backgrounds:
            raise InputError(
                f"the catalogue has no class with pictures and sounds for {split}/{sounds}; fetch again"
            )
        events = [c for c in catalogue.classes if c.sounds]
        shown = [c for c in catalogue.classes + catalogue.silent_pictures if c.pictures]
        self.vocabulary = Vocabulary(
            tuple((c.label, c.article, c.group) for c in events),
            tuple((c.label, c.article, c.group) for c in shown),
        )

    def __reduce__(self) -> tuple:
        return SceneSource, (self.catalogue, self.split, self.sounds, self.seed)

    def clip(self, index: int, focus: str | None = None) -> RenderedScene:
        """A clip of 2-10 s. `focus="ave"` asks for a scene with exactly one audio-visual event."""
        random = self._random(0, index)
        duration = (
            10.0 if random.random() < (0.6 if not self._test else 0.5) else float(random.integers(2, 10))
        )
        kind = "single" if focus == "ave" else str(random.choice(KINDS, p=KIND_SHARES))
        streams = float(random.random())
        hide_audio = not self._test and focus is None and streams < 0.08
        hide_video = not self._test and focus is None and 0.08 <= streams < 0.16 and kind != "silent"
        stage, events = self.planner.plan(random, kind, duration)
        times = frame_times(duration)
        frames = None if hide_video else stretch(stage.draw(times, duration))
        wave = None if hide_audio else mix(events, duration, random, not self._test)
        facts = self.planner.facts(stage, events, duration)
        if hide_video:
            facts = [replace(f, seen=None, side=None, box=None) for f in facts if f.heard]
        if hide_audio:
            facts = [replace(f, heard=None) for f in facts if f.seen]
        truth = Truth(facts, duration, None if hide_video else "video", not hide_audio)
        return RenderedScene(
            frames,
            None,
            wave,
            duration,
            [] if hide_video else boxes(stage, times, duration),
            samples(truth, self.vocabulary, random),
            [] if hide_audio else [(e.label, e.start_s, e.end_s) for e in events],
            truth,
            stage,
        )

    def still(self, index: int) -> RenderedScene:
        """An image with sound: 5 s for test, 1-5 s for training; exactly one visible object sounds.

        One training scene in eight has its sound off screen instead (no arig sample then).
        """
        random = self._random(1, index)
        duration = 5.0 if self._test else float(random.choice([1.0, 2.0, 3.0, 5.0], p=[0.2, 0.25, 0.25, 0.3]))
        kind = "offscreen" if not self._test and random.random() < 0.12 else "single"
        stage, events = self.planner.plan(random, kind, duration, still=True)
        wave = mix(events, duration, random, not self._test)
        image = stretch(stage.draw([0.0], duration))[0]
        facts = [
            replace(f, heard=(0, max(1, round(duration))) if f.heard else None)
            for f in self.planner.facts(stage, events, duration)
        ]
        truth = Truth(facts, duration, "image", True)
        return RenderedScene(
            None,
            image,
            wave,
            duration,
            boxes(stage, [0.0], duration),
            samples(truth, self.vocabulary, random),
            [(e.label, e.start_s, e.end_s) for e in events],
            truth,
            stage,
        )

    def audio(self, index: int) -> tuple[np.ndarray, list[tuple[str, float, float]]]:
        """5 s of sound, float32 [80000], with one to three events: (wave, [(label, start_s, end_s)])."""
        random = self._random(2, index)
        duration = 5.0
        count = int(random.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
        events = []
        for info in self.planner.draw(self.planner.audible, count, set(), random):
            length = float(random.uniform(0.8, duration)) if random.random() < 0.6 else duration
            start = float(random.uniform(0, duration - length))
            events.append(self.planner.event(info, (start, start + length), random))
        wave = mix(events, duration, random, not self._test)
        return wave, [(e.label, e.start_s, e.end_s) for e in events]

    def _random(self, kind: int, index: int) -> np.random.Generator:
        split = {"train": 0, "test": 1}[self.split] + (2 if self._unseen else 0)
        return np.random.default_rng([self.seed, split, kind, index])


def frame_times(duration_s: float) -> list[float]:
    """Seconds of the ten frames the model sees: round(linspace(0, n - 1, 10)) over n frames at 8 fps."""
    total = max(1, round(duration_s * FPS))
    return [float(i) / FPS for i in np.round(np.linspace(0, total - 1, FRAMES))]
