"""A bundle's graphs rewritten for TensorRT: the same low-bit bytes and names, standard operators, float16.

Every node of a bundle's graph becomes nodes of ONNX opset 21 that TensorRT parses and ONNX Runtime runs.
Types are explicit, as strongly typed networks want them: products and attention take float16; the residual
stream, norms and rotations are float32, because Qwen2.5's residuals and keys outgrow halves.

What differs from the bundle's contract:
- decoder: the cache has a fixed capacity and holds float16; `total_sequence_length` isn't needed. Keys and
  values go to `seqlens_k + 1 - S` and on, and a position sees those up to itself: rewinding is still setting
  a length;
- audio: `embeddings` [C, tokens, H] has the rows of a chunk's padding too, `tokens` [C] says how many come
  before them (dropping rows would make an output of unknown size, for which TensorRT has to stop).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from crab_edge.errors import BundleError
from crab_edge.manifest import COPY_AGAIN

from . import audio, decoder, vision
from .graph import BOOL, CRAB, FLOAT, FLOAT16, INT64, SHARED, GraphBuilder
from .tensorrt_functions import ATTENTION, SCATTER, attention, scatter
from .tensorrt_products import Products
from .tensorrt_source import Source, attributes

_FLOATS = (FLOAT, FLOAT16)
_NUMPY = {FLOAT: np.float32, FLOAT16: np.float16}
_LABEL = {FLOAT: "float", FLOAT16: "half"}
CACHE = "kv_cache"
"""Begins the names of what all layers of the decoder share about the cache."""


class Rewriter:
    """Rewrites one graph. `types` has the element type of every value so far; the methods named `_do_Op` one
    operator each. leading: the two leading axes of activations, one of them -1 (free); depth: of a head. With
    them all shapes are constants, which TensorRT builds in half the time that computed ones take.
    """

    def __init__(
        self,
        source: Source,
        graph: GraphBuilder,
        products: Products,
        leading: tuple[int, int],
        depth: int,
    ) -> None:
        self.source = source
        self.leading = leading
        self.depth = depth
        self.graph = graph
        self.types: dict[str, int] = {}
        self.products = products
        products.attach(self)

    def run(self, wanted: Sequence[str]) -> None:
        """All nodes that the values `wanted` depend on."""
        for node in self.source.live(list(wanted)):
            handler: Callable[[onnx.NodeProto, dict[str, Any]], None] | None
            handler = getattr(self, f"_do_{node.op_type}", None)
            if handler is None:
                raise BundleError(
                    f"{self.source.path}: the operator {node.op_type} has no form for TensorRT; export the "
                    "bundle again with this version"
                )
            handler(node, attributes(node))

    # Values and their types.

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> None:
        """A graph input."""
        self.types[self.graph.input(name, kind, shape)] = kind

    def result(self, name: str, value: str, kind: int, shape: Sequence[int | str]) -> None:
        """A graph output under `name`, of type `kind`, with the values of `value`."""
        if name != value and self.types[value] == kind:
            self.graph.node("Identity", [value], name)
        elif name != value:
            self.graph.node("Cast", [value], name, to=kind)
        self.graph.output(name, kind, shape)

    def node(self, kind: str, inputs: Sequence[str], out: str, type_: int, **attributes: Any) -> str:
        """A node with one output of element type `type_`."""
        self.graph.node(kind, inputs, out, **attributes)
        self.types[out] = type_
        return out

    def use(self, name: str) -> str:
        """A value by its name in the bundle; a weight is written when it is first used, floats as float32."""
        shared = name.startswith(SHARED)
        if not self.is_weight(name) or (name in self.types and not shared):
            return name
        value = np.asarray(self.source.array(name))
        # Numbered constants get the numbers of this graph.
        name = self.graph.constant(value, value.dtype) if shared else self.graph.weight(name, value)
        self.types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return name

    def weight(self, name: str, kind: int) -> str:
        """A float weight of the bundle in type `kind`, written once for each."""
        if kind == FLOAT:
            return self.use(name)
        out = f"{name}/{_LABEL[kind]}"
        if out not in self.types:
            self.add(out, self.source.array(name).astype(_NUMPY[kind]))
        return out

    def add(self, name: str, value: NDArray[Any]) -> str:
        """A weight of our own."""
        self.types[name] = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
        return self.graph.weight(name, value)

    def is_weight(self, name: str) -> bool:
        """Whether the bundle has it as a weight."""
        return name in self.source.weights

    def to(self, name: str, kind: int) -> str:
        """A value in float type `kind`: itself, or a cast of it that all users share."""
        if self.is_weight(name):
            return self.weight(name, kind)
        if self.types[name] == kind:
            return name
        out = f"{name}/{_LABEL[kind]}"
        if out not in self.types:
            self.node("Cast", [name], out, kind, to=kind)
        return out

    def integer(self, values: Any, dtype: Any = np.int64) -> str:
        """A small constant."""
        return self.graph.constant(values, dtype)

    def scalar(self, value: float, kind: int = FLOAT) -> str:
        """A float constant."""
        return self.graph.constant(value, _NUMPY[kind])

    def reshape(self, name: str, shape: Sequence[int], out: str) -> str:
        """0 keeps an axis, -1 takes the rest."""
        return self.node("Reshape", [name, self.integer(shape)], out, self.types[name])

    def heads(self, name: str, leading: tuple[int, int], heads: int, kind: int) -> str:
        """[B, S, heads*D] in type `kind` as [B, heads, S, D]."""
        x = self.reshape(self.to(name, kind), [*leading, heads, self.depth], f"{name}/heads")
        return self.node("Transpose", [x], f"{name}/by_head", kind, perm=[0, 2, 1, 3])

    def leading_of(self, name: str) -> tuple[int, int]:
        """The leading axes of a value: those of the bundle's Reshape that made it, else the graph's."""
        made = self.source.producer(name)
        if made is None or made.op_type != "Reshape":
            return self.leading
        batch, rows = (int(size) for size in self.source.array(made.input[1])[:2])
        return self.leading if batch == 0 else (batch, rows)

    # Nodes that stay what they are.

    def _same(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """Copies a node; its outputs have the type of its first input."""
        inputs = [self.use(name) for name in node.input]
        self.graph.node(node.op_type, inputs, list(node.output), domain=node.domain, **given)
        for out in node.output:
            self.types[out] = self.types[inputs[0]]

    _do_Reshape = _do_Transpose = _do_Split = _do_Slice = _do_Gather = _same
    _do_ReduceMean = _do_Cos = _do_Sin = _do_Div = _do_Gelu = _same

    def _do_Cast(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        source, to = self.use(node.input[0]), given["to"]
        if to in _FLOATS and self.types[source] in _FLOATS:
            # Those between float types were for the bundle's own runtime; ours come where they are needed.
            self.node("Identity", [source], node.output[0], self.types[source])
        else:
            self.node("Cast", [source], node.output[0], to, to=to)

    def _do_Less(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self.node("Less", [self.use(name) for name in node.input], node.output[0], BOOL)

    def _do_Concat(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        kind = (
            FLOAT16 if any(self.types[name] == FLOAT16 for name in node.input) else self.types[node.input[0]]
        )
        inputs = [self.to(name, kind) if kind in _FLOATS else name for name in node.input]
        self.node("Concat", inputs, node.output[0], kind, **given)

    def _do_Add(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """A bias stays in the product's type; sums of activations are the residual stream, in float32."""
        found = [self.types.get(self.use(name), FLOAT) for name in node.input]
        kind = found[0] if found[0] not in _FLOATS else FLOAT
        left, right = node.input
        for name, other in ((left, right), (right, left)):
            if (
                self.is_weight(name)
                and len(self.source.weights[name].dims) == 1
                and not self.is_weight(other)
            ):
                kind = self.types[other]
        inputs = [self.to(name, kind) if kind in _FLOATS else name for name in node.input]
        self.node("Add", inputs, node.output[0], kind)

    def _do_Mul(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        found = [self.types.get(name, FLOAT) for name in node.input]
        kind = FLOAT16 if FLOAT16 in found else FLOAT
        self.node("Mul", [self.to(name, kind) for name in node.input], node.output[0], kind)

    def _do_Conv(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self.node("Conv", [self.to(name, FLOAT16) for name in node.input], node.output[0], FLOAT16, **given)

    # Nodes of ONNX Runtime that TensorRT hasn't.

    def _do_QuickGelu(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """x * sigmoid(alpha x)."""
        x, out = node.input[0], node.output[0]
        kind, inner = self.types[x], x
        if given["alpha"] != 1.0:
            inner = self.node("Mul", [x, self.scalar(given["alpha"], kind)], f"{out}/inner", kind)
        gate = self.node("Sigmoid", [inner], f"{out}/sigmoid", kind)
        self.node("Mul", [x, gate], out, kind)

    def _do_LayerNormalization(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        inputs, out = [self.to(name, FLOAT) for name in node.input], node.output[0]
        x = self.node("LayerNormalization", inputs, f"{out}/normed", FLOAT, **given)
        self.node("Cast", [x], out, FLOAT16, to=FLOAT16)

    def _do_SimplifiedLayerNormalization(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self._rms(self.to(node.input[0], FLOAT), node.input[1], node.output[0], given["epsilon"])

    def _do_SkipSimplifiedLayerNormalization(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        residual, x, weight = node.input
        out = node.output[0]
        kept = node.output[3] if len(node.output) > 3 else f"{out}/sum"
        self.node("Add", [self.to(residual, FLOAT), self.to(x, FLOAT)], kept, FLOAT)
        self._rms(kept, weight, out, given["epsilon"])

    def _rms(self, x: str, weight: str, out: str, epsilon: float) -> None:
        """RMSNorm of x float32 [.., H] as float16."""
        square = self.node("Mul", [x, x], f"{out}/square", FLOAT)
        mean = self.node("ReduceMean", [square, self.integer([-1])], f"{out}/mean", FLOAT, keepdims=1)
        mean = self.node("Add", [mean, self.scalar(epsilon)], f"{out}/mean_epsilon", FLOAT)
        root = self.node("Sqrt", [mean], f"{out}/root", FLOAT)
        normed = self.node("Div", [x, root], f"{out}/normed", FLOAT)
        scaled = self.node("Mul", [normed, self.use(weight)], f"{out}/scaled", FLOAT)
        self.node("Cast", [scaled], out, FLOAT16, to=FLOAT16)

    def _do_RotaryEmbedding(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """x [B, S, heads*D] turned by cos and sin [S, D/2]: a head's halves are the two coordinates."""
        x, _, cos, sin = node.input
        out, heads = node.output[0], given["num_heads"]
        split = self.reshape(self.to(x, FLOAT), [*self.leading, heads, self.depth], f"{out}/split_heads")
        first, second = f"{out}/first", f"{out}/second"
        self.graph.node("Split", [split], [first, second], axis=-1, num_outputs=2)
        cos, sin = (self._column(name) for name in (cos, sin))
        terms = {}
        for label, part, factor in (
            ("fc", first, cos),
            ("ss", second, sin),
            ("sc", second, cos),
            ("fs", first, sin),
        ):
            terms[label] = self.node("Mul", [part, factor], f"{out}/{label}", FLOAT)
        left = self.node("Sub", [terms["fc"], terms["ss"]], f"{out}/left", FLOAT)
        right = self.node("Add", [terms["sc"], terms["fs"]], f"{out}/right", FLOAT)
        both = self.node("Concat", [left, right], f"{out}/both", FLOAT, axis=-1)
        self.reshape(both, [*self.leading, heads * self.depth], out)

    def _column(self, name: str) -> str:
        """[S, D/2] as [S, 1, D/2], to meet [B, S, heads, D/2]."""
        out = f"{name}/column"
        if out not in self.types:
            self.node("Unsqueeze", [self.use(name), self.integer([1])], out, FLOAT)
        return out

    def _do_MultiHeadAttention(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        heads, out, leading = given["num_heads"], node.output[0], self.leading_of(node.input[2])
        scaled = self.node(
            "Mul", [self.to(node.input[0], FLOAT), self.scalar(given["scale"])], f"{out}/q_scaled", FLOAT
        )
        inputs = (scaled, node.input[1], node.input[2])
        q, k, v = (self.heads(name, leading, heads, FLOAT16) for name in inputs)
        mask = []
        if len(node.input) > 4 and node.input[4]:
            mask = [self._key_mask(node.input[4])]
        self._attend([q, k, v, *mask], [*leading, heads * self.depth], out)

    def _key_mask(self, name: str) -> str:
        """[C, L], 1 where there is a key, as bool [C, 1, 1, L]."""
        out = f"{name}/bool"
        if out not in self.types:
            wide = self.node("Unsqueeze", [name, self.integer([1, 2])], f"{name}/wide", self.types[name])
            self.node("Cast", [wide], out, BOOL, to=BOOL)
        return out

    def _attend(self, inputs: list[str], shape: Sequence[int], out: str) -> None:
        """Attention of q, k, v [B, heads, rows, D] (and a mask) as `shape`, [B, S, heads*D]; q is scaled."""
        self.graph.add_functions([attention(masked=len(inputs) > 3)])
        mixed = self.node(
            ATTENTION, inputs, f"{out}/by_head", FLOAT16, domain=CRAB, scale=1.0, TRT_decomposable=1
        )
        turned = self.node("Transpose", [mixed], f"{out}/turned", FLOAT16, perm=[0, 2, 1, 3])
        self.reshape(turned, shape, out)

    def _do_GroupQueryAttention(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        q, k, v = node.input[:3]
        out, *present = node.output
        kv_heads = given["kv_num_heads"]
        q = self.node("Mul", [self.to(q, FLOAT), self.scalar(given["scale"])], f"{out}/q_scaled", FLOAT)
        self.graph.add_functions([scatter()])
        for name, past, new in zip((k, v), node.input[3:5], present, strict=True):
            update = self.heads(name, self.leading, kv_heads, FLOAT16)
            self.node(SCATTER, [past, update, f"{CACHE}.write"], new, FLOAT16, domain=CRAB)
        heads = given["num_heads"]
        inputs = [self.heads(q, self.leading, heads, FLOAT16), *present, f"{CACHE}.mask"]
        self._attend(inputs, [*self.leading, heads * self.depth], out)

    # Products.

    def _do_MatMulNBits(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self.products.low_bit(node, given)

    def _do_ILoRARoute(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self.products.route(node, given)

    def _do_ILoRAExperts(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        self.products.experts(node, given)

    def _do_MatMul(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        x, weight = node.input
        if weight == f"{decoder.ROOT}.rotary_emb.table":
            self._angles(x, weight, node.output[0])
            return
        self.node("MatMul", [self.to(x, FLOAT16), self.to(weight, FLOAT16)], node.output[0], FLOAT16)

    def _angles(self, positions: str, table: str, out: str) -> None:
        """positions [S, 3] times table [3, D/2], not as a product: TF32 would ruin late angles."""
        wide = self.node("Unsqueeze", [positions, self.integer([2])], f"{out}/positions", FLOAT)
        terms = self.node("Mul", [wide, self.use(table)], f"{out}/terms", FLOAT)
        self.node("ReduceSum", [terms, self.integer([1])], out, FLOAT, keepdims=0)


def rewrite_decoder(source: Source, graph: GraphBuilder, products: Products, capacity: int) -> None:
    """The decoder with a cache of `capacity` tokens."""
    depth = source.shape("past.0.key")[-1]
    it = Rewriter(source, graph, products, (1, -1), int(depth))
    for name in ("inputs_embeds", "position_ids", "seqlens_k"):
        it.input(name, source.kind(name), source.shape(name))
    caches = [i.name.removeprefix("past.") for i in source.graph.input if i.name.startswith("past.")]
    shape: list[int | str] = []
    for name in caches:
        batch, heads, _, depth = source.shape(f"past.{name}")
        shape = [batch, heads, capacity, depth]
        it.input(f"past.{name}", FLOAT16, shape)
    _cache_places(it, capacity)
    presents = [f"present.{name}" for name in caches]
    inner = source.rename_value("logits")
    it.run([inner, *presents])
    for name in presents:
        it.result(name, name, FLOAT16, shape)
    # The product's output is float16; the contract's logits are float32.
    it.result("logits", inner, FLOAT, source.shape("logits"))


def _cache_places(it: Rewriter, capacity: int) -> None:
    """`write`: where the new tokens go; `mask` bool [1, 1, S, capacity]: what each of them sees."""
    count = f"{CACHE}.count"
    it.node("Shape", ["inputs_embeds"], count, INT64, start=1, end=2)
    last = it.node("Cast", ["seqlens_k"], f"{CACHE}.last", INT64, to=INT64)
    end = it.node("Add", [last, it.integer([1])], f"{CACHE}.end", INT64)
    write = it.node("Sub", [end, count], f"{CACHE}.write", INT64)
    scalar = it.node("Squeeze", [count, it.integer([0])], f"{CACHE}.count_scalar", INT64)
    steps = it.node("Range", [it.integer(0), scalar, it.integer(1)], f"{CACHE}.steps", INT64)
    rows = it.node("Add", [steps, write], f"{CACHE}.rows", INT64)
    column = it.reshape(rows, [1, 1, -1, 1], f"{CACHE}.rows_column")
    places = it.add(f"{CACHE}.places", np.arange(capacity, dtype=np.int64).reshape(1, 1, 1, -1))
    it.node("LessOrEqual", [places, column], f"{CACHE}.mask", BOOL)


def rewrite_vision(source: Source, graph: GraphBuilder, products: Products) -> None:
    """The vision encoder."""
    patches, half = source.weights[f"{vision.ROOT}.rotary_pos_emb.cos"].dims
    it = Rewriter(source, graph, products, (-1, patches), 2 * half)
    it.input("pixel_values", FLOAT, source.shape("pixel_values"))
    inner = source.rename_value("embeddings")
    it.run([inner])
    it.result("embeddings", inner, FLOAT, source.shape("embeddings"))


def rewrite_audio(source: Source, graph: GraphBuilder, products: Products) -> None:
    """The audio encoder, rows of padding kept."""
    scale = next(attributes(n)["scale"] for n in source.graph.node if n.op_type == "MultiHeadAttention")
    states = source.weights[f"{audio.ROOT}.positional_embedding"].dims[0]
    it = Rewriter(source, graph, products, (-1, states), round(scale**-2))
    for name in ("mel", "lengths"):
        it.input(name, source.kind(name), source.shape(name))
    rows, counts = f"{audio.ROOT}.proj", f"{audio.ROOT}.kept_tokens"
    for name in (rows, counts):
        if source.producer(name) is None:
            raise BundleError(f"{source.path}: has no value {name}; {COPY_AGAIN}")
    width = source.shape("embeddings")[-1]
    chunks, _, frames = source.shape("mel")
    if not isinstance(frames, int):
        raise BundleError(f"{source.path}: its chunks have no fixed length; {COPY_AGAIN}")
    it.run([rows, counts])
    it.result("embeddings", rows, FLOAT, [chunks, frames // 4, width])
    flat = it.reshape(counts, [-1], f"{counts}/flat")
    it.result("tokens", flat, INT64, [chunks])
