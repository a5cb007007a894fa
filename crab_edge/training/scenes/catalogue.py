"""The catalogue: classes with their cut-outs and recordings, silent pictures, backgrounds, hold-outs.

`fetch` builds a pack (memory-mapped arrays, an index, manifest.json) in the cache; `Catalogue.load` opens it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from crab_edge.errors import InputError

FORMAT = 4


@dataclass(frozen=True)
class Asset:
    """One picture (uint8 [h, w, c]) or recording (int16 [n], 16 kHz): where it lies in the pack.

    `group` holds together what must not be split over train and test (poses of one figure, one melody).
    """

    key: str
    kind: str
    offset: int
    shape: tuple[int, ...]
    group: str
    test: bool
    pack: np.ndarray = field(repr=False, compare=False)

    def array(self) -> np.ndarray:
        """A view of the pack: uint8 [h, w, 4 or 3] for pictures, int16 [n] for recordings."""
        return self.pack[self.offset : self.offset + int(np.prod(self.shape))].reshape(self.shape)

    def wave(self) -> np.ndarray:
        """float32 [n], full scale 1.0, 16 kHz."""
        return self.array().astype(np.float32) / 32768.0


@dataclass(frozen=True)
class ClassInfo:
    """One class: plain lower-case label, article ("a", "an" or "" for plurals), verb of captions."""

    label: str
    article: str
    verb: str
    group: str
    pictures: list[Asset]
    sounds: list[Asset]

    @property
    def instrument(self) -> bool:
        return self.group == "instrument"

    def of(self, kind: str, test: bool) -> list[Asset]:
        return [a for a in (self.pictures if kind == "picture" else self.sounds) if a.test == test]


@dataclass
class Catalogue:
    """Everything scenes are made of. Held-out assets carry `test=True`."""

    classes: list[ClassInfo]
    silent_pictures: list[ClassInfo]
    backgrounds: list[Asset]
    manifest: list[dict] = field(default_factory=list)
    path: Path | None = None

    @classmethod
    def load(cls, cache_dir: str | Path | None = None) -> Catalogue:
        """Opens the pack that `fetch` left; InputError if there is none or an older one."""
        folder = (Path(cache_dir) if cache_dir else default_cache()) / "pack"
        index_file = folder / "index.json"
        if not index_file.is_file():
            raise InputError(f"{folder}: no scenes catalogue here; run `crab-edge scenes fetch`")
        index = json.loads(index_file.read_text())
        if index.get("format") != FORMAT:
            raise InputError(
                f"{folder}: catalogue format {index.get('format')}, expected {FORMAT}; "
                "run `crab-edge scenes fetch`"
            )
        packs = {
            "picture": np.memmap(folder / "pictures.u8", np.uint8, "r"),
            "background": np.memmap(folder / "backgrounds.u8", np.uint8, "r"),
            "sound": np.memmap(folder / "sounds.i16", np.int16, "r"),
        }

        def assets(rows: Sequence[dict]) -> list[Asset]:
            return [
                Asset(
                    r["key"],
                    r["kind"],
                    r["offset"],
                    tuple(r["shape"]),
                    r["group"],
                    r["test"],
                    packs[r["kind"]],
                )
                for r in rows
            ]

        def infos(rows: Sequence[dict]) -> list[ClassInfo]:
            return [
                ClassInfo(
                    r["label"],
                    r["article"],
                    r["verb"],
                    r["group"],
                    assets(r["pictures"]),
                    assets(r["sounds"]),
                )
                for r in rows
            ]

        manifest = json.loads((folder / "manifest.json").read_text())["files"]
        return cls(
            infos(index["classes"]), infos(index["silent"]), assets(index["backgrounds"]), manifest, folder
        )

    def __reduce__(self) -> tuple:
        # A worker process opens the pack itself instead of receiving a copy of it.
        if self.path is not None:
            return Catalogue.load, (str(self.path.parent),)
        return Catalogue, (self.classes, self.silent_pictures, self.backgrounds, self.manifest)

    def visible(self, test: bool) -> list[ClassInfo]:
        """Classes with a picture of that split."""
        return [c for c in self.classes if c.of("picture", test)]

    def audible(self, test: bool) -> list[ClassInfo]:
        """Classes with a recording of that split."""
        return [c for c in self.classes if c.of("sound", test)]

    def testable(self, sounds: str = "known") -> list[ClassInfo]:
        """Classes with a held-out picture and a known (training) or unseen (held-out) recording."""
        heard = {c.label for c in self.audible(test=sounds == "unseen")}
        return [c for c in self.visible(test=True) if c.label in heard]

    def labels(self) -> list[str]:
        return sorted({c.label for c in self.classes} | {c.label for c in self.silent_pictures})

    def summary(self) -> dict:
        """Counts for the command line, the model card and tests."""
        pictures = [p for c in self.classes for p in c.pictures]
        sounds = [s for c in self.classes for s in c.sounds]
        silent = [p for c in self.silent_pictures for p in c.pictures]
        return {
            "classes": len(self.classes),
            "classes_with_picture_and_sound": sum(bool(c.pictures and c.sounds) for c in self.classes),
            "pictures": {"train": sum(not p.test for p in pictures), "test": sum(p.test for p in pictures)},
            "recordings": {"train": sum(not s.test for s in sounds), "test": sum(s.test for s in sounds)},
            "rendered_melodies": sum(s.key.startswith("f:") for s in sounds),
            "silent_classes": len(self.silent_pictures),
            "silent_pictures": {
                "train": sum(not p.test for p in silent),
                "test": sum(p.test for p in silent),
            },
            "backgrounds": {
                "train": sum(not b.test for b in self.backgrounds),
                "test": sum(b.test for b in self.backgrounds),
            },
            "testable_known": len(self.testable("known")),
            "testable_unseen": len(self.testable("unseen")),
        }


def default_cache() -> Path:
    """XDG_CACHE_HOME/crab-edge/scenes, or ~/.cache/crab-edge/scenes."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "crab-edge" / "scenes"


def fetch(cache_dir: str | Path | None = None, *, progress: Callable[[str], None] | None = None) -> Catalogue:
    """Downloads what is missing, builds the pack if it isn't there or is older than the class table.

    Raises DependencyError where apt-get, dpkg-deb or a Python package that this needs is missing.
    """
    from crab_edge.training.scenes.pack import build

    cache = Path(cache_dir) if cache_dir else default_cache()
    build(cache, progress or (lambda _: None))
    return Catalogue.load(cache)
