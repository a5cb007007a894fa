"""s4, ms3 and ref_avs: a still, about a second of sound, and the mask of what sounds or of what is meant."""

from __future__ import annotations

import hashlib
from functools import partial

import numpy as np
from PIL import Image

from crab_edge.results import Box, Choice, Points
from crab_edge.training.scenes.catalogue import ClassInfo
from crab_edge.training.scenes.compose import Stage, Thing
from crab_edge.training.scenes.kit import Kit, TaskScene, facts, pick, sample
from crab_edge.training.scenes.mixing import SoundEvent
from crab_edge.training.scenes.silhouettes import box_of, points_of, silhouettes, squared

_AVS_SECONDS, _REF_SECONDS = 5, 10
_NAMES = {1: ("",), 2: ("left", "right"), 3: ("left", "middle", "right")}


def _spots(
    stage: Stage, wanted: list[int], frame: int, seconds: int, label: str
) -> tuple[np.ndarray, list[Box | Points]]:
    """The mask of these objects at native size, and box and points of it in 224-pixel units."""
    masks = silhouettes(stage, frame + 0.5, float(seconds))
    mask = np.zeros((stage.canvas[1], stage.canvas[0]), bool)
    for number in wanted:
        mask |= masks[number]
    box = box_of(squared(mask))
    if box is None:
        return mask, []
    points = points_of([squared(masks[number]) for number in wanted])
    return mask, [Box(label, *map(float, box)), Points(label, points)]


def _picture(stage: Stage, frame: int, seconds: int) -> Image.Image:
    return stage.draw([frame + 0.5], float(seconds))[0]


def _avs(kit: Kit, random: np.random.Generator, index: int, task: str) -> TaskScene:
    stage, used = kit.stage(random)
    seconds = _AVS_SECONDS
    span = (0.0, seconds + 1.0)
    if task == "s4":
        frame = int(random.integers(seconds)) if kit.test else 0
        infos = kit.planner.draw(kit.planner.both, 1, set(), random)
        spans = [(0, seconds)]
    else:
        frame = int(random.integers(seconds))
        infos = kit.planner.draw(kit.planner.both, int(random.choice([2, 3], p=[0.65, 0.35])), set(), random)
        spans = [_sounding(frame, seconds, random, always=number == 0) for number in range(len(infos))]
    placed = kit.place(
        stage, infos, random, span=span, duration=float(seconds), still=False, sizes=(0.3, 0.62)
    )
    if task == "s4":
        labels = {infos[0].label}
        extra = []
        for _ in range(int(random.choice([0, 1, 2], p=[0.35, 0.4, 0.25]))):
            pool = kit.planner.visible if random.random() < 0.5 else kit.planner.scenery
            extra += kit.planner.draw(pool or kit.planner.visible, 1, labels, random)
            labels |= {c.label for c in extra}
        kit.place(stage, extra, random, span=span, duration=float(seconds), sizes=(0.2, 0.4))
    events = []
    sounding: list[int] = []
    for info, (start, end) in zip(infos, spans, strict=True):
        at = next((n for n, thing in enumerate(stage.things) if thing.info is info and thing in placed), None)
        if at is None or end <= start:
            continue
        asset = pick(info.of("sound", kit.sounds_test), random)
        events.append(
            SoundEvent(info.label, asset, float(start), float(end), float(random.uniform(-4.0, 2.0)))
        )
        used.add(asset.key)
        if start <= frame < end:
            sounding.append(at)
    label = " and ".join(stage.things[n].info.label for n in sounding)
    mask, results = _spots(stage, sounding, frame, seconds, label)
    wave = kit.mixed(events, float(seconds), random)
    used |= {thing.picture.key for thing in stage.things}
    heard = [stage.things[n].info.label for n in sounding]
    return TaskScene(
        task,
        [],
        [wave],
        [sample(task, results, {"a_obj": label, "frame_idx": frame}, "label_content")],
        float(seconds),
        picture=_picture(stage, frame, seconds),
        mask=mask,
        frame=frame,
        facts=facts(stage.things, heard, float(seconds)) | {"mask, % of the frame": _share(mask)},
        used=used,
    )


def _sounding(frame: int, seconds: int, random: np.random.Generator, *, always: bool) -> tuple[int, int]:
    """Whole seconds in which an object of ms3 sounds; with `always` that of the picture is among them."""
    if always or random.random() < 0.4:
        return int(random.integers(0, frame + 1)), int(random.integers(frame + 1, seconds + 1))
    if frame + 1 < seconds and random.random() < 0.5:
        return frame + 1, seconds
    return 0, frame


def _share(mask: np.ndarray) -> int:
    return round(100 * float(mask.mean()))


def is_unseen(label: str) -> bool:
    """Whether ref_avs' training scenes leave a class out: it is what the split test_u asks for."""
    return hashlib.sha256(f"ref_avs|{label}".encode()).digest()[0] < 40


def _split(kit: Kit, index: int) -> str:
    """Training has seen and absent objects; test goes round the three official splits."""
    if not kit.test:
        return "train"
    return ("test_s", "test_u", "test_n")[index % 3]


def ref_avs(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    split, seconds = _split(kit, index), _REF_SECONDS
    absent = split == "test_n" or (split == "train" and random.random() < 0.25)
    pools = [[c for c in kit.planner.both if is_unseen(c.label) == unseen] for unseen in (False, True)]
    # A catalogue too small for both sets of classes has them in common.
    known, unseen = pools if pools[0] and pools[1] else (kit.planner.both, kit.planner.both)
    target: ClassInfo = pick(unseen if split == "test_u" else known, random)
    count = int(random.choice([1, 2, 3], p=[0.2, 0.5, 0.3]))
    infos = [target, *kit.planner.draw(known, count - 1, {target.label}, random)]
    infos = [infos[int(i)] for i in random.permutation(len(infos))]
    stage, used = kit.stage(random)
    # Each has its column; a crowded one is drawn smaller, never left out.
    placed = kit.place(
        stage,
        infos,
        random,
        span=(0.0, seconds + 1.0),
        duration=float(seconds),
        sizes=(0.3, 0.6) if count == 1 else (0.3, 0.42) if count == 2 else (0.22, 0.3),
        columns=True,
    )
    frame = int(random.integers(seconds))
    sounding = {n for n in range(len(placed)) if random.random() < 0.5}
    sounding = sounding or {int(random.integers(len(placed)))}
    events = []
    for number in sorted(sounding):
        asset = pick(placed[number].info.of("sound", kit.sounds_test), random)
        label = placed[number].info.label
        events.append(SoundEvent(label, asset, 0.0, float(seconds), float(random.uniform(-3.0, 2.0))))
        used.add(asset.key)
    at = next((n for n, thing in enumerate(placed) if thing.info.label == target.label), 0)
    if absent:
        text = _absent(known, placed, sounding, at, random)
    else:
        text = _present(placed, sounding, at, random)
    results: list[Choice | Box | Points] = [Choice("false")]
    mask = np.zeros((stage.canvas[1], stage.canvas[0]), bool)
    if not absent:
        label = placed[at].info.label
        mask, spots = _spots(stage, [at], frame, seconds, label)
        results = [Choice("true"), *spots]
    record = {
        "description": text,
        "object": text,
        "a_obj": "" if absent else placed[at].info.label,
        "fid": index,
        "split": split,
        "idx" if split == "train" else "frame_idx": frame,
    }
    used |= {thing.picture.key for thing in placed}
    heard = [placed[n].info.label for n in sorted(sounding)]
    return TaskScene(
        "ref_avs",
        [],
        [kit.mixed(events, float(seconds), random)],
        [sample("ref_avs", results, record, "output")],
        float(seconds),
        picture=_picture(stage, frame, seconds),
        mask=mask,
        frame=frame,
        facts=facts(placed, heard, float(seconds))
        | {"the object exists": not absent, "mask, % of the frame": _share(mask)},
        used=used,
    )


def _present(placed: list[Thing], sounding: set[int], at: int, random: np.random.Generator) -> str:
    """An expression that only this object meets."""
    label, side = placed[at].info.label, _NAMES[len(placed)][at]
    said = [f"the {label}"]
    if side:
        said += [f"the {label} on the {side}" if side != "middle" else f"the {label} in the middle"]
        said += ["the object in the middle" if side == "middle" else f"the object on the {side}"]
    if at in sounding:
        said.append(f"the {label} making a sound")
        if len(sounding) == 1:
            said += ["the object making a sound", "the only thing that can be heard"]
    else:
        said.append(f"the silent {label}")
        if len(sounding) == len(placed) - 1 and len(placed) > 1:
            said.append("the object that makes no sound")
    if at > 0:
        said.append(f"the object next to the {placed[at - 1].info.label}, on its right")
    return str(pick(said, random))


def _absent(
    known: list[ClassInfo], placed: list[Thing], sounding: set[int], at: int, random: np.random.Generator
) -> str:
    """An expression that nothing in the picture meets."""
    label, side = placed[at].info.label, _NAMES[len(placed)][at]
    shown = {thing.info.label for thing in placed}
    group = placed[at].info.group
    away = [c for c in known if c.label not in shown]
    near = [c for c in away if c.group == group]
    other: ClassInfo = pick(near or away, random)
    said = [f"the {other.label}", f"the {other.label} making a sound"]
    if at in sounding:
        said.append(f"the silent {label}")
    else:
        said.append(f"the {label} making a sound")
    if side:
        wrong = "right" if side == "left" else "left"
        said.append(f"the {label} on the {wrong}")
    return str(pick(said, random))


MAKERS = {"s4": partial(_avs, task="s4"), "ms3": partial(_avs, task="ms3"), "ref_avs": ref_avs}
