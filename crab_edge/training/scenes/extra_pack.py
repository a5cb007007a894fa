"""Builds the second pack from `actions.toml` and `emotions.toml`: decodes, draws, holds out, writes."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import numpy as np
import tomllib

from crab_edge.training.scenes import pictures, sounds
from crab_edge.training.scenes.extras import FORMAT
from crab_edge.training.scenes.faces import CLOTHES, HAIRS, SKINS, Peeps, Person, draw_svg
from crab_edge.training.scenes.npm import NPM_PACKAGES, fetch_npm
from crab_edge.training.scenes.pack import Item, Manifest, Writer, hold_out, resolve, to_int16
from crab_edge.training.scenes.packages import (
    EXTRA_PACKAGES,
    PACKAGES,
    PICTURE_SUFFIXES,
    SOUND_SUFFIXES,
    Source,
    fetch_packages,
)

_BASE_SOURCES = "sxgtom"
_NOT_PEOPLE = {"bear"}
_GLASSES = ("glasses", "glasses2", "glasses3", "glasses4", "glasses5")
_BEARDS = ("chin", "full", "full2", "goatee1", "goatee2", "moustache1", "moustache4", "moustache9")
_NO_BEARD = ("bun", "long", "medium", "bangs", "hijab", "grayBun", "grayMedium", "cornrows")
_TONES = {"j": ("", "-light-skin-tone", "-dark-skin-tone"), "m": ("", "-1F3FB", "-1F3FE")}


def build(cache: Path, progress: Callable[[str], None]) -> None:
    """Writes cache/extra unless it already belongs to these tables and this format."""
    texts = {
        name: resources.files(__package__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
        for name in ("actions", "emotions")
    }
    versions = [f"{p.name}@{p.sha256}" for p in NPM_PACKAGES]
    stamp = hashlib.sha256("\n".join([str(FORMAT), *texts.values(), *versions]).encode()).hexdigest()
    cache.mkdir(parents=True, exist_ok=True)
    if _is_current(cache, stamp):
        return
    with (cache / "lock").open("w") as lock:
        # The first pack's lock: both builds unpack the same packages.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(cache, stamp):
            tables = {name: tomllib.loads(text) for name, text in texts.items()}
            _build(cache, tables["actions"], tables["emotions"], stamp, progress)


def _is_current(cache: Path, stamp: str) -> bool:
    index_file = cache / "extra" / "index.json"
    return index_file.is_file() and json.loads(index_file.read_text("utf-8")).get("stamp") == stamp


def _build(cache: Path, actions: dict, emotions: dict, stamp: str, progress: Callable[[str], None]) -> None:
    progress("packages")
    wanted = tuple(p for p in PACKAGES if p.source in _BASE_SOURCES) + EXTRA_PACKAGES
    sources = fetch_packages(cache, wanted) | fetch_npm(cache)
    temporary = cache / f"extra.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    manifest = Manifest(sources)
    layers, heard = Writer(temporary / "layers.u8", "layer"), Writer(temporary / "sounds.i16", "line")
    noto = _Noto(sources["j"])
    progress("voices")
    voices = _voices(sources["h"], emotions, heard, manifest)
    progress("faces")
    people, expressions = _faces(sources["d"], emotions, layers, manifest)
    names = {name for entry in emotions["emotion"].values() for name in entry["emoji"]}
    emoji = {}
    for name in sorted(names):
        drawn = noto.draw(name)
        if drawn is not None:
            manifest.use("j", "icons.json", "face")
            emoji[name] = layers.add(Item(f"j:{name}", drawn, f"j:{name}"))
    rows = []
    for name, entry in actions["action"].items():
        progress(name)
        rows.append(_action(name, entry, sources, noto, layers, heard, manifest))
    layers.close()
    heard.close()
    index = {
        "format": FORMAT,
        "stamp": stamp,
        "voices": voices,
        "faces": people,
        "expressions": expressions,
        "emoji": emoji,
        "emotions": [{"name": n, **e} for n, e in emotions["emotion"].items()],
        "labels": emotions["labels"],
        "actions": rows,
        "played": actions["played"],
    }
    (temporary / "manifest.json").write_text(
        json.dumps({"files": manifest.rows()}, indent=1, ensure_ascii=False), "utf-8"
    )
    (temporary / "index.json").write_text(json.dumps(index), "utf-8")
    shutil.rmtree(cache / "extra", ignore_errors=True)
    os.rename(temporary, cache / "extra")


def _voices(source: Source, emotions: dict, writer: Writer, manifest: Manifest) -> list[dict]:
    lines = {line for entry in emotions["emotion"].values() for line in entry["lines"]}
    found: dict[str, dict] = {}
    for name in source.files:
        parts = name.split("/")
        line, suffix = os.path.splitext(parts[-1])
        if len(parts) != 3 or parts[0] != "voices" or suffix != ".ogg" or line not in lines:
            continue
        wave = sounds.clean(sounds.decode(source.root / name), max_seconds=4.0)
        if wave is None:
            continue
        test = parts[1] in emotions["held_out_voices"]
        row = writer.add(Item(f"h:{name}", to_int16(wave), f"h:{parts[1]}", test))
        found.setdefault(parts[1], {"name": parts[1], "test": test, "lines": {}})["lines"][line] = row
        manifest.use("h", name, f"voice {parts[1]}")
    return [found[name] for name in sorted(found)]


def _faces(
    source: Source, emotions: dict, writer: Writer, manifest: Manifest
) -> tuple[list[dict], dict[str, dict]]:
    peeps = Peeps(source.root)
    for kind in ("head", "face", "facialHair", "accessories"):
        manifest.use("d", f"components/{kind}.js", "face")
    manifest.use("d", "index.js", "face")
    heads = [h for h in peeps.parts["head"] if h not in _NOT_PEOPLE]
    # Hold-outs by a hash, so that a new head in the package moves no other.
    ranked = sorted(heads, key=lambda h: hashlib.sha256(f"head|{h}".encode()).hexdigest())
    held = set(ranked[: len(ranked) // 4])
    people = []
    for number, head in enumerate(heads):
        for look in range(2):
            random = np.random.default_rng([77, number, look])
            pick = lambda names, random=random: str(names[int(random.integers(len(names)))])  # noqa: E731
            bearded = not head.startswith(_NO_BEARD) and random.random() < 0.35
            person = Person(
                head,
                SKINS[(number + 2 * look) % len(SKINS)],
                pick(CLOTHES),
                pick(HAIRS),
                pick(_BEARDS) if bearded else "",
                pick(_GLASSES) if random.random() < 0.25 else "",
            )
            key, test = f"d:{head}-{look}", head in held
            over = peeps.over(person)
            people.append(
                {
                    "key": key,
                    "test": test,
                    "under": writer.add(Item(key, peeps.under(person), f"d:{head}", test)),
                    "over": None
                    if over is None
                    else writer.add(Item(f"{key}-over", over, f"d:{head}", test)),
                }
            )
    names = {name for entry in emotions["emotion"].values() for name in entry["faces"]}
    drawn = emotions["drawn"]
    peeps.parts["face"].update(drawn)
    expressions = {
        name: writer.add(Item(f"d:face-{name}", peeps.expression(name), f"d:face-{name}"))
        for name in sorted(names)
    }
    return people, expressions


class _Noto:
    """The drawings of the icon set by name."""

    def __init__(self, source: Source) -> None:
        data = json.loads((source.root / "icons.json").read_text("utf-8"))
        self._icons = data["icons"]
        self._aliases = data.get("aliases", {})
        self._size = data.get("width", 128), data.get("height", 128)

    def draw(self, name: str) -> np.ndarray | None:
        """A cut-out of at most 224 pixels, or None if the set lacks it."""
        icon = self._icons.get(name) or self._icons.get(self._aliases.get(name, {}).get("parent", ""))
        if icon is None:
            return None
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        return pictures.finish(draw_svg(svg, 300), pictures.SIDE)


def _action(
    name: str,
    entry: dict,
    sources: dict[str, Source],
    noto: _Noto,
    layers: Writer,
    heard: Writer,
    manifest: Manifest,
) -> dict:
    figures: list[tuple[Item, list[np.ndarray]]] = []
    for row in entry["figures"]:
        for key, group, poses, files in _figures(row, sources, noto):
            figures.append((Item(key, np.zeros(0, np.uint8), group), poses))
            for letter, file in files:
                manifest.use(letter, file, f"figure of {name}")
    hold_out([item for item, _ in figures], f"action|{name}")
    recordings: list[Item] = []
    for letter, file in resolve(sources, entry["sounds"], SOUND_SUFFIXES):
        wave = sounds.clean(sounds.decode(sources[letter].root / file))
        if wave is not None:
            group = os.path.dirname(file) if "voices/" in file else file
            recordings.append(Item(f"{letter}:{file}", to_int16(wave), f"{letter}:{group}"))
            manifest.use(letter, file, f"sound of {name}")
    hold_out(recordings, f"action|{name}")
    return {
        "name": name,
        "ks": entry.get("ks", ""),
        "ucf": entry.get("ucf", ""),
        "motion": entry["motion"],
        "figures": [
            {
                "key": item.key,
                "group": item.group,
                "test": item.test,
                "poses": [
                    layers.add(Item(f"{item.key}#{i}", pose, item.group, item.test))
                    for i, pose in enumerate(poses)
                ],
            }
            for item, poses in figures
        ],
        "sounds": [heard.add(item) for item in recordings],
    }


def _figures(
    row: list[str], sources: dict[str, Source], noto: _Noto
) -> list[tuple[str, str, list[np.ndarray], list[tuple[str, str]]]]:
    """(key, group, poses, files) of every figure that a row of the table means."""
    letter, name = row[0].split(":", 1)
    out = []
    if letter == "j":
        for stem in (f"man-{name}", f"woman-{name}", name):
            if stem == name and out:
                break
            for tone in _TONES["j"]:
                drawn = noto.draw(stem + tone)
                if drawn is not None:
                    out.append((f"j:{stem}{tone}", f"j:{stem}", [drawn], [("j", "icons.json")]))
        return out
    if letter == "m":
        for tone in _TONES["m"]:
            for file in sources["m"].match(f"svg/{name}{tone}", (".svg",)):
                drawn = pictures.load_cutout(sources["m"].root / file)
                if drawn is not None:
                    out.append((f"m:{name}{tone}", f"m:{name}", [drawn], [("m", file)]))
        return out
    files = [found for pattern in row for found in resolve(sources, [pattern], PICTURE_SUFFIXES)[:1]]
    if len(files) == len(row):
        poses = pictures.load_poses([sources[letter].root / file for letter, file in files])
        if poses is not None:
            out.append((row[0], row[0], poses, files))
    return out
