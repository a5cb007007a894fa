"""unav: ten seconds with several events, each as often as it sounds while its object is in view."""

from __future__ import annotations

import numpy as np

from crab_edge.results import Event
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample
from crab_edge.training.scenes.mixing import SoundEvent

_SECONDS = 10


def _spans(random: np.random.Generator) -> list[tuple[int, int]]:
    """One or two stretches of whole seconds, at least one second apart."""
    if random.random() < 0.45:
        first = int(random.integers(1, 4))
        start = int(random.integers(0, 4))
        again = int(random.integers(start + first + 1, 9))
        return [(start, start + first), (again, min(again + int(random.integers(1, 4)), _SECONDS))]
    length = int(random.integers(2, _SECONDS + 1))
    start = int(random.integers(0, _SECONDS - length + 1))
    return [(start, start + length)]


def unav(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    stage, used = kit.stage(random)
    duration = float(_SECONDS)
    count = int(random.choice([1, 2, 3], p=[0.15, 0.55, 0.3]))
    infos = kit.planner.draw(kit.planner.both, count, set(), random)
    placed = kit.place(stage, infos, random, span=(0.0, duration + 1.0), duration=duration, still=False)
    events: list[SoundEvent] = []
    truth: list[Event] = []
    for thing in placed:
        asset = pick(thing.info.of("sound", kit.sounds_test), random)
        used |= {asset.key, thing.picture.key}
        gain = float(random.uniform(-6.0, 3.0))
        for start, end in _spans(random):
            events.append(SoundEvent(thing.info.label, asset, float(start), float(end), gain))
            truth.append(Event(thing.info.label, float(start), float(end), "audio-visual"))
    heard = {event.label for event in events}
    if random.random() < 0.2:
        # Heard but not seen: no audio-visual event.
        for info in kit.planner.draw(kit.planner.audible, 1, {t.info.label for t in placed}, random):
            asset = pick(info.of("sound", kit.sounds_test), random)
            start = int(random.integers(0, 7))
            events.append(SoundEvent(info.label, asset, float(start), float(start + 2), -6.0))
            used.add(asset.key)
            heard.add(info.label)
    truth.sort(key=lambda e: (e.start_s, e.label))
    wave = kit.mixed(events, duration, random)
    original = [{"label": e.label, "segment": [e.start_s, e.end_s]} for e in truth]
    return TaskScene(
        "unav",
        [Film(stage, duration, wave)],
        [wave],
        [sample("unav", truth, {"original_label": original}, "label_content")],
        duration,
        facts=facts(placed, sorted(heard), duration),
        used=used,
    )


MAKERS = {"unav": unav}
