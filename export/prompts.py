"""Prompts as the decoder gets them: embeddings and positions, without a decoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.generate import Generator
from crab_edge.resolved import Spent

from .examples import ExampleSet

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Prompt:
    """embeds [S, H], positions [3, S]; the last `asked` tokens are the question's own text.

    vision, audio: the encoders' outputs [n, H], in the order of the prompt.
    """

    embeds: Floats
    positions: NDArray[np.int64]
    asked: int
    vision: tuple[Floats, ...]
    audio: tuple[Floats, ...]

    def arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """As named arrays, for a file."""
        out: dict[str, NDArray[Any]] = {
            f"{prefix}.embeds": self.embeds,
            f"{prefix}.positions": self.positions,
            f"{prefix}.asked": np.array(self.asked),
        }
        for kind in ("vision", "audio"):
            out |= {f"{prefix}.{kind}.{i}": rows for i, rows in enumerate(getattr(self, kind))}
        return out

    @classmethod
    def of(cls, arrays: dict[str, NDArray[Any]], prefix: str) -> Prompt:
        """The reverse of `arrays`."""

        def parts(kind: str) -> tuple[Floats, ...]:
            count = sum(name.startswith(f"{prefix}.{kind}.") for name in arrays)
            return tuple(arrays[f"{prefix}.{kind}.{i}"] for i in range(count))

        return cls(
            arrays[f"{prefix}.embeds"],
            arrays[f"{prefix}.positions"],
            int(arrays[f"{prefix}.asked"]),
            parts("vision"),
            parts("audio"),
        )


class _Listener:
    """Stands in for an engine: its encoders work, and its decoder only notes what it is given."""

    name = "listener"

    def __init__(self, engine: Any, vocab_size: int) -> None:
        self._engine = engine
        self._logits = np.zeros(vocab_size, np.float32)
        self._embeds: list[Floats] = []
        self._positions: list[NDArray[np.int64]] = []
        self.heard: dict[str, list[Floats]] = {"vision": [], "audio": []}

    @property
    def length(self) -> int:
        return sum(len(part) for part in self._embeds)

    def vision(self, pixel_values: Floats) -> Floats:
        self.heard["vision"].append(self._engine.vision(pixel_values))
        return self.heard["vision"][-1]

    def audio(self, chunks: Floats, lengths: NDArray[np.int64]) -> Floats:
        self.heard["audio"].append(self._engine.audio(chunks, lengths))
        return self.heard["audio"][-1]

    def forward(self, embeds: Floats, position_ids: NDArray[np.int64]) -> Floats:
        self._embeds.append(np.array(embeds[0]))
        self._positions.append(np.array(position_ids[:, 0]))
        return self._logits

    def rewind(self, length: int) -> None:
        if self._embeds:
            embeds, positions = self.prompt()
            self._embeds, self._positions = [embeds[:length]], [positions[:, :length]]

    def prompt(self) -> tuple[Floats, NDArray[np.int64]]:
        return np.concatenate(self._embeds), np.concatenate(self._positions, axis=1)


def collect(side: Any, engine: Any, examples: ExampleSet, tick: Callable[[], None]) -> list[Prompt]:
    """The prompts of `examples` as the bundle or float model `side` embeds them, encoders run by `engine`.

    Prompts that show the same share the encoders' work: outputs are listed with the first of them.
    """
    listener = _Listener(engine, side.manifest.model.vocab_size)
    generator = Generator(side, listener)  # type: ignore[arg-type]
    out = []
    for example in examples.examples:
        listener.heard = {"vision": [], "audio": []}
        generator.start(example.shown, example.instruction, Spent())
        embeds, positions = listener.prompt()
        heard = {kind: tuple(rows) for kind, rows in listener.heard.items()}
        asked = len(side.prompt.suffix(example.instruction))
        out.append(Prompt(embeds, positions, asked, **heard))
        tick()
    return out
