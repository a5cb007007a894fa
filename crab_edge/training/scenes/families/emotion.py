"""meld, mer24, cremad, mafw and dfew: a drawn face shows an emotion while an acted voice says a line."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from crab_edge.results import Choice
from crab_edge.training.scenes.actors import ActStage, Portrait, sized
from crab_edge.training.scenes.catalogue import Asset
from crab_edge.training.scenes.extras import Emotion, Voice
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample
from crab_edge.training.scenes.mixing import vary
from crab_edge.training.scenes.sounds import RATE

NOTE = "staged: a drawn face and an acted line of a game's voice, no person's real emotion"
#: Where a data set's list has the emotion's word.
_FIELD = {"meld": "Emotion", "mer24": "discrete"}
#: Only this much is heard of a clip.
_HEARD_S = 4.0
_STEP_S = 0.1
_CANVASES = ((320, 240), (288, 288), (240, 320))


def _speech(
    kit: Kit, voice: Voice, emotion: Emotion, random: np.random.Generator
) -> tuple[np.ndarray, float, set[str]]:
    """One to three lines of one voice: the wave, the clip's duration, the recordings' keys."""
    lines = [voice.lines[name] for name in emotion.lines if name in voice.lines]
    at = float(random.uniform(0.1, 0.5))
    placed: list[tuple[float, np.ndarray]] = []
    used = set()
    for number in random.permutation(len(lines))[:3]:
        asset: Asset = lines[int(number)]
        wave = asset.wave() if kit.test else vary(asset.wave(), random)
        wave = wave[: round((_HEARD_S - 0.3) * RATE)]
        if placed and at + wave.size / RATE > _HEARD_S:
            break
        placed.append((at, wave))
        used.add(asset.key)
        at += wave.size / RATE + float(random.uniform(0.15, 0.5))
        if at > 2.4 or random.random() < 0.25:
            break
    duration = max(2.0, round(at * 2) / 2)
    out = kit.mixed([], duration, random)
    for start, wave in placed:
        first = min(round(start * RATE), max(out.size - wave.size, 0))
        part = wave[: out.size - first]
        out[first : first + part.size] += part
    peak = float(np.abs(out).max())
    return (out * np.float32(0.98 / peak) if peak > 0.98 else out), duration, used


def _layered(
    under: np.ndarray, face: np.ndarray, over: np.ndarray | None, canvas: tuple[int, int], height: float
) -> Image.Image:
    image = Image.fromarray(np.ascontiguousarray(under))
    image.alpha_composite(Image.fromarray(np.ascontiguousarray(face)))
    if over is not None:
        image.alpha_composite(Image.fromarray(np.ascontiguousarray(over)))
    return sized([np.asarray(image)], canvas, height, False)[0]


def _portrait(
    kit: Kit,
    emotion: Emotion,
    canvas: tuple[int, int],
    duration: float,
    wave: np.ndarray,
    random: np.random.Generator,
) -> tuple[Portrait, set[str]]:
    extras = kit.extras
    height, mirror = float(random.uniform(0.7, 1.05)), bool(random.random() < 0.5)
    # Below the edge, so that no lower end shows when the head moves.
    foot = (float(random.uniform(0.4, 0.6)), 1.07)
    hops = wave[: wave.size // round(_STEP_S * RATE) * round(_STEP_S * RATE)].reshape(
        -1, round(_STEP_S * RATE)
    )
    loudness = np.minimum(np.sqrt((hops**2).mean(axis=1)) / 0.1, 1.5)
    emoji = [extras.emoji[name] for name in emotion.emoji if name in extras.emoji]
    if not kit.test and emoji and random.random() < 0.15:
        asset = pick(emoji, random)
        picture = sized([asset.array()], canvas, 0.7 * height, False)[0]
        return Portrait([(0.0, picture)], (foot[0], 0.92), loudness, _STEP_S), {asset.key}
    face = pick([f for f in extras.faces if f.test == kit.test], random)
    under, over = face.under.array(), None if face.over is None else face.over.array()
    names = [str(pick(emotion.faces, random)) for _ in range(2)]
    shown = [(0.0, names[0])]
    if emotion.name != "neutral" and random.random() < 0.3:
        shown = [(0.0, "serious"), (0.2 * duration, names[0])]
    if random.random() < 0.4:
        shown.append((float(random.uniform(0.45, 0.7)) * duration, names[1]))
    frames = []
    for start, name in shown:
        picture = _layered(under, extras.expressions[name].array(), over, canvas, height)
        frames.append((start, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else picture))
    keys = {face.key} | {extras.expressions[name].key for _, name in shown}
    return Portrait(frames, foot, loudness, _STEP_S), keys


def _scene(kit: Kit, random: np.random.Generator, index: int, task: str) -> TaskScene:
    extras = kit.extras
    words = extras.labels[task]
    voices = [v for v in extras.voices if v.test == kit.sounds_test]
    able = {
        name: [v for v in voices if any(line in v.lines for line in extras.emotion(name).lines)]
        for name in words
    }
    name = str(pick(sorted(n for n in able if able[n]), random))
    emotion, voice = extras.emotion(name), pick(able[name], random)
    wave, duration, used = _speech(kit, voice, emotion, random)
    bare, keys = kit.stage(random, pick(_CANVASES, random))
    if task == "cremad":
        # Its actors stand before one plain colour.
        bare.background = Image.new(
            "RGB", bare.canvas, tuple(int(v) for v in random.integers(90, 200, size=3))
        )
        keys = set()
    portrait, face_keys = _portrait(kit, emotion, bare.canvas, duration, wave, random)
    stage = ActStage(bare.canvas, bare.background, actors=[portrait])
    word = words[name]
    made = sample(task, [Choice(word)], {_FIELD.get(task, "emotion"): word}, "label")
    mix = facts([], [voice.name], duration, NOTE)
    mix["emotion"] = word
    return TaskScene(
        task,
        [Film(stage, duration, wave)],
        [wave],
        [made],
        duration,
        facts=mix,
        used=used | keys | face_keys,
    )


EXTRAS = True
MAKERS = {task: partial(_scene, task=task) for task in ("meld", "mer24", "cremad", "mafw", "dfew")}
