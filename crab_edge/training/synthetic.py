"""A stand-in for rendered scenes: coloured rectangles that hum. Nothing is fetched; for tests and dry
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

RATE = 16_000
LABELS = ("red block", "green block", "blue block", "bell")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230), (230, 210, 60))
TONES = (220.0, 440.0, 880.0, 1760.0)


@dataclass(frozen=True)
class SyntheticSample:
    task: str
    instruction: str
    answer: str
    lead: str
    metadata: dict = field(default_factory=dict)


@dataclass(frozen=True)
class SyntheticScene:
    frames: np.ndarray | None
    image: np.ndarray | None
    wave: np.ndarray | None
    duration_s: float
    boxes: list
    sounds: list
    samples: list


class SyntheticScenes:
    """The interface of `scenes.SceneSource`: deterministic in (seed, split, index)."""

    labels = LABELS
    classes = LABELS

    def __init__(self, split: str = "train", seed: int = 0) -> None:
        self.split, self.seed = split, seed

    def _rng(self, kind: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, kind, int(self.split == "test"), index])

    def _wave(self, rng: np.random.Generator, seconds: float, sounds: list) -> np.ndarray:
        wave = 0.003 * rng.standard_normal(int(seconds * RATE))
        for label, start, end in sounds:
            at = np.arange(int(start * RATE), min(int(end * RATE), len(wave)))
            tone = TONES[LABELS.index(label)] * rng.uniform(0.98, 1.02)
            wave[at] += 0.2 * np.sin(2 * np.pi * tone * at / RATE)
        return wave.astype(np.float32)

    def audio(self, index: int) -> tuple[np.ndarray, list]:
        """(waveform, [(label, start_s, end_s)])"""
        rng = self._rng(0, index)
        seconds = float(rng.integers(1, 4))
        start = float(rng.uniform(0, seconds - 0.5))
        sounds = [(LABELS[rng.integers(len(LABELS))], start, float(rng.uniform(start + 0.4, seconds)))]
        return self._wave(rng, seconds, sounds), sounds

    def _picture(self, rng: np.random.Generator) -> tuple[np.ndarray, list]:
        picture = rng.integers(90, 130, (224, 224, 3)).astype(np.uint8)
        kinds = rng.permutation(len(LABELS))[:2]
        boxes = []
        for kind, left in zip(kinds, (0, 112), strict=True):
            w, h = rng.integers(50, 100, 2)
            x, y = left + rng.integers(0, 112 - w), rng.integers(0, 224 - h)
            picture[y : y + h, x : x + w] = COLOURS[kind]
            boxes.append((LABELS[kind], float(x), float(y), float(x + w), float(y + h), 0.0, 1e9))
        return picture, boxes

    def still(self, index: int) -> SyntheticScene:
        rng = self._rng(1, index)
        picture, boxes = self._picture(rng)
        label, x1, y1, x2, y2 = boxes[rng.integers(2)][:5]
        sounds = [(label, 0.0, 1.0)]
        lead = "This is an image and an audio:"
        other = LABELS[rng.integers(len(LABELS))]
        seen = "yes" if any(b[0] == other for b in boxes) else "no"
        samples = [
            SyntheticSample(
                "arig",
                "Please recognize the category of object that makes the sound and then output its "
                "bounding box.",
                f"The sounding object is {label}. Its coordinates are "
                f"<obj>({int(x1)},{int(y1)})({int(x2)},{int(y2)})</obj>.",
                lead,
                {"a_obj": label},
            ),
            SyntheticSample(
                "avqa",
                f"Please answer this question: Is there a {other} in the image?",
                f"<answer>{seen}</answer>",
                lead,
            ),
        ]
        return SyntheticScene(None, picture, self._wave(rng, 1.0, sounds), 1.0, boxes, sounds, samples)

    def clip(self, index: int, focus: str | None = None) -> SyntheticScene:
        rng = self._rng(2, index)
        seconds = float(rng.integers(2, 5))
        picture, boxes = self._picture(rng)
        label = boxes[rng.integers(2)][0]
        start = int(rng.integers(0, int(seconds)))
        end = int(rng.integers(start + 1, int(seconds) + 1))
        lead = "This is a video and an audio:"
        samples = [
            SyntheticSample(
                "ave",
                "Please describe the events and time range that occurred in the video.",
                f"Therefore, the events and time range are <event>{label}, ({start} {end})</event>",
                lead,
                {"event": label, "start_time": start, "end_time": end},
            )
        ]
        sounds = [(label, float(start), float(end))]
        frames = np.repeat(picture[None], 10, axis=0)
        return SyntheticScene(frames, None, self._wave(rng, seconds, sounds), seconds, boxes, sounds, samples)
