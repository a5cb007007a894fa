"""The timing loop that every contender of the benchmark shares, whatever runs its decoder."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from crab_edge.memory import peak_bytes

#: Slow contenders stop a phase after this many seconds, with at least `_FEWEST` runs of it.
LIMIT_S = 10.0
_FEWEST = 3
_WARM = 5
_PREFILLS = 3


def report(
    step: Callable[[int], None],
    chunk: Callable[[int], None],
    *,
    context: int,
    steps: int,
    prefill: int,
    before: int,
    **facts: Any,
) -> None:
    """Times decoding and prefill and prints one JSON line.

    step(past): one token behind a cache of `past` tokens; the cache holds `context` tokens already.
    chunk(n): n tokens into an empty cache. before: peak bytes before the model was opened.
    """
    past = context
    begun = time.perf_counter()
    for _ in range(_WARM):
        step(past)
        past += 1
        if time.perf_counter() - begun > LIMIT_S:
            break
    loaded = peak_bytes() - before
    decode: list[float] = []
    while len(decode) < steps and (len(decode) < _FEWEST or sum(decode) < LIMIT_S):
        start = time.perf_counter()
        step(past)
        decode.append(time.perf_counter() - start)
        past += 1
    chunk(prefill)
    prefills: list[float] = []
    while len(prefills) < _PREFILLS and sum(prefills) < LIMIT_S:
        start = time.perf_counter()
        chunk(prefill)
        prefills.append(time.perf_counter() - start)
    line = {
        "decode_s": statistics.median(decode),
        "decode_steps": len(decode),
        "prefill_s": statistics.median(prefills),
        "loaded_bytes": loaded,
        "peak_bytes": peak_bytes(),
        **facts,
    }
    print(json.dumps(line))


def capacity(context: int, steps: int, prefill: int) -> int:
    """Tokens that a contender's cache has to hold."""
    return max(context + steps + _WARM + 1, prefill)
