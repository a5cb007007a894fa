"""The clip that ships with the package: ten seconds from public-domain pictures and CC0 recordings alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from crab_edge.errors import InputError
from crab_edge.training.scenes.catalogue import Asset, Catalogue, ClassInfo, fetch
from crab_edge.training.scenes.compose import Stage, Thing
from crab_edge.training.scenes.media import write_mp4
from crab_edge.training.scenes.sounds import RATE, level

SECONDS, FPS, CANVAS = 10.0, 12, (480, 360)
# label, picture, height as a share of the canvas, centre at the start and at the end, seconds in view,
# recording or None, seconds heard
CAST = (
    (
        "electric guitar",
        "guitar_jarno_vasamaa2.svg",
        0.8,
        (0.2, 0.52),
        (0.2, 0.52),
        (0.0, 11.0),
        "guit_e_fifths.flac",
        (1.0, 5.0),
    ),
    (
        "bell",
        "jingle_bells_01.svg",
        0.42,
        (0.72, 0.3),
        (0.72, 0.3),
        (5.0, 11.0),
        "perc_bell.flac",
        (6.0, 9.0),
    ),
    ("apple", "an_apple_01.svg", 0.24, (0.52, 0.82), (0.52, 0.82), (0.0, 11.0), None, None),
)


def write_sample(out: str | Path, cache: str | Path | None = None) -> list[Path]:
    """Writes the mp4 and SAMPLE.md beside it; returns both paths."""
    out = Path(out)
    catalogue = fetch(cache)
    stage = Stage(CANVAS, paint_backdrop(CANVAS))
    wave = np.zeros(int(SECONDS * RATE), np.float32)
    used: list[tuple[str, Asset]] = []
    for label, picture, share, start, end, seen, sound, heard in CAST:
        info = _class(catalogue, label)
        asset = _asset(info.pictures, picture)
        image = Image.fromarray(asset.array()).convert("RGBa")
        height = round(share * CANVAS[1])
        image = image.resize((round(image.width * height / image.height), height), Image.Resampling.LANCZOS)
        stage.things.append(Thing(info, asset, image.convert("RGBA"), share, start, end, seen, heard))
        used.append((f"the {label}'s picture", asset))
        if sound and heard:
            recording = _asset(info.sounds, sound)
            first, last = (round(t * RATE) for t in heard)
            part = np.resize(recording.wave(), last - first)
            fade = np.minimum(1.0, np.arange(part.size)[::-1] / (0.05 * RATE)).astype(np.float32)
            wave[first:last] += level(part) * fade
            used.append((f"the {label}'s sound, {heard[0]:g} to {heard[1]:g} s", recording))
    times = [i / FPS for i in range(int(SECONDS * FPS))]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(out, stage.draw(times, SECONDS), FPS, wave, crf=24, audio_rate=44100)
    note = out.with_name("SAMPLE.md")
    note.write_text(_provenance(out, catalogue, used), "utf-8")
    return [out, note]


def paint_backdrop(size: tuple[int, int]) -> Image.Image:
    """A painted sky over a painted meadow: nobody's picture."""
    width, height = size
    random = np.random.default_rng(5)
    rows = np.linspace(0, 1, height)[:, None, None]
    sky = np.array([120, 170, 225]) * (1 - rows) + np.array([215, 230, 240]) * rows
    ground = np.array([125, 160, 80]) * (1 - rows) + np.array([80, 115, 50]) * rows
    horizon = 0.58 + 0.03 * np.sin(np.linspace(0, 5, width))[None, :, None]
    blend = 1 / (1 + np.exp(-(rows - horizon) * 60))
    clouds = np.asarray(
        Image.fromarray((random.random((9, 12)) * 255).astype(np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        ),
        np.float32,
    )[..., None]
    grass = random.normal(0, 9, (height, width, 1))
    painted = (sky + (clouds - 110) * 0.14) * (1 - blend) + (ground + grass + (clouds - 128) * 0.1) * blend
    return Image.fromarray(np.clip(painted, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))


def _class(catalogue: Catalogue, label: str) -> ClassInfo:
    for info in catalogue.classes + catalogue.silent_pictures:
        if info.label == label:
            return info
    raise InputError(f"the catalogue has no class {label!r}; run `crab-edge scenes fetch`")


def _asset(assets: list[Asset], name: str) -> Asset:
    for asset in assets:
        if asset.key.endswith(name) and asset.key[0] in "op":
            return asset
    raise InputError(f"the catalogue has no public-domain file {name}; run `crab-edge scenes fetch`")


def _provenance(out: Path, catalogue: Catalogue, used: list[tuple[str, Asset]]) -> str:
    rows = {row["package"][0] + ":" + row["file"].rsplit("/", 1)[-1]: row for row in catalogue.manifest}
    lines = [
        f"# {out.name}",
        "",
        "Ten seconds, 480x360, H.264 and AAC, made by `crab-edge scenes sample`. Everything in it is in the",
        "public domain or CC0; the backdrop is painted by the script. The pictures and recordings also",
        "occur among the training scenes.",
        "",
        "| what | file | package | author | licence | sha256 |",
        "|---|---|---|---|---|---|",
    ]
    for what, asset in used:
        row = rows[{"o": "o:", "p": "s:"}[asset.key[0]] + asset.key.rsplit("/", 1)[-1].split(":")[-1]]
        lines.append(
            f"| {what} | {asset.key.split(':', 1)[1]} | {row['package']} {row['version']} | "
            f"{row['author'] or 'not stated'} | {row['licence']} | `{row['sha256'][:16]}` |"
        )
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    lines += [
        "",
        "What happens: an electric guitar on the left plays from 1 to 5 seconds; a bell appears at 5 seconds",
        "on the right and rings from 6 to 9 seconds; an apple lies in the middle and makes no sound.",
        "",
        f"sha256 of the clip: `{digest}`",
        "",
    ]
    return "\n".join(lines)
