"""Whether this machine can do an export, before it starts: disk and memory, by arithmetic."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from crab_edge.errors import InputError
from crab_edge.memory import available_bytes
from crab_edge.shape import ModelShape
from crab_edge.sizes import WeightRecipe, data_bytes, graph_bytes, tensors, tower_parameters

from .examples import ExampleSet
from .precision import Precision
from .reference import FULL_MOMENT_WIDTH
from .workspace import Workspace

# The interpreter with torch, transformers and ONNX Runtime; buffers of a few blocks of weights.
_PROCESS = 700_000_000
_BUFFERS = 600_000_000
_ANSWERS = 300_000_000


@dataclass(frozen=True)
class Needs:
    """Bytes: of the bundle, of the work folder beside it, and of memory at most."""

    bundle: int
    work: int
    memory: int


def recipe_of(precision: Precision) -> WeightRecipe:
    """The precision as `crab_edge.sizes` counts it."""
    return WeightRecipe(
        precision.bits,
        precision.block,
        precision.block_of(8),
        precision.experts,
        precision.adapter_bits,
        precision.head_bits,
        precision.embedding_bits,
        precision.tower_bits,
    )


def needs(shape: ModelShape, precision: Precision, whole: bool, watch: bool, examples: ExampleSet) -> Needs:
    """What an export of `shape` takes.

    The largest of: the float model (`whole`) or one layer of it in float32, a pair of linears while they are
    quantised, an encoder or the head in ONNX Runtime.
    """
    entries = tensors(shape, recipe_of(precision))
    bundle = sum(data_bytes(graph) for graph in entries.values()) + 10_000_000
    layer = 4 * (shape.layer_parameters + shape.layer_adapter_parameters)
    linear = 4 * shape.intermediate * shape.hidden
    # Two linears of a group as float32, and while one is quantised its codes and the error's copies.
    writing = 2 * linear + linear
    running = max(
        _loaded(graph_bytes(entries["vision"])),
        _loaded(graph_bytes(entries["audio"])),
        _loaded(graph_bytes(entries["decoder"][-2:])),
    )
    prompts = len(examples.examples)
    # Hidden states of all prompts in and out, a thousand tokens each as a rule.
    states = 2 * prompts * 1000 * shape.hidden * 4
    peak = max(layer + states, writing, running + states)
    work = 2 * states + 64_000_000
    if watch:
        width = min(max(shape.hidden, shape.heads * shape.head_dim), FULL_MOMENT_WIDTH["layers"])
        # Six of a layer's linears keep x x^T; error feedback turns one to float64, inverts and factors it.
        moments = 6 * 4 * width**2
        peak = max(peak, layer + states + moments, writing + linear + 6 * 8 * width**2)
        work += moments
    if whole:
        parameters = shape.decoder_parameters + sum(tower_parameters(shape).values())
        model = 4 * (parameters + shape.layers * shape.layer_adapter_parameters)
        decoder = _loaded(graph_bytes(entries["decoder"]))
        peak = max(peak, model + states, running + decoder) + _ANSWERS
    return Needs(bundle, work, peak + _PROCESS + _BUFFERS)


def _loaded(kinds: dict[str, int]) -> int:
    """What ONNX Runtime holds of a graph: the packed copy, block sums as large as scales, mapped scales."""
    return kinds.get("codes", 0) + 3 * kinds.get("scales", 0) + kinds.get("float", 0)


def check(need: Needs, work: Workspace) -> None:
    """Raises InputError when the disk of `work` or the memory is too small, saying how much is needed."""
    done = _size(work.folder)
    free = shutil.disk_usage(work.folder).free
    missing = need.bundle + need.work - done
    if missing > free:
        raise InputError(
            f"{work.folder.parent}: the export needs {missing / 1e9:.2f} GB of disk (the bundle "
            f"{need.bundle / 1e9:.2f}, the work beside it {need.work / 1e9:.2f}, {done / 1e9:.2f} there), "
            f"but {free / 1e9:.2f} GB are free; make room or choose another --out"
        )
    memory = available_bytes()
    if memory is not None and need.memory > memory:
        raise InputError(
            f"the export needs about {need.memory / 1e9:.2f} GB of memory, but {memory / 1e9:.2f} GB are "
            "available; close other programs, use --method rtn --compare layers, or a machine with more"
        )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
