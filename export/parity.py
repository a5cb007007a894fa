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

    from .prompts import Prompt

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
    same = []
    for example, wanted in zip(examples.examples, references, strict=True):
        got = trace(bundle, engine, example, len(wanted.tokens), forced=wanted.tokens)
        for kind in ("vision", "audio"):
            pairs = zip(getattr(got, kind), getattr(wanted, kind), strict=True)
            errors[kind] += [relative_error(ours, theirs) for ours, theirs in pairs]
        errors["logits"] += [relative_error(*pair) for pair in zip(got.logits, wanted.logits, strict=True)]
        same.append(got.logits.argmax(axis=1) == wanted.logits.argmax(axis=1))
        tick()
    names = [example.name for example in examples.examples]
    report = _report(names, examples.inputs, same, errors, answer=0)
    report["compared"] = "whole, on the float model's own answers"
    report["engine"] = engine.describe()
    return report


def _report(
    names: Sequence[str],
    inputs: str,
    same: list[NDArray[np.bool_]],
    errors: dict[str, list[float]],
    answer: int,
) -> dict[str, Any]:
    """same: by prompt and position, whether the likeliest tokens are the same; answer: the position that
    chooses the answer's first token.
    """
    positions = sum(len(row) for row in same)
    report: dict[str, Any] = {
        "inputs": inputs,
        "examples": list(names),
        "positions": positions,
        "greedy_agreement": round(sum(int(row.sum()) for row in same) / positions, 4),
        "first_token_agreement": round(sum(int(row[answer]) for row in same) / len(same), 4),
    }
    for kind, values in errors.items():
        if values:
            report[f"{kind}_error"] = {"mean": _short(np.mean(values)), "worst": _short(max(values))}
    return report


def trace_arrays(traces: Sequence[Trace]) -> dict[str, NDArray[Any]]:
    """Traces as named arrays, for a file."""
    out: dict[str, NDArray[Any]] = {}
    for i, entry in enumerate(traces):
        out[f"{i}.tokens"], out[f"{i}.logits"] = np.array(entry.tokens, np.int64), entry.logits
        for kind in ("vision", "audio"):
            out |= {f"{i}.{kind}.{j}": rows for j, rows in enumerate(getattr(entry, kind))}
    return out


def traces_of(arrays: dict[str, NDArray[Any]], count: int) -> list[Trace]:
    """The reverse of `trace_arrays`."""

    def rows(prefix: str) -> tuple[NDArray[np.float32], ...]:
        return tuple(arrays[f"{prefix}{j}"] for j in range(sum(n.startswith(prefix) for n in arrays)))

    return [
        Trace(
            rows(f"{i}.vision."),
            rows(f"{i}.audio."),
            tuple(int(token) for token in arrays[f"{i}.tokens"]),
            arrays[f"{i}.logits"],
        )
        for i in range(count)
    ]


def along_prompts(
    names: Sequence[str],
    inputs: str,
    prompts: tuple[Sequence[Prompt], Sequence[Prompt]],
    logits: tuple[Sequence[NDArray[np.float32]], Sequence[NDArray[np.float32]]],
    layers: Sequence[float],
) -> dict[str, Any]:
    """The report of a model that was run layer by layer: (bundle's, float model's) prompts and logits.

    No answers were generated. Logits are compared where the question's own text stands; the last of its
    tokens chooses the answer's first. layers: mean error of the hidden states behind each layer.
    """
    errors: dict[str, list[float]] = {"vision": [], "audio": [], "logits": []}
    for ours, theirs in zip(*prompts, strict=True):
        for kind in ("vision", "audio"):
            pairs = zip(getattr(ours, kind), getattr(theirs, kind), strict=True)
            errors[kind] += [relative_error(*pair) for pair in pairs]
    same = []
    for ours_, theirs_ in zip(*logits, strict=True):
        errors["logits"] += [relative_error(*pair) for pair in zip(ours_, theirs_, strict=True)]
        same.append(ours_.argmax(axis=1) == theirs_.argmax(axis=1))
    report = _report(names, inputs, same, errors, answer=-1)
    report["compared"] = "layer by layer, on the questions' own text; no answers were generated"
    report["layer_error"] = [_short(value) for value in layers]
    return report


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; 0 when both are zero."""
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(actual - expected)) / norm if norm > 0 else float(np.linalg.norm(actual))


def _short(value: float) -> float:
    return float(f"{value:.3g}")
