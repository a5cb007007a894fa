"""avqa-music: ensembles with soundfont melodies and MUSIC-AVQA's nine types of question.

The records are avqa's, in lists of their own (`avqa/test_music.json`): its plain lists ask about any object.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from crab_edge.results import Choice
from crab_edge.training.scenes.kit import Film, Kit, TaskScene, facts, pick, sample
from crab_edge.training.scenes.mixing import SoundEvent

NUMBERS = ("zero", "one", "two", "three", "four")
QUESTIONS_PER_SCENE = 3
_SECONDS = 10
_SIDES = {1: ("middle",), 2: ("left", "right"), 3: ("left", "middle", "right")}
#: Modality, type, question, answer.
Question = tuple[str, str, str, str]


@dataclass(frozen=True)
class Player:
    """One instrument: where it stands (None = not in view), when and how loud it plays (None = silent)."""

    label: str
    side: str | None
    heard: tuple[int, int] | None
    loudness: float = 0.0


def question_templates() -> list[str]:
    """Regular expressions of every question that music scenes ask."""
    return [
        r"How many musical instruments can be heard in the video\?",
        r"How many musical instruments can be seen in the video\?",
        r"Is the .+ louder than the .+\?",
        r"Does the .+ play longer than the .+\?",
        r"Where does the .+ stand\?",
        r"Which instrument stands on the (left|right)\?",
        r"Does the .+ in the video play all the time\?",
        r"Does all the music come from instruments in the video\?",
        r"How many of the instruments in the video are playing\?",
        r"How many of the instruments in the video stay silent\?",
        r"Where is the loudest instrument\?",
        r"Where is the instrument that starts first\?",
        r"Is the instrument on the left louder than the one on the right\?",
        r"Does the instrument on the left play longer than the one on the right\?",
        r"Which instrument starts first\?",
        r"Which instrument starts after the .+\?",
    ]


def questions(players: list[Player], seconds: int, random: np.random.Generator) -> list[Question]:
    """Every question whose answer is clear: levels differ by 4 dB, times by a second, or nothing is asked."""
    seen = [p for p in players if p.side]
    heard = [p for p in players if p.heard]
    both = [p for p in seen if p.heard]
    out: list[Question] = [
        (
            "Audio",
            "Counting",
            "How many musical instruments can be heard in the video?",
            NUMBERS[len(heard)],
        ),
        (
            "Visual",
            "Counting",
            "How many musical instruments can be seen in the video?",
            NUMBERS[len(seen)],
        ),
        (
            "Audio-Visual",
            "Counting",
            "How many of the instruments in the video are playing?",
            NUMBERS[len(both)],
        ),
        (
            "Audio-Visual",
            "Counting",
            "How many of the instruments in the video stay silent?",
            NUMBERS[len(seen) - len(both)],
        ),
    ]
    if heard:
        out.append(
            (
                "Audio-Visual",
                "Existential",
                "Does all the music come from instruments in the video?",
                _yes(len(both) == len(heard)),
            )
        )
    for one in seen:
        out.append(("Visual", "Location", f"Where does the {one.label} stand?", str(one.side)))
        if one.side in ("left", "right"):
            out.append(("Visual", "Location", f"Which instrument stands on the {one.side}?", one.label))
        if one.heard:
            always = one.heard == (0, seconds)
            text = f"Does the {one.label} in the video play all the time?"
            out.append(("Audio-Visual", "Existential", text, _yes(always)))
    if len(heard) >= 2:
        a, b = (heard[int(i)] for i in random.permutation(len(heard))[:2])
        if abs(a.loudness - b.loudness) >= 4.0:
            text = f"Is the {a.label} louder than the {b.label}?"
            out.append(("Audio", "Comparative", text, _yes(a.loudness > b.loudness)))
        if abs(_length(a) - _length(b)) >= 2:
            text = f"Does the {a.label} play longer than the {b.label}?"
            out.append(("Audio", "Comparative", text, _yes(_length(a) > _length(b))))
        loud = sorted(heard, key=lambda p: -p.loudness)
        if loud[0].side and loud[0].loudness - loud[1].loudness >= 4.0:
            out.append(("Audio-Visual", "Location", "Where is the loudest instrument?", loud[0].side))
        early = sorted(heard, key=lambda p: _start(p))
        if _start(early[1]) - _start(early[0]) >= 1:
            out.append(("Audio-Visual", "Temporal", "Which instrument starts first?", early[0].label))
            if early[0].side:
                text = "Where is the instrument that starts first?"
                out.append(("Audio-Visual", "Location", text, early[0].side))
            if len(early) == 2 or _start(early[2]) > _start(early[1]):
                text = f"Which instrument starts after the {early[0].label}?"
                out.append(("Audio-Visual", "Temporal", text, early[1].label))
        sides = {p.side: p for p in both}
        if "left" in sides and "right" in sides:
            left, right = sides["left"], sides["right"]
            if abs(left.loudness - right.loudness) >= 4.0:
                text = "Is the instrument on the left louder than the one on the right?"
                out.append(("Audio-Visual", "Comparative", text, _yes(left.loudness > right.loudness)))
            if abs(_length(left) - _length(right)) >= 2:
                text = "Does the instrument on the left play longer than the one on the right?"
                out.append(("Audio-Visual", "Comparative", text, _yes(_length(left) > _length(right))))
    return out


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _start(player: Player) -> int:
    return player.heard[0] if player.heard else 0


def _length(player: Player) -> int:
    return player.heard[1] - player.heard[0] if player.heard else 0


def _span(number: int, random: np.random.Generator) -> tuple[int, int]:
    """All the time, or an entry later and maybe an end sooner."""
    if random.random() < (0.5 if number == 0 else 0.25):
        return 0, _SECONDS
    start = int(random.integers(0, 6))
    return start, int(random.integers(start + 3, _SECONDS + 1))


def music(kit: Kit, random: np.random.Generator, index: int) -> TaskScene:
    pool = [c for c in kit.planner.both if c.instrument] or kit.planner.both
    stage, used = kit.stage(random)
    count = min(int(random.choice([1, 2, 3], p=[0.15, 0.5, 0.35])), len(pool))
    infos = kit.planner.draw(pool, count, set(), random)
    sizes = {1: (0.45, 0.7), 2: (0.34, 0.45), 3: (0.24, 0.31)}[count]
    placed = kit.place(
        stage,
        infos,
        random,
        span=(0.0, _SECONDS + 1.0),
        duration=float(_SECONDS),
        sizes=sizes,
        columns=True,
    )
    playing = [random.random() < 0.75 for _ in placed]
    if placed and not any(playing):
        playing[0] = True
    # Levels a clear step apart, in random order, so that "louder" always has an answer.
    levels = [float(v) for v in random.permutation([-9.0, -4.5, 0.0, 4.5])]
    players, events = [], []
    for number, (thing, plays) in enumerate(zip(placed, playing, strict=True)):
        span = _span(number, random) if plays else None
        players.append(Player(thing.info.label, _SIDES[len(placed)][number], span, levels[number]))
        used.add(thing.picture.key)
    off = [c for c in kit.planner.audible if c.instrument]
    if off and random.random() < 0.25:
        for info in kit.planner.draw(off, 1, {t.info.label for t in placed}, random):
            players.append(Player(info.label, None, _span(1, random), levels[3]))
    known = {c.label: c for c in kit.planner.audible}
    for player in players:
        if player.heard:
            recordings = known[player.label].of("sound", kit.sounds_test)
            asset = pick([a for a in recordings if a.key.startswith("f:")] or recordings, random)
            used.add(asset.key)
            start, end = player.heard
            events.append(SoundEvent(player.label, asset, float(start), float(end), player.loudness))
    asked = questions(players, _SECONDS, random)
    chosen = _spread(asked, random)
    wave = kit.mixed(events, float(_SECONDS), random)
    samples = [
        sample(
            "avqa",
            [Choice(answer)],
            {"type": json.dumps([modality, kind]), "question": text, "answer": answer},
            "label",
        )
        for modality, kind, text, answer in chosen
    ]
    return TaskScene(
        "avqa-music",
        [Film(stage, float(_SECONDS), wave)],
        [wave],
        samples,
        float(_SECONDS),
        facts=facts(placed, [e.label for e in events], float(_SECONDS)),
        used=used,
    )


def _spread(asked: list[Question], random: np.random.Generator) -> list[Question]:
    """Up to three questions of different types, the types equally likely."""
    kinds = sorted({(modality, kind) for modality, kind, _, _ in asked})
    order = [kinds[int(i)] for i in random.permutation(len(kinds))][:QUESTIONS_PER_SCENE]
    return [pick([q for q in asked if (q[0], q[1]) == kind], random) for kind in order]


MAKERS = {"avqa-music": music}
