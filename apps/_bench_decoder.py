"""Random decoders for benchmarks: the exporter's own graphs, every layer with its own bytes, nothing trained.

ONNX Runtime keeps one packed copy of byte-identical weights, so a decoder that repeats a layer would sit in
the cache and look faster than it is.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from crab_edge_calibration import QuantisationReport
from crab_edge_export.decoder import DecoderExporter, decoder_widths
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.linear import LinearWriter
from crab_edge_export.precision import KVType, Precision, choose
from crab_edge_export.weights import Adapter, Linear
from numpy.typing import NDArray

from crab_edge.lowbit import QTensor


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of a Qwen2-style decoder and of its I-LoRA."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int
    experts: int = 3

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of a layer's seven linears, in the layer's order."""
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (inner, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, inner),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def parameters(self) -> int:
        """Parameters that a decode step reads: linears, biases, norms, adapters and the head."""
        linears = self.linears().values()
        bias = (self.heads + 2 * self.kv_heads) * self.head_dim
        adapters = sum(self.rank * (k + self.experts * n) + self.experts * k for n, k in linears)
        layer = sum(n * k for n, k in linears) + bias + 2 * self.hidden + (adapters if self.rank else 0)
        return self.layers * layer + self.hidden + self.vocab * self.hidden

    def config(self) -> Any:
        """What the exporter reads of transformers' text config."""
        half = self.head_dim // 2
        return SimpleNamespace(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            hidden_act="silu",
            layer_types=None,
            rms_norm_eps=1e-6,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8],
            },
        )


SHAPES = {
    shape.name: shape
    for shape in (
        DecoderShape("nano", 256, 768, 6, 4, 2, 64, 2048, 32),
        # Small vocabulary on purpose: a large head would hide the adapters' share of the bytes.
        DecoderShape("0.5b", 896, 4864, 24, 14, 2, 64, 4096, 32),
        DecoderShape("1.5b", 1536, 8960, 28, 12, 2, 128, 4096, 64),
        # The decoders of Qwen2.5-Omni, with Crab+'s rank.
        DecoderShape("3b", 2048, 11008, 36, 16, 2, 128, 4096, 128),
        DecoderShape("7b", 3584, 18944, 28, 28, 4, 128, 4096, 128),
    )
}


class RandomWeights:
    """Stands in for the exporter's weight store: right shapes, no float memory behind the linears."""

    def __init__(self, shape: DecoderShape, adapters: bool) -> None:
        self.shape, self.adapters = shape, adapters

    def __contains__(self, name: str) -> bool:
        return name == "lm_head.weight"

    def array(self, name: str) -> NDArray[np.float32]:
        """Norm weights: ones."""
        return np.ones(self.shape.hidden, np.float32)

    def linear(self, path: str) -> Linear:
        """The linear at `path`: a shape to quantise, a random bias where Qwen2 has one."""
        s = self.shape
        kind = path.rsplit(".", 1)[-1]
        n, k = {**s.linears(), "lm_head": (s.vocab, s.hidden)}[kind]
        bias = _rng(path).normal(0, 0.02, n).astype(np.float32) if kind[:2] in ("q_", "k_", "v_") else None
        adapter = None
        if self.adapters and kind != "lm_head":
            adapter = Adapter(_empty(s.rank, k), _empty(s.experts, k), _empty(n, s.rank * s.experts))
        return Linear(path, _empty(n, k), bias, adapter)


class RandomLinears(LinearWriter):
    """Writes random codes and scales instead of rounding weights."""

    def _quantise(self, name: str, weight: Any, bits: int, energy: Any) -> QTensor:
        return _random_tensor(name, weight.shape, bits, self.precision.block)

    def head(self, x: str, weights: Any, name: str, out: str, *, bits: int) -> str:
        return self.plain(x, weights.linear(name), out, bits=bits)

    def _planes(self, name: str, up: Any, count: int) -> list[QTensor]:
        bits, block = self.precision.bits, self.precision.block
        return [_random_tensor(f"{name}.{i}", up.shape, bits, block) for i in range(count)]


def write_decoder(
    shape: DecoderShape,
    path: Path,
    *,
    adapters: bool,
    experts: str,
    block: int,
    accuracy_level: int,
    bits: int = 4,
    kv_dtype: KVType = "float32",
) -> None:
    """One random low-bit decoder graph at `path`, weights beside it.

    experts: as in the exporter, "auto" included. Raises InputError for what the shape doesn't allow.
    """
    precision = precision_of(
        shape,
        experts if adapters else "auto",
        block=block,
        accuracy_level=accuracy_level,
        bits=bits,
        kv_dtype=kv_dtype,
    )
    builder = GraphBuilder("decoder", path.with_suffix(".data"))
    writer = RandomLinears(builder, precision, QuantisationReport())
    DecoderExporter(builder, writer, RandomWeights(shape, adapters), shape.config(), precision).write()
    builder.save(path)


def precision_of(
    shape: DecoderShape,
    experts: str,
    *,
    block: int,
    accuracy_level: int = 4,
    bits: int = 4,
    kv_dtype: KVType = "float32",
) -> Precision:
    """The exporter's precision for this shape; InputError when `experts` can't be stored that way."""
    # A single plane stands last in the joined weight, so it may end inside a block.
    ranks = 0 if experts == "plane4" else shape.rank * shape.experts
    return choose(
        bits,
        decoder_widths(shape.config(), ranks),
        block=block,
        accuracy_level=accuracy_level,
        experts=experts,
        kv_dtype=kv_dtype,
    )


def weight_bytes(path: Path) -> int:
    """Bytes of weights that a decode step reads: all initializers of the graph, scales included."""
    import onnx
    from onnx import helper

    model = onnx.load(str(path), load_external_data=False)
    return sum(
        int(np.prod(t.dims, dtype=np.int64)) * np.dtype(helper.tensor_dtype_to_np_dtype(t.data_type)).itemsize
        for t in model.graph.initializer
    )


def node_count(path: Path) -> int:
    """Nodes after ONNX Runtime inlined and optimised the graph."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    # The extended level merges nodes; the one above it only changes memory layouts.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.add_session_config_entry("session.disable_prepacking", "1")
    optimised = path.with_name(f"{path.stem}.optimised.onnx")
    options.optimized_model_filepath = str(optimised)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    count = len(onnx.load(str(optimised), load_external_data=False).graph.node)
    optimised.unlink()
    return count


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _empty(*shape: int) -> NDArray[np.float32]:
    return np.broadcast_to(np.float32(0), shape)


def _random_tensor(name: str, shape: tuple[int, int], bits: int, block: int) -> QTensor:
    n, k = shape
    blocks = -(-k // block)
    rng = _rng(name)
    codes = np.frombuffer(rng.bytes(n * blocks * block * bits // 8), np.uint8)
    # Codes are uniform: their standard deviation is 2^bits / sqrt(12), and outputs should stay near 1.
    scale = np.sqrt(12.0 / k) / 2**bits
    scales = (scale * rng.uniform(0.9, 1.1, (n, blocks))).astype(np.float32)
    return QTensor(codes.reshape(n, blocks, -1), scales, bits, block, shape)
