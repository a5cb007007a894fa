"""The decoder of a bundle as the benchmark sees it: its sizes and its recipe, read from its own graph."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge_apps._bench_decoder import DecoderShape
from crab_edge_export.decoder import ROOT

from crab_edge.bundle import Bundle
from crab_edge.errors import InputError
from crab_edge.manifest import COPY_AGAIN, Recipe


@dataclass(frozen=True)
class BundleDecoder:
    """A bundle's decoder: where it is, its shape (rank 0 without an adapter) and how it is stored.

    `plain_linears` of its linears carry no adapter, though the bundle has one.
    """

    identity: str
    graph: Path
    shape: DecoderShape
    recipe: Recipe
    plain_linears: int = 0


def open_decoder(path: Path) -> BundleDecoder:
    """Reads the bundle at `path`. Raises BundleError for a bad bundle, InputError for float graphs."""
    import onnx

    bundle = Bundle.open(path)
    model, recipe = bundle.manifest.model, bundle.manifest.recipe
    if recipe.bits == 32:
        raise InputError(
            f"{path}: its graphs are float (recipe {recipe.name}), and bench compares low-bit decoders; "
            "give a bundle exported with --bits 4 or 8"
        )
    graph = onnx.load(str(bundle.graph("decoder")), load_external_data=False).graph
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    gate = sizes.get(f"{ROOT}.layers.0.mlp.gate_proj.weight")
    attention = next((node for node in graph.node if node.op_type == "GroupQueryAttention"), None)
    if gate is None or attention is None:
        raise InputError(f"{path}: its decoder has no layer that bench knows; {COPY_AGAIN}")
    adapter = model.adapter
    shape = DecoderShape(
        model.name,
        model.hidden_size,
        gate[0],
        model.layers,
        _attribute(attention, "num_heads"),
        model.kv_heads,
        model.head_dim,
        model.vocab_size,
        adapter.rank if adapter else 0,
        adapter.experts if adapter else 0,
    )
    routed = sum(_attribute(node, "groups") for node in graph.node if node.op_type == "ILoRARoute")
    plain = model.layers * len(shape.linears()) - routed if adapter else 0
    return BundleDecoder(bundle.identity, bundle.graph("decoder"), shape, recipe, plain)


def _attribute(node: Any, name: str) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == name)
