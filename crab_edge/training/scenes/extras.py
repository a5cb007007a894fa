"""The second pack: acted voices, faces, figures in poses and the sounds of actions.

It lies beside the first one (`<cache>/extra`), with its own format, index and manifest; scenes of the tasks
that the first pack serves never open it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from crab_edge.errors import InputError
from crab_edge.training.scenes.catalogue import Asset, default_cache

FORMAT = 1


@dataclass(frozen=True)
class Voice:
    """One speaker: line name -> recording. Whole voices are held out."""

    name: str
    test: bool
    lines: dict[str, Asset]


@dataclass(frozen=True)
class Face:
    """One person without an expression: `under` it (body, head) and maybe `over` it (beard, glasses)."""

    key: str
    test: bool
    under: Asset
    over: Asset | None


@dataclass(frozen=True)
class Figure:
    """One person doing something, in one or more poses of one scale."""

    key: str
    group: str
    test: bool
    poses: list[Asset]


@dataclass(frozen=True)
class Action:
    """What people do: its label in two styles ("" = none), how it moves, who shows it, what is heard."""

    name: str
    ks: str
    ucf: str
    motion: str
    figures: list[Figure]
    sounds: list[Asset]

    def shown(self, test: bool) -> list[Figure]:
        return [f for f in self.figures if f.test == test]

    def heard(self, test: bool) -> list[Asset]:
        return [s for s in self.sounds if s.test == test]


@dataclass(frozen=True)
class Emotion:
    """Which acted lines, expressions and emoji stand for an emotion (names in `Extras`)."""

    name: str
    lines: tuple[str, ...]
    faces: tuple[str, ...]
    emoji: tuple[str, ...] = ()


@dataclass
class Extras:
    """Everything in the second pack. `labels`: data set -> emotion name -> its word there; `played`: class
    label of an instrument -> {"ks": ..., "ucf": ...}."""

    voices: list[Voice]
    faces: list[Face]
    expressions: dict[str, Asset]
    emoji: dict[str, Asset]
    emotions: list[Emotion]
    labels: dict[str, dict[str, str]]
    actions: list[Action]
    played: dict[str, dict[str, str]]
    manifest: list[dict] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, cache_dir: str | Path | None = None) -> Extras:
        """Opens the pack that `fetch_extras` left; InputError if there is none or an older one."""
        folder = (Path(cache_dir) if cache_dir else default_cache()) / "extra"
        index_file = folder / "index.json"
        if not index_file.is_file():
            raise InputError(
                f"{folder}: no pack of voices, faces and figures here; run `crab-edge scenes fetch`"
            )
        index = json.loads(index_file.read_text("utf-8"))
        if index.get("format") != FORMAT:
            raise InputError(
                f"{folder}: format {index.get('format')}, expected {FORMAT}; run `crab-edge scenes fetch`"
            )
        packs = {
            "layer": np.memmap(folder / "layers.u8", np.uint8, "r"),
            "line": np.memmap(folder / "sounds.i16", np.int16, "r"),
        }

        def asset(r: dict) -> Asset:
            shape = tuple(r["shape"])
            return Asset(r["key"], r["kind"], r["offset"], shape, r["group"], r["test"], packs[r["kind"]])

        def figures(rows: list[dict]) -> list[Figure]:
            return [Figure(f["key"], f["group"], f["test"], [asset(p) for p in f["poses"]]) for f in rows]

        return cls(
            voices=[
                Voice(v["name"], v["test"], {n: asset(r) for n, r in v["lines"].items()})
                for v in index["voices"]
            ],
            faces=[
                Face(f["key"], f["test"], asset(f["under"]), asset(f["over"]) if f["over"] else None)
                for f in index["faces"]
            ],
            expressions={n: asset(r) for n, r in index["expressions"].items()},
            emoji={n: asset(r) for n, r in index["emoji"].items()},
            emotions=[
                Emotion(e["name"], tuple(e["lines"]), tuple(e["faces"]), tuple(e["emoji"]))
                for e in index["emotions"]
            ],
            labels=index["labels"],
            actions=[
                Action(
                    a["name"],
                    a["ks"],
                    a["ucf"],
                    a["motion"],
                    figures(a["figures"]),
                    [asset(s) for s in a["sounds"]],
                )
                for a in index["actions"]
            ],
            played=index["played"],
            manifest=json.loads((folder / "manifest.json").read_text("utf-8"))["files"],
            path=folder,
        )

    def __reduce__(self) -> tuple:
        # A worker process opens the pack itself instead of receiving a copy of it.
        if self.path is not None:
            return Extras.load, (str(self.path.parent),)
        values = (self.voices, self.faces, self.expressions, self.emoji, self.emotions)
        return Extras, (*values, self.labels, self.actions, self.played, self.manifest)

    def emotion(self, name: str) -> Emotion:
        return next(e for e in self.emotions if e.name == name)

    def summary(self) -> dict:
        """Counts for the command line and tests."""
        return {
            "voices": {
                "train": sum(not v.test for v in self.voices),
                "test": sum(v.test for v in self.voices),
            },
            "acted_lines": sum(len(v.lines) for v in self.voices),
            "faces": {"train": sum(not f.test for f in self.faces), "test": sum(f.test for f in self.faces)},
            "expressions": len(self.expressions),
            "actions": len(self.actions) + len(self.played),
            "figures": {
                "train": sum(not f.test for a in self.actions for f in a.figures),
                "test": sum(f.test for a in self.actions for f in a.figures),
            },
        }


def fetch_extras(
    cache_dir: str | Path | None = None, *, progress: Callable[[str], None] | None = None
) -> Extras:
    """Downloads what is missing, builds the second pack if it isn't there or is older than its tables.

    Raises DependencyError where apt-get, dpkg-deb, npm or a Python package that this needs is missing.
    """
    from crab_edge.training.scenes.extra_pack import build

    cache = Path(cache_dir) if cache_dir else default_cache()
    build(cache, progress or (lambda _: None))
    return Extras.load(cache)
