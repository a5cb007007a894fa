"""Measuring a bundle against the float model it came from, on the same prompts.

Greedy agreement is the share of positions with the same argmax, teacher-forced on the float model's own
output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.generate import Generator
from crab_edge.resolved import Spent

from .examples import Example, ExampleSet

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle
    from crab_edge.engines import Engine
    from crab_edge.engines.torch import TorchEngine
    from crab_edge.features import FeatureConfig
    from crab_edge.manifest import ModelInfo
    from crab_edge.prompt import PromptBuilder

Tick = Callable[[], None]
# Answers to real prompts end by themselves; what follows noise is noise, and a little of it is enough.
MAX_NEW_TOKENS = {"synthetic": 12}
DEFAULT_NEW_TOKENS = 48


@dataclass(frozen=True)
class Trace:
    """One prompt's run: encoder outputs in order, the answer's tokens, and the logits [n, V] that chose them.

    `tokens` has as many entries as `logits`; the last one may be the end token.
    """

    vision: tuple[NDArray[np.float32], ...]
    audio: tuple[NDArray[np.float32], ...]
    tokens: tuple[int, ...]
    logits: NDArray[np.float32]


class _Recorder:
    """An engine that remembers what its encoders returned."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.outputs: dict[str, list[NDArray[np.float32]]] = {"vision": [], "audio": []}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def vision(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        out = self._engine.vision(pixel_values)
        self.outputs["vision"].append(out)
        return out

    def audio(self, chunks: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        out = self._engine.audio(chunks, lengths)
        self.outputs["audio"].append(out)
        return out


def float_side(engine: TorchEngine, prompt: PromptBuilder, features: FeatureConfig, model: ModelInfo) -> Any:
    """What a `Generator` needs of a bundle, with the float model's own embedding table."""
    return SimpleNamespace(
        prompt=prompt,
        features=features,
        manifest=SimpleNamespace(model=model),
        embedding=SimpleNamespace(rows=engine.embed),
    )


def trace(
    bundle: Bundle | Any, engine: Engine, example: Example, limit: int, forced: Sequence[int] | None = None
) -> Trace:
    """Run one prompt greedily up to its end token or `limit` tokens, or along the tokens `forced` on it."""
    recorder = _Recorder(engine)
    generator = Generator(bundle, recorder)  # type: ignore[arg-type]
    row, position = generator.start(example.shown, example.instruction, Spent())
    ends = set(bundle.manifest.model.eos_ids)
    tokens: list[int] = []
    rows: list[NDArray[np.float32]] = []
    while True:
        rows.append(np.array(row, np.float32))
        token = int(np.argmax(row)) if forced is None else int(forced[len(tokens)])
        tokens.append(token)
        last = len(tokens) == (limit if forced is None else len(forced))
        if last or (forced is None and token in ends):
            break
        embeds = bundle.embedding.rows(np.array([token]))[None]
        row = engine.forward(embeds, np.full((3, 1, 1), position + len(tokens) - 1, np.int64))
    outputs = recorder.outputs
    return Trace(tuple(outputs["vision"]), tuple(outputs["audio"]), tuple(tokens), np.stack(rows))


def reference(side: Any, engine: Engine, examples: ExampleSet, tick: Tick) -> list[Trace]:
    """The float model's own answers."""
    out = []
    limit = MAX_NEW_TOKENS.get(examples.inputs, DEFAULT_NEW_TOKENS)
    for example in examples.examples:
        out.append(trace(side, engine, example, limit))
        tick()
    return out


def measure(
    bundle: Bundle, engine: Engine, examples: ExampleSet, references: Sequence[Trace], tick: Tick
) -> dict[str, Any]:
    """The bundle along the float model's answers: errors of the encoders and logits, and greedy agreement."""
    errors: dict[str, list[float]] = {"vision": [], "audio": [], "logits": []}
    agreed, first, positions = 0, 0, 0
    for example, wanted in zip(examples.examples, references, strict=True):
        got = trace(bundle, engine, example, len(wanted.tokens), forced=wanted.tokens)
        for kind in ("vision", "audio"):
            pairs = zip(getattr(got, kind), getattr(wanted, kind), strict=True)
            errors[kind] += [relative_error(ours, theirs) for ours, theirs in pairs]
        errors["logits"] += [relative_error(*pair) for pair in zip(got.logits, wanted.logits, strict=True)]
        same = got.logits.argmax(axis=1) == wanted.logits.argmax(axis=1)
        agreed, first, positions = agreed + int(same.sum()), first + int(same[0]), positions + len(same)
        tick()
    report: dict[str, Any] = {
        "inputs": examples.inputs,
        "examples": [example.name for example in examples.examples],
        "positions": positions,
        "greedy_agreement": round(agreed / positions, 4),
        "first_token_agreement": round(first / len(references), 4),
    }
    for kind, values in errors.items():
        if values:
            report[f"{kind}_error"] = {"mean": _short(np.mean(values)), "worst": _short(max(values))}
    report["engine"] = engine.describe()
    return report


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; 0 when both are zero."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / norm if norm > 0 else float(np.linalg.norm(actual))


def _short(value: float) -> float:
    return float(f"{value:.3g}")
