"""a2v and v2a: one sound and two silent clips, or one clip and two sounds; one of the two belongs to it."""

from __future__ import annotations

import numpy as np

from crab_edge.results import Choice
from crab_edge.training.scenes.catalogue import ClassInfo
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample, whole

#: How often the wrong one is of the same kind (two animals, two instruments), which is harder.
_NEAR = 0.5


def _pair(kit: Kit, random: np.random.Generator) -> tuple[ClassInfo, ClassInfo]:
    right = pick(kit.planner.both, random)
    others = [c for c in kit.planner.both if c.label != right.label]
    near = [c for c in others if c.group == right.group]
    return right, pick(near if near and random.random() < _NEAR else others, random)


def _film(kit: Kit, info: ClassInfo, duration: float, random: np.random.Generator) -> tuple[Film, set[str]]:
    stage, used = kit.stage(random)
    span = (0.0, duration + 1.0)
    kit.place(stage, [info], random, span=span, duration=duration, still=False)
    if kit.planner.scenery and random.random() < 0.3:
        other = [pick(kit.planner.scenery, random)]
        kit.place(stage, other, random, span=span, duration=duration, sizes=(0.18, 0.25))
    # A silent file: the sound of the clip would give the answer away.
    return Film(stage, duration), used | {thing.picture.key for thing in stage.things}


def _wave(
    kit: Kit, info: ClassInfo, duration: float, random: np.random.Generator
) -> tuple[np.ndarray, set[str]]:
    asset = pick(info.of("sound", kit.sounds_test), random)
    event = whole(asset, info.label, duration, float(random.uniform(-6.0, 3.0)))
    return kit.mixed([event], duration, random), {asset.key}


def a2v(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    right, wrong = _pair(kit, random)
    duration = float(random.choice([5.0, 8.0, 10.0]))
    number = int(random.integers(1, 3))
    shown = [right, wrong] if number == 1 else [wrong, right]
    films, used = [], set()
    for info in shown:
        film, keys = _film(kit, info, duration, random)
        films.append(film)
        used |= keys
    wave, keys = _wave(kit, right, duration, random)
    record = {
        "correct_video": number,
        "audio_event": right.label,
        "video1_event": shown[0].label,
        "video2_event": shown[1].label,
    }
    things = [thing for film in films for thing in film.stage.things]
    return TaskScene(
        "a2v",
        films,
        [wave],
        [sample("a2v", [Choice(str(number))], record, "label")],
        duration,
        facts=facts(things, [right.label], duration),
        used=used | keys,
    )


def v2a(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    right, wrong = _pair(kit, random)
    duration = float(random.choice([5.0, 8.0, 10.0]))
    number = int(random.integers(1, 3))
    heard = [right, wrong] if number == 1 else [wrong, right]
    film, used = _film(kit, right, duration, random)
    waves = []
    for info in heard:
        wave, keys = _wave(kit, info, duration, random)
        waves.append(wave)
        used |= keys
    record = {
        "correct_audio": number,
        "audio1_event": heard[0].label,
        "audio2_event": heard[1].label,
        "video_event": right.label,
    }
    return TaskScene(
        "v2a",
        [film],
        waves,
        [sample("v2a", [Choice(str(number))], record, "label")],
        duration,
        facts=facts(film.stage.things, [c.label for c in heard], duration),
        used=used,
    )


MAKERS = {"a2v": a2v, "v2a": v2a}
