"""A tiny catalogue made here: plain coloured cut-outs, pure tones, grey backgrounds. No packages."""

from __future__ import annotations

import numpy as np
import pytest

from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo
from crab_edge.training.scenes.extras import Action, Emotion, Extras, Face, Figure, Voice

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


def layer(key: str, shade: int, test: bool, group: str | None = None) -> Asset:
    """A plain person: an opaque bar of one shade."""
    data = np.zeros((80, 40, 4), np.uint8)
    data[...] = (shade, 40, 255 - shade, 255)
    return Asset(key, "layer", 0, data.shape, group or key, test, data.reshape(-1))


def figure(key: str, test: bool) -> Figure:
    poses = [layer(f"{key}#{i}", 60 + 90 * i, test, key) for i in range(2)]
    return Figure(key, key, test, poses)


@pytest.fixture(scope="session")
def extras() -> Extras:
    """A tiny second pack: four emotions, three voices, four faces, three actions."""
    names = {"happy": "Laugh", "angry": "Traitor", "neutral": "Hello", "sad": "Solong"}
    emotions = [Emotion(name, (line,), (f"face-{name}", "serious")) for name, line in names.items()]
    voices = [
        Voice(
            name,
            test,
            {
                line: asset("line", f"h:{name}/{line}", tone(i + 3 * number), test)
                for i, line in enumerate(names.values())
            },
        )
        for number, (name, test) in enumerate((("Ann", False), ("Bob", False), ("Eve", True)))
    ]
    return Extras(
        voices=voices,
        faces=[
            Face(f"d:{i}", i == 3, layer(f"d:{i}", 50 * i, i == 3), layer(f"d:{i}-over", 9, i == 3))
            for i in range(4)
        ],
        expressions={
            name: layer(f"e:{name}", 200, False) for name in ("serious", *(f"face-{n}" for n in names))
        },
        emoji={},
        emotions=emotions,
        labels={
            task: {name: f"{task}-{name}" for name in names}
            for task in ("meld", "mer24", "cremad", "mafw", "dfew")
        },
        actions=[
            Action(
                name,
                name,
                "".join(word.title() for word in name.split()),
                motion,
                [figure(f"s:{name}-{i}", i == 1) for i in range(2)],
                [asset("line", f"s:{name}-sound{i}", tone(number + i), i == 1) for i in range(2)],
            )
            for number, (name, motion) in enumerate(
                (("walking", "walk"), ("break dancing", "spin"), ("jumping", "jump"))
            )
        ],
        played={"violin": {"ks": "playing violin", "ucf": "PlayingViolin"}},
    )
