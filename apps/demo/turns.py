"""One question and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

from crab_edge.results import Answer


@dataclass(frozen=True)
class Skipped:
    """A task that wasn't run. `why`: a key of the texts or, for one that needs other inputs, the reason."""

    task: str
    family: str
    why: str
    other: str = ""


@dataclass
class Turn:
    """One question and what came of it. `first_token_s` and `took_s` leave out the wait for others."""

    kind: str
    question: str | None
    answers: tuple[Answer, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    first_token_s: float | None = None
    waited_s: float = 0.0
    took_s: float = 0.0

    @property
    def reused(self) -> bool:
        """Whether its answers needed no reading of the clip."""
        return bool(self.answers) and all(answer.timings.cached_tokens for answer in self.answers)
