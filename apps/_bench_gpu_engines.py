"""A bundle's decoder through every engine that can run it on this GPU, as a session calls it.

What the random decoders of `_bench_gpu` leave out: TensorRT, ONNX Runtime on the GPU, and the way of logits
to the host. An engine that can't run is named with its own reason; one that answers otherwise than the exact
products on the CPU is wrong and not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from crab_edge_apps import _bench_gpu_bars as judging

from crab_edge import engines
from crab_edge.bundle import Bundle
from crab_edge.errors import CrabError

if TYPE_CHECKING:
    from crab_edge_apps._bench_gpu_card import Card
    from numpy.typing import NDArray

ON_GPU = ("torch", "tensorrt", "onnxruntime:cuda", "onnxruntime:tensorrt-rtx")
#: On the CPU the benchmark can only be tried.
DRY = ("torch", "onnxruntime", "tensorrt")
#: ||logits - exact|| / ||exact|| that activations of 16 bits, or of 8 on a CPU, may cost.
TOLERANCE = 0.1
# A prompt to compare on: the exact products on the CPU are slow.
_CHECKED = 16
_CALLS, _STEPS = 3, 20
Progress = Callable[[str, int, int], None]


@dataclass
class _Runner:
    name: str
    engine: engines.Engine
    error: float
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def measure(
    bundle: Bundle, card: Card, *, rounds: int, context: int, prefill: int, progress: Progress
) -> dict[str, Any]:
    """`rows`, two for each engine, and by name why engines were `skipped` or are `wrong`."""
    tokens = max(context, prefill) + 1
    embeds, positions = _tokens(bundle, tokens)
    exact = engines.create("torch", bundle, device="cpu", dtype="float32")
    right = _answers(exact, embeds, positions)
    del exact
    skipped: dict[str, str] = {}
    wrong: dict[str, str] = {}
    runners: list[_Runner] = []
    wanted = ON_GPU if card.real else DRY
    for i, name in enumerate(wanted):
        progress(f"{bundle.identity}: {name}", i, len(wanted))
        options: Mapping[str, Any] = {"device": str(card.device)} if name == "torch" else {}
        try:
            engine = engines.create(name, bundle, **options)
            error = _worst(_answers(engine, embeds, positions), right)
            _decode(engine, embeds, positions, context)
        except CrabError as refusal:
            skipped[name] = str(refusal)
            continue
        if not error <= TOLERANCE:
            wrong[name] = (
                f"relative error {error:.2g} against exact products, at most {TOLERANCE:g} is rounding"
            )
            continue
        runners.append(_Runner(name, engine, error))
    for turn in range(rounds):
        for one in runners if turn % 2 == 0 else runners[::-1]:
            progress(f"{bundle.identity}: {one.name}", turn, rounds)
            one.prefill.append(_prefill(one.engine, embeds, positions, prefill))
            one.decode.append(_decode(one.engine, embeds, positions, context))
    rows = [_row(part, one) for part in ("decode", "prefill") for one in runners]
    return {
        "bundle": bundle.identity,
        "context": context,
        "prefill": prefill,
        "rounds": rounds,
        "rows": rows,
        "skipped": skipped,
        "wrong": wrong,
    }


def show(result: Mapping[str, Any]) -> None:
    """The comparison as a table for the terminal."""
    from rich.table import Table

    console = judging.console()
    table = Table(
        title=f"{result['bundle']}: decode at {result['context']}, prefill {result['prefill']}; medians of "
        f"{result['rounds']} interleaved rounds, logits on the host"
    )
    for column in ("", "", "ms", "spread", "tokens/s", "error"):
        table.add_column(column, justify="right" if column else "left")
    for entry in result["rows"]:
        low, high = entry["spread"]
        tokens = 1 if entry["part"] == "decode" else result["prefill"]
        table.add_row(
            entry["part"],
            f"{entry['contender']} ({entry['engine'].get('provider', '')})",
            f"{1e3 * entry['seconds']:.2f}",
            f"{1e3 * low:.2f} to {1e3 * high:.2f}",
            f"{tokens / entry['seconds']:.1f}",
            f"{entry['error']:.1e}",
        )
    console.print(table)
    for name, why in result["skipped"].items():
        console.print(f"not run: {name}: {why}")
    for name, why in result["wrong"].items():
        console.print(f"WRONG, not timed: {name}: {why}")


def _row(part: str, one: _Runner) -> dict[str, Any]:
    rounds: list[float] = getattr(one, part)
    return {
        "part": part,
        "contender": one.name,
        "seconds": statistics.median(rounds),
        "spread": [min(rounds), max(rounds)],
        "rounds": rounds,
        "error": one.error,
        "engine": one.engine.describe(),
    }


def _tokens(bundle: Bundle, count: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Embeddings float32 [1, count, H] of random tokens, and their positions int64 [3, 1, count]."""
    vocabulary = bundle.manifest.model.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, count)
    positions = np.broadcast_to(np.arange(count, dtype=np.int64), (3, 1, count))
    return bundle.embedding.rows(ids)[None], np.ascontiguousarray(positions)


def _answers(
    engine: engines.Engine, embeds: NDArray[np.float32], positions: NDArray[np.int64]
) -> list[NDArray[np.float32]]:
    """Logits behind a short prompt, and behind one token more."""
    count = min(_CHECKED, embeds.shape[1] - 1)
    engine.rewind(0)
    first = engine.forward(embeds[:, :count], positions[:, :, :count]).copy()
    second = engine.forward(embeds[:, count : count + 1], positions[:, :, count : count + 1]).copy()
    return [first, second]


def _worst(found: list[NDArray[np.float32]], right: list[NDArray[np.float32]]) -> float:
    return max(
        float(np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact))
        for y, exact in zip(found, right, strict=True)
    )


def _prefill(
    engine: engines.Engine, embeds: NDArray[np.float32], positions: NDArray[np.int64], tokens: int
) -> float:
    """Seconds of a prompt into an empty cache: the median of a few."""
    found = []
    for _ in range(_CALLS):
        engine.rewind(0)
        start = time.perf_counter()
        engine.forward(embeds[:, :tokens], positions[:, :, :tokens])
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _decode(
    engine: engines.Engine, embeds: NDArray[np.float32], positions: NDArray[np.int64], context: int
) -> float:
    """Seconds of one token behind `context` others: the median of several."""
    engine.rewind(0)
    engine.forward(embeds[:, :context], positions[:, :, :context])
    found = []
    for _ in range(_STEPS):
        engine.rewind(context)
        start = time.perf_counter()
        engine.forward(embeds[:, context : context + 1], positions[:, :, context : context + 1])
        found.append(time.perf_counter() - start)
    return statistics.median(found)
