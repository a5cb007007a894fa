"""Who takes part in `bench --gpu`: the official formula, the torch engine in its forms, and what fits into
memory; each compared with the reference before it may be timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from crab_edge_apps import _bench_gpu_bars as judging
from crab_edge_apps import _bench_gpu_timing as timing
from crab_edge_apps._bench_gpu_card import Card
from crab_edge_apps._bench_gpu_decoder import Decoder
from crab_edge_apps._bench_gpu_kernels import (
    EngineDecoder,
    KernelGroup,
    KernelHead,
    check_layout,
    kernel_bytes,
)
from crab_edge_apps._bench_gpu_official import FloatHead, OfficialGroup, official_bytes, relative_error
from crab_edge_apps._bench_gpu_parts import Inputs, Outputs, Part, decoder_parts, group_parts, kernel_parts
from crab_edge_apps._bench_gpu_weights import RandomModel

from crab_edge.errors import DependencyError

# What a contender may need besides its weights: caches, activations, the compiler's scratch.
_SPARE_BYTES = 1_500_000_000
Progress = Callable[[str, int, int], None]


@dataclass
class Contender:
    """A decoder and the names of its rows without and with a CUDA graph; None: not timed like that."""

    decoder: Any
    model: RandomModel
    eager: str | None
    graph: str

    @property
    def engine(self) -> bool:
        """Whether it is the torch engine's own decoder, whose products can be timed by themselves."""
        return isinstance(self.decoder, EngineDecoder)


@dataclass
class Entry:
    """One row to be; base: the same part of the decoder without adapters."""

    part: Part
    timed: timing.Timed
    error: float
    base: Entry | None = None


@dataclass
class Field:
    """What all contenders of one shape share, and who fell out: `skipped` (not run) and `wrong`, with why."""

    inputs: Inputs
    card: Card
    progress: Progress
    skipped: dict[str, str]
    wrong: dict[str, str]

    def __post_init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle() if self.card.real else None


def contenders(models: Sequence[RandomModel], bare: RandomModel, field: Field) -> list[Contender]:
    """Decoders that fit into memory, the ones that the bars need first.

    models: by form, the first is the one that is judged; bare: the decoder without adapters.
    """
    check_layout(field.card.device)
    dtype, slots = field.inputs.dtype, field.inputs.slots

    def official(model: RandomModel) -> Decoder:
        return Decoder(
            model,
            lambda layer, group: OfficialGroup(model, model.group(layer, group), dtype),
            lambda rows: FloatHead(model.head(rows), dtype),
            dtype,
            slots,
        )

    def engine(model: RandomModel) -> EngineDecoder:
        return EngineDecoder(model, dtype, slots)

    first, *others = models
    wanted: list[tuple[RandomModel, Callable[[RandomModel], Any], int, str, str]] = [
        (bare, engine, kernel_bytes(bare), judging.BASE_EAGER, judging.BASE),
        (first, engine, kernel_bytes(first), *judging.engine(first.experts)),
        (first, official, official_bytes(first), judging.OFFICIAL_EAGER, judging.OFFICIAL_GRAPH),
        *((model, engine, kernel_bytes(model), *judging.engine(model.experts)) for model in others),
    ]
    made = []
    for i, (model, build, size, eager, graph) in enumerate(wanted):
        field.progress(f"weights: {graph}", i, len(wanted))
        needed, free = size + (_SPARE_BYTES if field.card.real else 0), field.card.free_bytes()
        if needed > free:
            field.skipped[graph] = f"needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} are free"
            continue
        try:
            made.append(Contender(build(model), model, eager, graph))
        except torch.OutOfMemoryError:
            field.skipped[graph] = f"ran out of memory at {size / 1e9:.1f} GB of weights"
            release(field.card)
    held = next((one.decoder for one in made if one.engine and one.model is first), None)
    if held is not None:
        # The engine's weights between the official decoder's other parts, compiled like them.
        both = Decoder(
            first,
            lambda layer, group: KernelGroup(held.groups(group)[layer]),
            lambda rows: KernelHead(first.head(rows)),
            dtype,
            slots,
        )
        made.append(Contender(both, first, None, judging.compiled(first.experts)))
    return made


def entries(found: Sequence[Contender], field: Field) -> list[Entry]:
    """Everything to time, each compared with the reference on the very call that will be timed."""
    made: list[Entry] = []
    for i, one in enumerate(found):
        for graph in (False, True):
            name = one.graph if graph else one.eager
            if name is None:
                continue
            parts = [*decoder_parts(one.decoder, one.model, field.inputs, compiled=graph)]
            if one.eager is not None:
                parts += group_parts(one.decoder, one.model, field.inputs, compiled=graph)
            if one.engine and graph:
                # By themselves, products and routes matter only as a step has them: in a graph.
                parts += kernel_parts(one.decoder, one.model, field.inputs)
            for part in parts:
                field.progress(f"{name}: {part.name}", i, len(found))
                entry = _entry(name, part, one.model, graph, field)
                if entry is not None:
                    made.append(entry)
    bases = {(entry.timed.name, entry.part.name): entry for entry in made}
    for one in found:
        if one.engine and one.model.experts is not None:
            for entry in made:
                if entry.timed.name in (one.eager, one.graph):
                    base = judging.BASE if entry.timed.name == one.graph else judging.BASE_EAGER
                    entry.base = bases.get((base, entry.part.name))
    return made


def _entry(name: str, part: Part, model: RandomModel, graph: bool, field: Field) -> Entry | None:
    label = f"{name}, {part.name}"
    try:
        run = timing.graphed(part.run, field.card, field.pool) if graph else part.run
        # Twice: what a first call leaves behind mustn't change the second one's answer.
        run()
        outputs = [y.float() for y in run()]
        error = worst(outputs, field.inputs.answers(model, part.name, part.expected))
    except torch.OutOfMemoryError:
        field.skipped[label] = "ran out of memory"
        release(field.card)
        return None
    except DependencyError:
        raise
    except Exception as problem:
        # A kernel that doesn't compile or launch: the others are still worth their figures.
        field.wrong[label] = reason(problem)
        return None
    if error > part.tolerance:
        field.wrong[label] = (
            f"relative error {error:.2g} against the float32 reference, "
            f"at most {part.tolerance:g} is rounding"
        )
        return None
    return Entry(part, timing.Timed(name, run), error)


def reason(problem: Exception) -> str:
    """A failure in one line: its type and its first line."""
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:300]}"


def worst(outputs: Outputs, expected: Outputs) -> float:
    """The largest relative error of any output; infinity where shapes differ."""
    if [y.shape for y in outputs] != [y.shape for y in expected]:
        return float("inf")
    return max(relative_error(y, right) for y, right in zip(outputs, expected, strict=True))


def release(card: Card) -> None:
    """Gives back the memory of what nobody refers to any more."""
    gc.collect()
    if card.real:
        torch.cuda.empty_cache()
