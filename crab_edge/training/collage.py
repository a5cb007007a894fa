"""Crowded pictures for the vision tower: four to eight small objects on one background, every class equally
often.

A rendered still shows one to three objects; a tower trained for minutes learns three times as much per
picture from these. Only training pictures and backgrounds are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from crab_edge.training.scenes.catalogue import Catalogue
from crab_edge.training.scenes.compose import draw_background, draw_cutout
from crab_edge.training.scenes.facts import Fact, Truth
from crab_edge.training.scenes.plan import third

SIDE = 224


@dataclass(frozen=True)
class Varied:
    """A picture as `draw_cutout` takes it, changed more than a rendered scene changes one."""

    pixels: np.ndarray

    def array(self) -> np.ndarray:
        """uint8 [h, w, 4]."""
        return self.pixels


def vary(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """RGBA uint8 [h, w, 4] stretched, cut off at a side or with its colours exchanged.

    A class has four or five pictures to learn from and is tested on others: shape and parts must count for
    more than one picture's colours.
    """
    if random.random() < 0.5:
        stretch = float(random.uniform(0.75, 1.33))
        image = Image.fromarray(pixels).convert("RGBa")
        size = (max(8, round(image.width * stretch)), image.height)
        pixels = np.asarray(image.resize(size, Image.Resampling.BILINEAR).convert("RGBA"))
    if random.random() < 0.2:
        axis, keep = int(random.integers(2)), float(random.uniform(0.6, 0.9))
        count = max(8, round(pixels.shape[axis] * keep))
        first = int(random.integers(2)) * (pixels.shape[axis] - count)
        pixels = np.take(pixels, range(max(first, 0), max(first, 0) + count), axis=axis, mode="clip")
    kind = random.random()
    if kind < 0.12:
        grey = pixels[..., :3].mean(axis=2, keepdims=True).astype(np.uint8)
        pixels = np.concatenate([np.repeat(grey, 3, axis=2), pixels[..., 3:]], axis=2)
    elif kind < 0.3:
        pixels = pixels[..., [*random.permutation(3), 3]]
    elif kind < 0.5:
        table = (255 * (np.arange(256) / 255) ** random.uniform(0.6, 1.6)).astype(np.uint8)
        pixels = np.concatenate([table[pixels[..., :3]], pixels[..., 3:]], axis=2)
    return np.ascontiguousarray(pixels)


@dataclass(frozen=True)
class Collage:
    """image uint8 [224, 224, 3]; boxes and truth as in a rendered scene; without sound."""

    image: np.ndarray
    boxes: list[tuple]
    truth: Truth
    frames: None = None
    wave: None = None
    duration_s: float = 0.0
    samples: tuple = ()


class Collages:
    """`still(index)` is the same collage for the same (seed, index)."""

    def __init__(self, catalogue: Catalogue, seed: int = 0) -> None:
        infos = [*catalogue.classes, *catalogue.silent_pictures]
        self._classes = [(c, pictures) for c in infos if (pictures := c.of("picture", False))]
        self._backgrounds = [b for b in catalogue.backgrounds if not b.test]
        self.seed = seed

    def still(self, index: int) -> Collage:
        random = np.random.default_rng([self.seed, 91, index])
        canvas = (SIDE, SIDE)
        background = self._backgrounds[int(random.integers(len(self._backgrounds)))]
        image = draw_background(background, canvas, random, True)
        count = int(random.integers(4, 9))
        low, high = (0.2, 0.5) if count < 6 else (0.15, 0.38)
        boxes: list[tuple] = []
        facts: list[Fact] = []
        for kind in random.permutation(len(self._classes))[:count]:
            info, pictures = self._classes[int(kind)]
            picture = pictures[int(random.integers(len(pictures)))]
            varied = Varied(vary(picture.array(), random))
            cutout = draw_cutout(varied, canvas, float(random.uniform(low, high)), random, True)
            w, h = cutout.size
            for _ in range(10):
                x, y = int(random.integers(0, max(SIDE - w, 1))), int(random.integers(0, max(SIDE - h, 1)))
                if all(_overlap((x, y, x + w, y + h), box[1:5]) < 0.12 for box in boxes):
                    image.paste(cutout, (x, y), cutout)
                    box = (x, y, min(x + w, SIDE), min(y + h, SIDE))
                    boxes.append((info.label, *box, 0.0, 1e9))
                    side = third((x + w / 2) / SIDE)
                    said = (info.label, info.article, info.verb, bool(info.sounds), (0, 1), None)
                    facts.append(Fact(*said, side=side, box=box))
                    break
        return Collage(np.asarray(image), boxes, Truth(facts, 0.0, "image", False))


class Mixed:
    """`still(index)` from the collages for `share` of the indices, else from the scenes."""

    def __init__(self, collages: Collages, scenes: Any, share: float) -> None:
        self.collages, self.scenes, self.share = collages, scenes, share

    def still(self, index: int) -> Any:
        crowded = int((index + 1) * self.share) > int(index * self.share)
        return (self.collages if crowded else self.scenes).still(index)


def _overlap(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / max(min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])), 1)
