"""avqa_thu: questions with four options about a clip, of AVQA's eight kinds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crab_edge.results import Choice
from crab_edge.training.scenes.catalogue import ClassInfo
from crab_edge.training.scenes.compose import Thing
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample
from crab_edge.training.scenes.mixing import SoundEvent

_SIDES = ("on the left", "in the middle", "on the right")
_USES = {"instrument": "making music", "vehicle": "transport"}
_OTHER_USES = ("cooking", "writing", "cutting wood", "playing football", "lighting a room")
#: relation, type, question, right option, wrong options.
_Asked = tuple[str, str, str, str, list[str]]


def _questions(
    kit: Kit, placed: list[Thing], events: list[SoundEvent], seconds: int, random: np.random.Generator
) -> list[_Asked]:
    first, info = events[0], placed[0].info
    absent = [c for c in kit.planner.both if c.label not in {t.info.label for t in placed}]
    wrong = [absent[int(i)] for i in random.permutation(len(absent))[:3]]
    # The other object in view, silent or heard later, is among the options.
    names = [_named(t.info) for t in placed[1:]] + [_named(c) for c in wrong]
    out: list[_Asked] = [
        ("Both", "Which", "Which object makes the first sound in the video?", _named(info), names),
        ("Sound", "Come From", "Where does the first sound in the video come from?", _named(info), names),
        (
            "Both",
            "Happening",
            "What is happening in the video?",
            f"{_named(info)} {info.verb}",
            [f"{_named(c)} {c.verb}" for c in wrong],
        ),
        (
            "Both",
            "Why",
            "Why is there a sound at first?",
            f"because {_named(info)} {info.verb}",
            [f"because {_named(c)} {c.verb}" for c in wrong],
        ),
    ]
    side = _SIDES[min(int(placed[0].start[0] * 3), 2)]
    if min(abs(placed[0].start[0] - edge) for edge in (1 / 3, 2 / 3)) > 0.05:
        rest = [s for s in _SIDES if s != side] + ["nowhere in the picture"]
        out.append(("View", "Where", f"Where is the {info.label} in the video?", side, rest))
    if len(events) == 2:
        second = events[1]
        if second.start_s >= first.start_s + 1:
            asked = f"What makes a sound next, after the {info.label}?"
            rest = [_named(info), *(_named(c) for c in wrong)]
            out.append(("Sound", "Before Next", asked, _named(placed[1].info), rest))
        when = ("at the beginning", "at the end", "all the time", "never")
        if second.start_s >= seconds / 2:
            right = when[1]
            asked = f"When is the {second.label} heard?"
            out.append(("Both", "When", asked, right, [w for w in when if w != right]))
    if info.group in _USES:
        uses = [str(u) for u in random.permutation(_OTHER_USES)[:3]]
        asked = f"What is the {info.label} in the video used for?"
        out.append(("View", "Used For", asked, _USES[info.group], uses))
    return out


def _named(info: ClassInfo) -> str:
    return f"{info.article} {info.label}".strip()


def avqa_thu(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    seconds = 10
    stage, used = kit.stage(random)
    infos = kit.planner.draw(kit.planner.both, 2, set(), random)
    placed = kit.place(stage, infos, random, span=(0.0, seconds + 1.0), duration=float(seconds))
    events = []
    spans: Sequence[tuple[int, int]] = [(0, seconds)]
    if len(placed) == 2 and random.random() < 0.7:
        turn = int(random.integers(3, 8))
        spans = [(0, turn), (turn, seconds)]
    for thing, (start, end) in zip(placed, spans, strict=False):
        asset = pick(thing.info.of("sound", kit.sounds_test), random)
        used |= {asset.key}
        gain = float(random.uniform(-4.0, 2.0))
        events.append(SoundEvent(thing.info.label, asset, float(start), float(end), gain))
    used |= {thing.picture.key for thing in placed}
    relation, kind, text, right, wrong = pick(_questions(kit, placed, events, seconds, random), random)
    options = [right, *dict.fromkeys(w for w in wrong if w != right)][:4]
    options = [options[int(i)] for i in random.permutation(len(options))]
    record = {
        "id": index,
        "question_relation": relation,
        "question_type": kind,
        "question_text": text,
        "multi_choice": options,
        "answer": right,
    }
    wave = kit.mixed(events, float(seconds), random)
    return TaskScene(
        "avqa_thu",
        [Film(stage, float(seconds), wave)],
        [wave],
        [sample("avqa_thu", [Choice(right)], record, "label")],
        float(seconds),
        facts=facts(placed, [e.label for e in events], float(seconds)) | {"question type": kind},
        used=used,
    )


MAKERS = {"avqa_thu": avqa_thu}
