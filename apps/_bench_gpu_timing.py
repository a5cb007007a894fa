"""Timing on a GPU: events around each call, CUDA graphs, contenders that take turns.

Every contender is a function without arguments that launches its work and reads nothing back. What it reads
must be larger than the card's L2, or the figures are the cache's: `_bench_gpu_parts` sees to that by passing
all layers, each with its own bytes.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crab_edge_apps._bench_gpu_card import Card

Run = Callable[[], Any]
# Calls before a graph is captured or a round is timed: compilation, caches, clocks.
WARM = 3
# A round of one contender lasts about this long, within the limits on its calls.
ROUND_S = 0.15
FEWEST, MOST = 3, 200


@dataclass
class Timed:
    """One contender: its name, its function, and what is known of it; `seconds` gets a median a round."""

    name: str
    run: Run
    facts: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds a call: the median over rounds."""
        return statistics.median(self.seconds)


def graphed(run: Run, card: Card, pool: Any = None) -> Run:
    """`run` recorded into a CUDA graph: calling the result replays it. On the CPU, `run` itself.

    `run` must be capturable: fixed shapes, fixed addresses, nothing read back to the host. Graphs of one
    `pool` share their scratch memory: outputs hold until another one is replayed.
    """
    if not card.real:
        return run
    import torch

    stream = torch.cuda.Stream(card.device)
    stream.wait_stream(torch.cuda.current_stream(card.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream(card.device).wait_stream(stream)
    card.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        kept = run()

    def replay() -> Any:
        graph.replay()
        # The same tensors at every call: a graph writes to the addresses that it was recorded with.
        return kept

    return replay


def seconds_per_call(run: Run, calls: int, card: Card) -> list[float]:
    """Seconds of each of `calls` calls: between two events on the device, by the host's clock on a CPU."""
    if not card.real:
        found = []
        for _ in range(calls):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found
    import torch

    marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    card.synchronize()
    return [first.elapsed_time(then) / 1e3 for first, then in itertools.pairwise(marks)]


def measure(
    contenders: Sequence[Timed],
    rounds: int,
    card: Card,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> None:
    """Fills `seconds` of every contender: `rounds` rounds, every other one backwards.

    How many calls a round has is settled by a first, untimed one, so that quick and slow contenders get about
    the same time and a drifting clock favours nobody.
    """
    import torch

    of, done = len(contenders) * rounds, 0
    with torch.inference_mode():
        for one in contenders:
            for _ in range(WARM if card.real else 1):
                one.run()
            card.synchronize()
            if one.calls == 0:
                once = statistics.median(seconds_per_call(one.run, FEWEST if card.real else 1, card))
                one.calls = max(FEWEST, min(MOST, round(ROUND_S / max(once, 1e-9)))) if card.real else 1
        for turn in range(rounds):
            for one in contenders if turn % 2 == 0 else contenders[::-1]:
                progress(one.name, done, of)
                # What ran before has left its own weights in L2 and the clocks where they suited it.
                one.run()
                one.seconds.append(statistics.median(seconds_per_call(one.run, one.calls, card)))
                done += 1
    progress("done", of, of)
