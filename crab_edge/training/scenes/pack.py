"""Builds the catalogue's pack: resolves the class table against the packages, decodes, holds out, writes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import tomllib

from crab_edge.training.scenes import pictures, sounds
from crab_edge.training.scenes.catalogue import FORMAT
from crab_edge.training.scenes.packages import (
    PICTURE_SUFFIXES,
    SOUND_SUFFIXES,
    Source,
    author_of,
    fetch_packages,
)
from crab_edge.training.scenes.soundfont import SoundFont, melody, rhythm

SAME, ALIKE = 0.025, 0.055
MELODIES = {False: 24, True: 12}
OPENSFX_LICENCE = re.compile(r"License: (.+?)\.?$")


@dataclass
class Item:
    key: str
    data: np.ndarray
    group: str
    test: bool = False


class Writer:
    """Appends arrays to one raw file and remembers where they lie."""

    def __init__(self, path: Path, kind: str) -> None:
        self._file = path.open("wb")
        self._kind, self._at = kind, 0

    def add(self, item: Item) -> dict:
        row = {
            "key": item.key,
            "kind": self._kind,
            "offset": self._at,
            "shape": list(item.data.shape),
            "group": item.group,
            "test": item.test,
        }
        self._file.write(np.ascontiguousarray(item.data).tobytes())
        self._at += item.data.size
        return row

    def close(self) -> None:
        self._file.close()


def build(cache: Path, progress: Callable[[str], None]) -> None:
    """Writes cache/pack unless it already belongs to this class table and format."""
    table_text = resources.files(__package__).joinpath("classes.toml").read_text(encoding="utf-8")
    stamp = hashlib.sha256(f"{FORMAT}\n{table_text}".encode()).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    if _is_current(cache, stamp):
        return
    with (cache / "lock").open("w") as lock:
        # Several processes may want the same pack: one builds, the others wait and find it.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(cache, stamp):
            _build(cache, tomllib.loads(table_text), stamp, progress)


def _is_current(cache: Path, stamp: str) -> bool:
    index_file = cache / "pack" / "index.json"
    return index_file.is_file() and json.loads(index_file.read_text()).get("stamp") == stamp


def _build(cache: Path, table: dict, stamp: str, progress: Callable[[str], None]) -> None:
    progress("packages")
    sources = fetch_packages(cache)
    temporary = cache / f"pack.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    manifest = Manifest(sources)
    writers = {
        "picture": Writer(temporary / "pictures.u8", "picture"),
        "background": Writer(temporary / "backgrounds.u8", "background"),
        "sound": Writer(temporary / "sounds.i16", "sound"),
    }
    font = SoundFont(sources["f"].root / "FluidR3_GM.sf2")
    rows: dict[str, list[dict]] = {"classes": [], "silent": []}
    for group, entries in table.items():
        for label, entry in entries.items():
            progress(label)
            images = _class_pictures(sources, label, entry, manifest)
            heard = _class_sounds(sources, font, label, entry, manifest)
            if not images and not heard:
                continue
            rows["silent" if group == "silent" else "classes"].append(
                {
                    "label": label,
                    "article": entry.get("a", _article(label)),
                    "verb": entry.get("verb", ""),
                    "group": group,
                    "pictures": [writers["picture"].add(i) for i in images],
                    "sounds": [writers["sound"].add(s) for s in heard],
                }
            )
    progress("backgrounds")
    backgrounds = [writers["background"].add(b) for b in _backgrounds(sources["s"], manifest)]
    for writer in writers.values():
        writer.close()
    index = {"format": FORMAT, "stamp": stamp, **rows, "backgrounds": backgrounds}
    (temporary / "manifest.json").write_text(
        json.dumps({"files": manifest.rows()}, indent=1, ensure_ascii=False)
    )
    (temporary / "index.json").write_text(json.dumps(index))
    shutil.rmtree(cache / "pack", ignore_errors=True)
    os.rename(temporary, cache / "pack")


class Manifest:
    """One row for every file used."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self._sources = sources
        self._rows: dict[tuple[str, str], dict] = {}

    def use(self, letter: str, name: str, used_as: str) -> None:
        row = self._rows.get((letter, name))
        if row is None:
            source = self._sources[letter]
            credit = author_of(source, name)
            item = OPENSFX_LICENCE.search(credit) if credit and letter == "x" else None
            row = self._rows[letter, name] = {
                "file": f"{source.package.root}/{name}",
                "package": source.package.name,
                "version": source.version,
                "author": credit,
                "licence": item.group(1) if item else source.package.licence,
                "sha256": hashlib.sha256((source.root / name).read_bytes()).hexdigest(),
                "used_as": [],
            }
        if used_as not in row["used_as"]:
            row["used_as"].append(used_as)

    def rows(self) -> list[dict]:
        return [self._rows[k] for k in sorted(self._rows)]


def _article(label: str) -> str:
    if label in ("scissors", "fireworks", "maracas", "castanets", "timpani", "glasses", "grapes"):
        return ""
    return "an" if label[0] in "aeiou" else "a"


def resolve(
    sources: dict[str, Source], patterns: Iterable[str], suffixes: tuple[str, ...]
) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for pattern in patterns:
        letter, rest = pattern.split(":", 1)
        if letter == "x":
            rest = f"{int(rest):02d}"
        for name in sources[letter].match(rest, suffixes):
            found[letter, name] = None
    return list(found)


def _class_pictures(sources: dict[str, Source], label: str, entry: dict, manifest: Manifest) -> list[Item]:
    items: list[Item] = []
    files: list[tuple[str, str, np.ndarray | None, str]] = []
    stems: set[tuple[str, str]] = set()
    for letter, name in resolve(sources, entry["pictures"], PICTURE_SUFFIXES):
        # Several folders of one package hold the same drawing; stamps exist as png and svg.
        stem = (letter, os.path.splitext(os.path.basename(name))[0])
        if stem not in stems:
            stems.add(stem)
            cutout = pictures.load_cutout(sources[letter].root / name, opaque=entry.get("opaque", False))
            files.append((letter, name, cutout, _pose_group(letter, name)))
    for character in entry.get("emoji", "").replace("️", ""):
        name = next(iter(sources["m"].match(f"svg/{pictures.emoji_stem(character)}", (".svg",))), None)
        if name:
            files.append(("m", name, pictures.load_cutout(sources["m"].root / name), f"m:{name}"))
        glyph = pictures.load_emoji(sources["n"].root / "NotoColorEmoji.ttf", character)
        files.append(("n", f"NotoColorEmoji.ttf#{pictures.emoji_stem(character)}", glyph, f"n:{character}"))
    looks: list[np.ndarray] = []
    for letter, name, cutout, group in files:
        # Clip art has many black outlines; photos and the few classes that are black stay.
        if cutout is None or (letter == "o" and pictures.is_silhouette(cutout)):
            continue
        look = pictures.thumbnail(cutout)
        distances = [pictures.difference(look, other) for other in looks]
        if distances and min(distances) < SAME:
            continue
        if distances and min(distances) < ALIKE:
            group = items[int(np.argmin(distances))].group
        looks.append(look)
        items.append(Item(f"{letter}:{name}", cutout, group))
        manifest.use(letter, name.split("#")[0], f"picture of {label}")
    hold_out(items, label)
    return items


def _pose_group(letter: str, name: str) -> str:
    stem = os.path.splitext(name)[0]
    if letter == "s":
        # dog2-a, dog2-b are poses of one drawing; anna-1, dan3 photos of one person.
        stem = re.sub(r"(-[a-e]|-?\d)$", "", stem) if "People/" in stem else re.sub(r"-[a-e]$", "", stem)
    if letter == "o" and "_drawn_with" in stem:
        stem = stem.split("_drawn_with")[0]
    return f"{letter}:{stem}"


def _class_sounds(
    sources: dict[str, Source], font: SoundFont, label: str, entry: dict, manifest: Manifest
) -> list[Item]:
    items: list[Item] = []
    digests: set[bytes] = set()
    for letter, name in resolve(sources, entry.get("sounds", ()), SOUND_SUFFIXES):
        wave = sounds.clean(sounds.decode(sources[letter].root / name))
        if wave is None:
            continue
        data = to_int16(wave)
        digest = hashlib.sha256(data.tobytes()).digest()
        if digest in digests:
            continue
        digests.add(digest)
        items.append(Item(f"{letter}:{name}", data, f"{letter}:{name}"))
        manifest.use(letter, name, f"sound of {label}")
    hold_out(items, label)
    programs, percussion = entry.get("program", []), entry.get("percussion", [])
    if programs or percussion:
        manifest.use("f", "FluidR3_GM.sf2", f"sound of {label}")
        for test, count in MELODIES.items():
            for number in range(count):
                seed = number + (1000 if test else 0)
                if percussion:
                    wave, name = rhythm(font, percussion, seed), f"f:percussion-{label}-{seed}"
                else:
                    program = programs[number % len(programs)]
                    wave, name = melody(font, program, seed), f"f:program-{program}-{seed}"
                cleaned = sounds.clean(wave)
                if cleaned is not None:
                    items.append(Item(name, to_int16(cleaned), name, test))
    return items


def to_int16(wave: np.ndarray) -> np.ndarray:
    return np.round(np.clip(wave, -1.0, 1.0) * 32767).astype(np.int16)


def hold_out(items: list[Item], label: str) -> None:
    """Marks a quarter of the groups, at least one of two or more and at most five, as held out."""
    groups = sorted(
        {i.group for i in items}, key=lambda g: hashlib.sha256(f"{label}|{g}".encode()).hexdigest()
    )
    if len(groups) < 2:
        return
    chosen = set(groups[: min(max(1, round(len(groups) / 4)), 5)])
    for item in items:
        item.test = item.group in chosen


def _backgrounds(source: Source, manifest: Manifest) -> list[Item]:
    items = []
    for name in source.files:
        if not name.startswith("Backgrounds/") or not name.endswith(".jpg"):
            continue
        photo = pictures.load_photo(source.root / name)
        if photo is not None:
            # train-tracks1, train-tracks2: views of one place stay on one side.
            group = "s:" + re.sub(r"(\d|-[ab])*$", "", os.path.splitext(name)[0])
            items.append(Item(f"s:{name}", photo, group))
            manifest.use("s", name, "background")
    groups = sorted({i.group for i in items}, key=lambda g: hashlib.sha256(g.encode()).hexdigest())
    held_out = set(groups[: len(groups) // 4])
    for item in items:
        item.test = item.group in held_out
    return items
