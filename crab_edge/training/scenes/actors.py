"""People that move: figures in poses, people who play, faces that show an emotion."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from crab_edge.training.scenes.compose import Stage

#: Offset (x, y; shares of the canvas) and turn (degrees) by phase, and whether the figure crosses the frame.
_MOVES: dict[str, tuple[Callable[[float], tuple[float, float, float]], bool]] = {
    "still": (lambda p: (0.0, 0.004 * math.sin(2 * math.pi * p), 0.0), False),
    "walk": (lambda p: (0.0, -0.02 * abs(math.sin(math.pi * p)), 0.0), True),
    "run": (lambda p: (0.0, -0.05 * abs(math.sin(math.pi * p)), 3 * math.sin(2 * math.pi * p)), True),
    "slide": (lambda p: (0.0, 0.008 * math.sin(2 * math.pi * p), 0.0), True),
    "swim": (lambda p: (0.0, 0.03 * math.sin(2 * math.pi * p), 5 * math.sin(2 * math.pi * p)), True),
    "dive": (lambda p: (0.0, 0.25 * (p / 6 % 1.0), 15.0), True),
    "wheel": (lambda p: (0.0, 0.0, -180.0 * p), True),
    "dance": (
        lambda p: (
            0.05 * math.sin(math.pi * p),
            -0.03 * abs(math.sin(2 * math.pi * p)),
            6 * math.sin(math.pi * p),
        ),
        False,
    ),
    "spin": (lambda p: (0.03 * math.sin(math.pi * p), 0.0, 18 * math.sin(2 * math.pi * p)), False),
    "jump": (lambda p: (0.0, -0.16 * abs(math.sin(math.pi * p)), 0.0), False),
    "lift": (lambda p: (0.0, -0.05 * max(math.sin(math.pi * p), 0.0), 0.0), False),
    "sway": (lambda p: (0.015 * math.sin(2 * math.pi * p), 0.0, 5 * math.sin(2 * math.pi * p)), False),
    "lunge": (lambda p: (0.08 * math.sin(2 * math.pi * p), 0.0, 0.0), False),
    "bounce": (lambda p: (0.0, -0.07 * abs(math.sin(2 * math.pi * p)), 0.0), False),
    "shake": (lambda p: (0.012 * math.sin(9 * math.pi * p), 0.006 * math.sin(7 * math.pi * p), 0.0), False),
}
MOTIONS = tuple(_MOVES)


@dataclass
class Actor:
    """Poses at canvas size; `foot` is the middle of their lower edge (shares of the canvas)."""

    poses: list[Image.Image]
    foot: tuple[float, float]
    motion: str
    period_s: float
    goal_x: float | None = None

    def paint(self, image: Image.Image, time: float, duration: float) -> None:
        """Draws the pose of this time into the frame."""
        phase = time / self.period_s
        move, crosses = _MOVES[self.motion]
        across, down, turn = move(phase)
        x = self.foot[0]
        if crosses and self.goal_x is not None and duration:
            x += (self.goal_x - x) * time / duration
        pose = self.poses[int(2 * phase) % len(self.poses)]
        height = pose.height
        centre = (x + across) * image.width, (self.foot[1] + down) * image.height - height / 2
        if abs(turn) > 0.5:
            pose = pose.rotate(turn, Image.Resampling.BILINEAR, expand=True)
        image.paste(pose, (round(centre[0] - pose.width / 2), round(centre[1] - pose.height / 2)), pose)


@dataclass
class Portrait:
    """A face whose expression changes: (from second, picture) in order; it moves with what it says."""

    expressions: list[tuple[float, Image.Image]]
    foot: tuple[float, float]
    loudness: np.ndarray
    step_s: float

    def paint(self, image: Image.Image, time: float, duration: float) -> None:
        """Draws the expression of this time into the frame."""
        picture = self.expressions[0][1]
        for start, other in self.expressions:
            if start <= time:
                picture = other
        at = min(int(time / self.step_s), self.loudness.size - 1)
        loud = float(self.loudness[at]) if self.loudness.size else 0.0
        turn = 3.0 * loud * math.sin(9 * time)
        if abs(turn) > 0.5:
            picture = picture.rotate(turn, Image.Resampling.BILINEAR)
        x = self.foot[0] * image.width - picture.width / 2 + 3 * loud * math.sin(7 * time)
        y = self.foot[1] * image.height - picture.height - 0.03 * loud * picture.height
        image.paste(picture, (round(x), round(y)), picture)


@dataclass
class ActStage(Stage):
    """A stage with people before its objects."""

    actors: list[Actor | Portrait] = field(default_factory=list)

    def draw(self, times: list[float], duration: float) -> list[Image.Image]:
        images = super().draw(times, duration)
        for image, time in zip(images, times, strict=True):
            for actor in self.actors:
                actor.paint(image, time, duration)
        return images


def sized(poses: list[np.ndarray], canvas: tuple[int, int], height: float, mirror: bool) -> list[Image.Image]:
    """Poses as pictures, the tallest `height` of the canvas high and none wider than it."""
    tallest, widest = max(p.shape[0] for p in poses), max(p.shape[1] for p in poses)
    scale = min(height * canvas[1] / tallest, 0.9 * canvas[0] / widest)
    out = []
    for pose in poses:
        image = Image.fromarray(np.ascontiguousarray(pose)).convert("RGBa")
        size = max(2, round(image.width * scale)), max(2, round(image.height * scale))
        image = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=1.5).convert("RGBA")
        out.append(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else image)
    return out
