"""The audio encoder on chunks of two seconds: `mel` [C, n_mels, 200] and `lengths` [C] -> `embeddings` [n,
H].

Attention stays inside a chunk, so chunks are a batch; frames past a chunk's length are masked as keys, and
the tokens they'd make are dropped at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import ModelError

from .graph import FLOAT, INT32, INT64, MICROSOFT, GraphBuilder
from .linear import LinearWriter, Tick
from .weights import WeightStore

ROOT = "audio_tower"
_EPSILON = 1e-5


def sinusoids(length: int, channels: int) -> NDArray[np.float32]:
    """float32 [length, channels]: sines, then cosines, of timescales 1 .. 10,000 (Whisper's)."""
    step = np.log(10000) / (channels // 2 - 1)
    scales = np.exp(-step * np.arange(channels // 2, dtype=np.float32)).astype(np.float32)
    angles = np.arange(length, dtype=np.float32)[:, None] * scales
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class AudioExporter:
    """Writes the audio encoder of `weights` into `graph`; `config` is the thinker's audio config."""

    def __init__(self, graph: GraphBuilder, linears: LinearWriter, weights: WeightStore, config: Any) -> None:
        if config.activation_function != "gelu":
            raise ModelError(
                f"the audio activation is {config.activation_function!r}; only 'gelu' can be exported"
            )
        self.graph = graph
        self.linears = linears
        self.weights = weights
        self.config = config
        self.frames = 2 * config.n_window
        self.states = config.n_window
        self.tokens = config.n_window // 2
        if self.states % 2:
            raise ModelError(
                f"a chunk of {self.states} states can't be averaged in pairs; n_window must be even"
            )

    def write(self, tick: Tick = lambda: None) -> None:
        """All nodes, inputs and output."""
        for _, make in self.units():
            make()
            tick()

    def units(self) -> list[tuple[str, Callable[[], None]]]:
        """The graph in steps; see `DecoderExporter.units`."""
        layers = [(f"layer {i}", partial(self._layer, i)) for i in range(self.config.encoder_layers)]
        return [("start", self._start), *layers, ("pooling", self._pool)]

    def _start(self) -> None:
        graph, config = self.graph, self.config
        graph.input("mel", FLOAT, ["chunks", config.num_mel_bins, self.frames])
        graph.input("lengths", INT64, ["chunks"])
        graph.output("embeddings", FLOAT, ["tokens", config.output_dim])
        # (lengths + 1) // 2 frames survive the second convolution, half of them as tokens.
        lengths = graph.reshape("lengths", [-1, 1], f"{ROOT}.lengths")
        kept = graph.node("Add", [lengths, graph.constant([1])], f"{ROOT}.kept.twice")
        kept = graph.node("Div", [kept, graph.constant([2])], f"{ROOT}.kept")
        tokens = graph.node("Div", [kept, graph.constant([2])], f"{ROOT}.kept_tokens")
        frame_mask = self._below(self.frames, lengths, f"{ROOT}.frame_mask")
        self._below(self.states, kept, f"{ROOT}.key_mask", INT32)
        self._below(self.tokens, tokens, f"{ROOT}.token_mask")
        self._convolutions(frame_mask)

    def carried(self, i: int) -> str:
        """What layer i reads: the states [C, 100, d_model] that the layers before it left."""
        return f"{ROOT}.layers.{i - 1}.residual" if i else f"{ROOT}.embedded"

    def _pool(self) -> None:
        graph, config = self.graph, self.config
        x = self.carried(config.encoder_layers)
        x = graph.reshape(x, [0, self.tokens, 2, config.d_model], f"{ROOT}.pairs")
        x = graph.node("ReduceMean", [x, graph.constant([2])], f"{ROOT}.avg_pooler", keepdims=0)
        x = self._linear(self._norm(x, "ln_post"), "proj")
        self._drop_padding(x, f"{ROOT}.token_mask")

    def _below(self, count: int, lengths: str, out: str, kind: int = FLOAT) -> str:
        """[C, count] of `kind`: 1 where the position is below the chunk's length, else 0."""
        graph = self.graph
        places = graph.constant(np.arange(count)[None])
        inside = graph.node("Less", [places, lengths], f"{out}.bool")
        return graph.node("Cast", [inside], out, to=kind)

    def _convolutions(self, frame_mask: str) -> None:
        graph = self.graph
        x = self._convolution("mel", "conv1", 1)
        mask = graph.reshape(frame_mask, [0, 1, self.frames], f"{ROOT}.frame_mask.column")
        x = graph.node("Mul", [x, mask], f"{ROOT}.conv1.masked")
        x = self._convolution(x, "conv2", 2)
        x = graph.node("Transpose", [x], f"{ROOT}.by_time", perm=[0, 2, 1])
        table = graph.weight(f"{ROOT}.positional_embedding", sinusoids(self.states, self.config.d_model))
        graph.node("Add", [x, table], self.carried(0))

    def _convolution(self, x: str, path: str, stride: int) -> str:
        """Kernel 3, padding 1, then GELU. Convolutions stay float."""
        graph, name = self.graph, f"{ROOT}.{path}"
        weights = [
            graph.weight(f"{name}.{part}", self.weights.array(f"{name}.{part}"))
            for part in ("weight", "bias")
        ]
        graph.node("Conv", [x, *weights], name, kernel_shape=[3], pads=[1, 1], strides=[stride])
        return graph.node("Gelu", [name], f"{name}.gelu")

    def _layer(self, i: int) -> None:
        path, x = f"layers.{i}", self.carried(i)
        graph, full = self.graph, f"{ROOT}.{path}"
        normed = self._norm(x, f"{path}.self_attn_layer_norm")
        names = [f"{full}.self_attn.{part}_proj" for part in "qkv"]
        self.linears.group(f"{full}.self_attn.qkv", normed, [self.weights.linear(n) for n in names], names)
        mixed = graph.node(
            "MultiHeadAttention",
            [*names, "", f"{ROOT}.key_mask"],
            f"{full}.self_attn.attention",
            domain=MICROSOFT,
            num_heads=self.config.encoder_attention_heads,
            scale=(self.config.d_model // self.config.encoder_attention_heads) ** -0.5,
        )
        mixed = self._linear(mixed, f"{path}.self_attn.out_proj")
        x = graph.node("Add", [x, mixed], f"{full}.self_attn.residual")
        hidden = self._linear(self._norm(x, f"{path}.final_layer_norm"), f"{path}.fc1")
        hidden = graph.node("Gelu", [hidden], f"{full}.activation_fn")
        graph.node("Add", [x, self._linear(hidden, f"{path}.fc2")], f"{full}.residual")

    def _drop_padding(self, x: str, mask: str) -> None:
        """Keeps the rows [C, tokens] whose mask is 1, in order."""
        graph = self.graph
        rows = graph.reshape(x, [-1, self.config.output_dim], f"{ROOT}.rows")
        flat = graph.reshape(mask, [-1], f"{ROOT}.token_mask.flat")
        kept = graph.node("NonZero", [flat], f"{ROOT}.kept_rows")
        kept = graph.reshape(kept, [-1], f"{ROOT}.kept_rows.flat")
        graph.node("Gather", [rows, kept], "embeddings", axis=0)

    def _linear(self, x: str, path: str) -> str:
        name = f"{ROOT}.{path}"
        return self.linears.single(x, self.weights.linear(name), name)

    def _norm(self, x: str, path: str) -> str:
        graph, name = self.graph, f"{ROOT}.{path}"
        weights = [
            graph.weight(f"{name}.{part}", self.weights.array(f"{name}.{part}"))
            for part in ("weight", "bias")
        ]
        return graph.node("LayerNormalization", [x, *weights], name, axis=-1, epsilon=_EPSILON)
