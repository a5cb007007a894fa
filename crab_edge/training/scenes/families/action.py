"""ks and ucf: one person doing something, from pose sequences and drawn people; instruments are played."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crab_edge.results import Choice
from crab_edge.training.scenes.actors import Actor, ActStage, sized
from crab_edge.training.scenes.catalogue import Asset
from crab_edge.training.scenes.compose import draw_cutout
from crab_edge.training.scenes.extras import Figure
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample, whole

NOTE = "staged: cut-out or drawn people in poses, not filmed actions"
_CANVASES = ((320, 240), (288, 288), (352, 240))
#: Figures of these actions stand upright and may hold an instrument.
_UPRIGHT = ("walk", "run", "dance", "jump", "shake")


@dataclass(frozen=True)
class _Doing:
    """One label: who shows it, how it moves, what is heard; `instrument`: pictures of what is played."""

    label: str
    motion: str
    figures: list[Figure]
    sounds: list[Asset]
    instrument: list[Asset] | None = None


def doings(kit: Kit, style: str) -> list[_Doing]:
    """The actions that this split can show, by label; style "ks" or "ucf"."""
    out = []
    for action in kit.extras.actions:
        label = getattr(action, style)
        shown, heard = action.shown(kit.test), action.heard(kit.sounds_test)
        if label and shown and heard:
            out.append(_Doing(label, action.motion, shown, heard))
    upright = [
        figure
        for action in kit.extras.actions
        if action.motion in _UPRIGHT
        for figure in action.shown(kit.test)
        if not figure.key.startswith(("j:", "m:"))
    ]
    for info in kit.planner.both:
        label = kit.extras.played.get(info.label, {}).get(style, "")
        if label and upright:
            pictures = info.of("picture", kit.test)
            out.append(_Doing(label, "sway", upright, info.of("sound", kit.sounds_test), pictures))
    return sorted(out, key=lambda d: d.label)


def _scene(kit: Kit, random: np.random.Generator, task: str) -> TaskScene:
    doing = pick(doings(kit, task), random)
    duration = 10.0 if task == "ks" else float(random.integers(4, 9))
    bare, used = kit.stage(random, pick(_CANVASES, random))
    stage = ActStage(bare.canvas, bare.background)
    figure: Figure = pick(doing.figures, random)
    mirror, height = bool(random.random() < 0.5), float(random.uniform(0.5, 0.8))
    poses = figure.poses[:1] if doing.instrument else figure.poses
    x, goal = float(random.uniform(0.25, 0.45)), float(random.uniform(0.55, 0.75))
    if random.random() < 0.5:
        x, goal = goal, x
    foot = (x, float(random.uniform(0.86, 0.97)))
    period = float(random.uniform(0.8, 1.6))
    if doing.motion == "dive":
        foot, height = (x, 0.6), min(height, 0.45)
    elif doing.motion == "jump":
        height = min(height, 0.7)
    used |= {p.key for p in poses}
    stage.actors.append(
        Actor(
            sized([p.array() for p in poses], bare.canvas, height, mirror), foot, doing.motion, period, goal
        )
    )
    if doing.instrument:
        asset = pick(doing.instrument, random)
        cutout = draw_cutout(asset, bare.canvas, float(random.uniform(0.32, 0.45)), random, not kit.test)
        held = (
            foot[0],
            min(foot[1] - height * 0.45 + cutout.height / bare.canvas[1] / 2, 0.98),
        )
        stage.actors.append(Actor([cutout], held, "sway", period))
        used.add(asset.key)
    sound = pick(doing.sounds, random)
    wave = kit.mixed(
        [whole(sound, doing.label, duration, float(random.uniform(-5.0, 3.0)))], duration, random
    )
    label = doing.label
    if task == "ks":
        made = sample("ks", [Choice(label)], {"action": label}, "label")
    else:
        made = sample("ucf", [Choice(label.lower())], {"label": label}, "new_label")
    mix = facts([], [label], duration, NOTE)
    mix["figures in view"] = 1
    mix["poses"] = len(poses)
    mix["motion"] = doing.motion
    return TaskScene(
        task,
        [Film(stage, duration, wave)],
        [wave],
        [made],
        duration,
        facts=mix,
        used=used | {sound.key},
    )


def ks(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    return _scene(kit, random, "ks")


def ucf(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    return _scene(kit, random, "ucf")


EXTRAS = True
MAKERS = {"ks": ks, "ucf": ucf}
