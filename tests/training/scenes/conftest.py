"""A tiny catalogue made here: plain coloured cut-outs, pure tones, grey backgrounds. No packages."""

from __future__ import annotations

import numpy as np
import pytest

from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo

RATE = 16000
LABELS = ("dog", "owl", "violin", "train", "harp", "bee")
SCENERY = ("apple", "hat", "scissors")


def asset(kind: str, key: str, data: np.ndarray, test: bool) -> Asset:
    return Asset(key, kind, 0, data.shape, key, test, np.ascontiguousarray(data).reshape(-1))


def cutout(number: int) -> np.ndarray:
    """A filled rectangle of one saturated colour; its shape differs from class to class."""
    data = np.zeros((60 + 12 * (number % 5), 100, 4), np.uint8)
    data[..., :3] = ((255, 0, 255), (0, 255, 255), (255, 255, 0))[number % 3]
    data[..., 3] = 255
    return data


def tone(number: int) -> np.ndarray:
    time = np.arange(RATE) / RATE
    return (np.sin(2 * np.pi * (200 + 150 * number) * time) * 9000).astype(np.int16)


def info(number: int, label: str, group: str, sounds: bool = True) -> ClassInfo:
    pictures = [asset("picture", f"o:{label}{i}", cutout(number), i == 2) for i in range(3)]
    heard = [asset("sound", f"p:{label}{i}", tone(number + i), i == 1) for i in range(2)] if sounds else []
    article = "" if label == "scissors" else "an" if label[0] in "aeiou" else "a"
    return ClassInfo(label, article, "sounds", group, pictures, heard)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    backgrounds = [
        asset("background", f"s:{i}", np.full((150, 200, 3), 110 + 10 * i, np.uint8), i == 1)
        for i in range(2)
    ]
    return Catalogue(
        [info(i, label, "animal" if i < 3 else "thing") for i, label in enumerate(LABELS)],
        [info(i, label, "silent", sounds=False) for i, label in enumerate(SCENERY)],
        backgrounds,
    )
