"""The decoder: Qwen2-style layers around a KV cache that is updated in place.

Inputs and outputs are the bundle's contract: `inputs_embeds` [1, S, H], `position_ids` [3, 1, S],
`past.{i}.key|value` [1, Hkv, Smax, D] (bind `present.{i}.*` to the same memory), `seqlens_k` and
`total_sequence_length` [1] -> `logits` [1, 1, V] of the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import ModelError

from .graph import FLOAT, FLOAT16, INT32, INT64, MICROSOFT, GraphBuilder
from .linear import LinearWriter, Tick
from .precision import Precision
from .weights import WeightStore

ROOT = "language_model"
LAST_TOKEN = f"{ROOT}.last_token"
_END = np.iinfo(np.int64).max


def decoder_widths(config: object, n_ranks: int) -> list[int]:
    """Input widths of the decoder's linears, and N*r: what folding needs in whole blocks."""
    return [
        config.hidden_size,
        config.num_attention_heads * head_dim(config),
        config.intermediate_size,
        *([n_ranks] if n_ranks else []),
    ]


def head_dim(config: object) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotary_table(config: object) -> NDArray[np.float32]:
    """M [3, D/2] with which `angles = position_ids^T M`: every frequency listens to one of the three axes.

    The frequencies are theta^(-2j/D); `mrope_section` gives axis t, h, w its share of them in that order.
    Raises ModelError for a kind of rotary embedding that this graph doesn't hold.
    """
    parameters = config.rope_parameters
    if parameters.get("rope_type", "default") != "default":
        raise ModelError(
            f"the decoder's rope_type is {parameters['rope_type']!r}; only 'default' can be exported"
        )
    half = head_dim(config) // 2
    section = list(parameters.get("mrope_section", [16, 24, 24]))
    if sum(section) != half or len(section) != 3:
        raise ModelError(
            f"mrope_section {section} must have three parts that sum to {half} (half of head_dim)"
        )
    frequencies = 1.0 / parameters["rope_theta"] ** (np.arange(half, dtype=np.float32) / half)
    table = np.zeros((3, half), np.float32)
    table[np.repeat([0, 1, 2], section), np.arange(half)] = frequencies
    return table


class DecoderExporter:
    """Writes the decoder of `weights` into `graph`; `config` is the thinker's text config."""

    def __init__(
        self,
        graph: GraphBuilder,
        linears: LinearWriter,
        weights: WeightStore,
        config: object,
        precision: Precision,
    ) -> None:
        if config.hidden_act != "silu":
            raise ModelError(
                f"the decoder's activation is {config.hidden_act!r}; only 'silu' can be exported"
            )
        if any(kind != "full_attention" for kind in config.layer_types or ()):
            raise ModelError("the decoder uses sliding-window attention; only full attention can be exported")
        self.graph = graph
        self.linears = linears
        self.weights = weights
        self.config = config
        self.cache_type = FLOAT16 if precision.kv_dtype == "float16" else FLOAT
        self.head_bits = precision.head_bits
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.depth = head_dim(config)

    def write(self, tick: Tick = lambda: None) -> None:
        """All nodes, inputs and outputs."""
        for _, make in self.units():
            make()
            tick()

    def units(self) -> list[tuple[str, Callable[[], None]]]:
        """The graph in steps, to be made in this order: what comes before the layers, each layer, the head.

        A step needs the names of those before it, not their values, so a step of an earlier run can be
        replayed.
        """
        count = self.config.num_hidden_layers
        layers = [(f"layer {i}", partial(self._layer, i)) for i in range(count)]
        return [("start", self._start), *layers, ("head", self._finish)]

    def _start(self) -> None:
        config, graph = self.config, self.graph
        graph.input("inputs_embeds", FLOAT, [1, "S", config.hidden_size])
        graph.input("position_ids", INT64, [3, 1, "S"])
        graph.input("seqlens_k", INT32, [1])
        graph.input("total_sequence_length", INT32, [1])
        graph.output("logits", FLOAT, [1, 1, config.vocab_size])
        self._rotary()
        first = self._norm_weight("layers.0.input_layernorm")
        graph.node(
            "SimplifiedLayerNormalization",
            ["inputs_embeds", first],
            f"{ROOT}.layers.0.input_layernorm",
            axis=-1,
            epsilon=config.rms_norm_eps,
        )

    def carried(self, i: int) -> tuple[str, str]:
        """What layer i reads of the layers before it: its normed input, and the residual.

        i = number of layers: the final norm's output, and the residual that nobody needs any more.
        """
        count = self.config.num_hidden_layers
        hidden = f"{ROOT}.norm" if i == count else f"{ROOT}.layers.{i}.input_layernorm"
        return hidden, f"{hidden}.residual" if i else "inputs_embeds"

    def _finish(self) -> None:
        graph = self.graph
        last = graph.node(
            "Slice",
            [
                self.carried(self.config.num_hidden_layers)[0],
                graph.constant([-1]),
                graph.constant([_END]),
                graph.constant([1]),
            ],
            LAST_TOKEN,
        )
        name = "lm_head" if "lm_head.weight" in self.weights else f"{ROOT}.embed_tokens"
        self.linears.head(last, self.weights, name, "logits", bits=self.head_bits)

    def _rotary(self) -> None:
        """cos and sin [S, D/2] of this call's positions, once for all layers."""
        graph, prefix = self.graph, f"{ROOT}.rotary_emb"
        flat = graph.reshape("position_ids", [3, -1], f"{prefix}.positions")
        flat = graph.node("Transpose", [flat], f"{prefix}.by_token", perm=[1, 0])
        flat = graph.node("Cast", [flat], f"{prefix}.float", to=FLOAT)
        table = graph.weight(f"{prefix}.table", rotary_table(self.config))
        angles = graph.node("MatMul", [flat, table], f"{prefix}.angles")
        graph.node("Cos", [angles], f"{prefix}.cos")
        graph.node("Sin", [angles], f"{prefix}.sin")

    def _rotate(self, x: str, heads: int, out: str) -> str:
        prefix = f"{ROOT}.rotary_emb"
        return self.graph.node(
            "RotaryEmbedding",
            [x, self.graph.constant([0]), f"{prefix}.cos", f"{prefix}.sin"],
            out,
            domain=MICROSOFT,
            num_heads=heads,
        )

    def _layer(self, i: int) -> None:
        graph, path, config = self.graph, f"{ROOT}.layers.{i}", self.config
        hidden, residual = self.carried(i)
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        names = [f"{attention}.{part}_proj" for part in "qkv"]
        self.linears.group(f"{attention}.qkv", hidden, [self.weights.linear(name) for name in names], names)
        mixed = self._attention(i, attention, names)
        self.linears.single(mixed, self.weights.linear(f"{attention}.o_proj"), f"{attention}.o_proj")
        normed = f"{path}.post_attention_layernorm"
        middle = self._skip_norm(
            residual, f"{attention}.o_proj", f"layers.{i}.post_attention_layernorm", normed
        )

        names = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        self.linears.group(f"{mlp}.gate_up", normed, [self.weights.linear(name) for name in names], names)
        # x * sigmoid(1.0 x) is SiLU; ONNX Runtime has no node of that name in opset 21.
        graph.node("QuickGelu", [names[0]], f"{mlp}.act_fn", domain=MICROSOFT, alpha=1.0)
        product = graph.node("Mul", [f"{mlp}.act_fn", names[1]], f"{mlp}.product")
        self.linears.single(product, self.weights.linear(f"{mlp}.down_proj"), f"{mlp}.down_proj")

        last = i + 1 == config.num_hidden_layers
        norm = "norm" if last else f"layers.{i + 1}.input_layernorm"
        self._skip_norm(middle, f"{mlp}.down_proj", norm, f"{ROOT}.{norm}", keep=not last)

    def _attention(self, i: int, path: str, names: list[str]) -> str:
        graph = self.graph
        q, k, v = names
        q = self._rotate(q, self.heads, f"{path}.q_rotated")
        k = self._rotate(k, self.kv_heads, f"{path}.k_rotated")
        if self.cache_type != FLOAT:
            q, k, v = (graph.node("Cast", [name], f"{name}.cast", to=self.cache_type) for name in (q, k, v))
        shape = [1, self.kv_heads, "Smax", self.depth]
        for part in ("key", "value"):
            graph.input(f"past.{i}.{part}", self.cache_type, shape)
            graph.output(f"present.{i}.{part}", self.cache_type, shape)
        past = [f"past.{i}.key", f"past.{i}.value", "seqlens_k", "total_sequence_length"]
        mixed = graph.node(
            "GroupQueryAttention",
            [q, k, v, *past],
            [f"{path}.attention", f"present.{i}.key", f"present.{i}.value"],
            domain=MICROSOFT,
            num_heads=self.heads,
            kv_num_heads=self.kv_heads,
            scale=self.depth**-0.5,
            do_rotary=0,
        )
        if self.cache_type != FLOAT:
            mixed = graph.node("Cast", [mixed], f"{path}.attention.cast", to=FLOAT)
        return mixed

    def _skip_norm(self, residual: str, x: str, norm: str, out: str, keep: bool = True) -> str:
        """RMSNorm of residual + x into `out`; returns the sum, the next residual."""
        total = f"{out}.residual"
        self.graph.node(
            "SkipSimplifiedLayerNormalization",
            [residual, x, self._norm_weight(norm)],
            [out, "", "", total] if keep else [out],
            domain=MICROSOFT,
            epsilon=self.config.rms_norm_eps,
        )
        return total

    def _norm_weight(self, norm: str) -> str:
        name = f"{ROOT}.{norm}.weight"
        return self.graph.weight(name, self.weights.array(name))
