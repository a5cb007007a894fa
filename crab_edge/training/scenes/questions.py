"""Questions in MUSIC-AVQA's kinds about a scene, with their answers, balanced where that is possible."""

from __future__ import annotations

import numpy as np

from crab_edge.training.scenes.facts import Fact, Truth, Vocabulary

NUMBERS = ("zero", "one", "two", "three", "four")
#: Modality, kind, question, answer.
Question = tuple[str, str, str, str]


def question_templates() -> list[str]:
    """Regular expressions of every question that scenes ask, for the model card."""
    return [
        r"(Is|Are) there (an? )?.+ in the (video|image)\?",
        r"Can you hear (an? )?.+\?",
        r"(Is|Are) the .+ making a sound\?",
        r"How many objects are visible in the (video|image)\?",
        r"How many different sounds can be heard\?",
        r"How many of the visible objects make a sound\?",
        r"Where is the sounding object\?",
        r"Where (is|are) the .+\?",
        r"What makes the sound\?",
        r"Which sound lasts longer, the .+ or the .+\?",
        r"Which sound is louder, the .+ or the .+\?",
        r"Which sounds first, the .+ or the .+\?",
    ]


def questions(truth: Truth, vocabulary: Vocabulary, random: np.random.Generator) -> list[Question]:
    out: list[Question] = []
    noun = truth.visual
    seen, heard, both = truth.seen(), truth.heard(), truth.both()
    if noun:
        yes = bool(random.random() < 0.5) if seen else False
        label, article = existence(
            yes,
            [f for f in seen],
            [f for f in heard if not f.seen],
            {f.label for f in seen},
            vocabulary.seen,
            random,
        )
        out.append(
            (
                "Visual",
                "Existential",
                f"{'Is' if article else 'Are'} there {_with(article, label)} in the {noun}?",
                "yes" if yes else "no",
            )
        )
        out.append(("Visual", "Counting", f"How many objects are visible in the {noun}?", NUMBERS[len(seen)]))
        placed = [f for f in seen if f.side]
        if placed and len(seen) > 1:
            fact = placed[int(random.integers(len(placed)))]
            out.append(
                ("Visual", "Location", f"Where {'are' if fact.plural else 'is'} {fact.the}?", str(fact.side))
            )
    if truth.has_audio:
        yes = bool(random.random() < 0.5) if heard else False
        label, article = existence(
            yes,
            heard,
            [f for f in seen if not f.heard and f.event_class],
            {f.label for f in heard},
            vocabulary.heard,
            random,
        )
        out.append(("Audio", "Existential", f"Can you hear {_with(article, label)}?", "yes" if yes else "no"))
        out.append(("Audio", "Counting", "How many different sounds can be heard?", NUMBERS[len(heard)]))
        if len(heard) == 1:
            out.append(
                ("Audio-Visual" if noun else "Audio", "Recognition", "What makes the sound?", heard[0].label)
            )
        if len(heard) == 2:
            out += _compared(heard, random)
    if noun and truth.has_audio:
        silent = [f for f in seen if not f.heard and f.event_class]
        sounding = [f for f in seen if f.heard]
        if silent or sounding:
            yes = bool(random.random() < 0.5) if silent and sounding else bool(sounding)
            # Asking only where both answers were possible, or on a coin, keeps yes and no balanced.
            if (silent and sounding) or random.random() < 0.35:
                pool = sounding if yes else silent
                fact = pool[int(random.integers(len(pool)))]
                out.append(
                    (
                        "Audio-Visual",
                        "Existential",
                        f"{'Are' if fact.plural else 'Is'} {fact.the} making a sound?",
                        "yes" if yes else "no",
                    )
                )
        if seen:
            out.append(
                (
                    "Audio-Visual",
                    "Counting",
                    "How many of the visible objects make a sound?",
                    NUMBERS[len(sounding)],
                )
            )
        if len(both) == 1 and len(heard) == 1 and both[0].side:
            out.append(("Audio-Visual", "Location", "Where is the sounding object?", both[0].side))
    return out


def _compared(heard: list[Fact], random: np.random.Generator) -> list[Question]:
    a, b = heard if random.random() < 0.5 else heard[::-1]
    assert a.heard and b.heard
    out: list[Question] = []
    lengths = a.heard[1] - a.heard[0], b.heard[1] - b.heard[0]
    if abs(lengths[0] - lengths[1]) >= 2:
        out.append(
            (
                "Audio",
                "Comparative",
                f"Which sound lasts longer, {a.the} or {b.the}?",
                a.label if lengths[0] > lengths[1] else b.label,
            )
        )
    if abs(a.loudness - b.loudness) >= 5.0:
        out.append(
            (
                "Audio",
                "Comparative",
                f"Which sound is louder, {a.the} or {b.the}?",
                a.label if a.loudness > b.loudness else b.label,
            )
        )
    if abs(a.heard[0] - b.heard[0]) >= 1:
        out.append(
            (
                "Audio-Visual",
                "Temporal",
                f"Which sounds first, {a.the} or {b.the}?",
                a.label if a.heard[0] < b.heard[0] else b.label,
            )
        )
    return out


def existence(
    yes: bool,
    present: list[Fact],
    tempting: list[Fact],
    taken: set[str],
    vocabulary: tuple[tuple[str, str, str], ...],
    random: np.random.Generator,
) -> tuple[str, str]:
    """(label, article) for an existence question: one present, or a plausible one that isn't."""
    if yes:
        fact = present[int(random.integers(len(present)))]
        return fact.label, fact.article
    tempting = [f for f in tempting if f.label not in taken]
    if tempting and random.random() < 0.4:
        fact = tempting[int(random.integers(len(tempting)))]
        return fact.label, fact.article
    rows = [v for v in vocabulary if v[0] not in taken]
    groups = {v[2] for v in vocabulary if v[0] in taken}
    near = [v for v in rows if v[2] in groups]
    if near and random.random() < 0.4:
        rows = near
    row = rows[int(random.integers(len(rows)))]
    return row[0], row[1]


def _with(article: str, label: str) -> str:
    return f"{article} {label}".strip()
