"""The facts of a scene: who is seen where and when, who is heard when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SIDES = ("left", "middle", "right")


@dataclass(frozen=True)
class Fact:
    """One participant. Seconds are whole, end exclusive; `side` is None when it moves or stands on a border.

    `event_class`: whether the class can sound at all; `loudness` is the gain of its sound in dB.
    """

    label: str
    article: str
    verb: str
    event_class: bool
    seen: tuple[int, int] | None
    heard: tuple[int, int] | None
    side: str | None = None
    box: tuple[int, int, int, int] | None = None
    loudness: float = 0.0

    def overlap(self) -> tuple[int, int] | None:
        """Seconds in which it is both seen and heard."""
        if not (self.seen and self.heard):
            return None
        start, end = max(self.seen[0], self.heard[0]), min(self.seen[1], self.heard[1])
        return (start, end) if end > start else None

    @property
    def named(self) -> str:
        return f"{self.article} {self.label}".strip()

    @property
    def the(self) -> str:
        return f"the {self.label}"

    @property
    def plural(self) -> bool:
        return self.article == ""


@dataclass(frozen=True)
class Truth:
    """A scene's facts. `visual` is "video", "image" or None; `has_audio`: whether there is a sound track."""

    facts: Sequence[Fact]
    duration_s: float
    visual: str | None
    has_audio: bool

    @property
    def seconds(self) -> int:
        return max(1, round(self.duration_s))

    def seen(self) -> list[Fact]:
        return sorted((f for f in self.facts if f.seen), key=lambda f: (f.seen, f.label))

    def heard(self) -> list[Fact]:
        return sorted((f for f in self.facts if f.heard), key=lambda f: (f.heard, f.label))

    def both(self) -> list[Fact]:
        return [f for f in self.seen() if f.overlap()]


@dataclass(frozen=True)
class Vocabulary:
    """What may be asked about: (label, article, group) of what can be heard and of what can be seen."""

    heard: tuple[tuple[str, str, str], ...]
    seen: tuple[tuple[str, str, str], ...]
