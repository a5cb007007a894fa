"""Low-bit products and I-LoRA's operators as nodes that TensorRT takes as plugins, others by their bodies.

One file serves both. A node carries `plugin_namespace`, for which TensorRT's parser prefers a registered
plugin to a function's body, and `aot`, so that only a kernel compiled ahead of time will do. ONNX Runtime
takes the body, which reads the very bytes that the kernel reads. Attributes: `kernel` names the `KernelSet`
that the plugin looks up, the numbers are the body's.

Weights lie in the kernels' layout (`crab_edge.ilora.torch_ops.gpu_layout`): codes
[N, K/block, block*bits/8] as int8, because TensorRT's parser turns uint8 weights into int32, and scales
[K/block, N].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx.parser
from numpy.typing import NDArray
from onnx import FunctionProto

from crab_edge.ilora.tensorrt_plugins import ATTRIBUTE, NAMESPACE, OPERATORS
from crab_edge.lowbit import QTensor

from .graph import GraphBuilder


@dataclass(frozen=True)
class Product:
    """What a kernel is compiled for. Two of them that are equal share a kernel.

    k: columns of x (of z for ILoRAExperts); k2: columns of z, planes: how often the weight has them; n: rows
    of the weight, for a route groups * (rank + experts). bits2, block2: of the experts beside a product.
    scales, scales2: types of the weights' scales.
    """

    plugin: str
    dtype: str
    k: int
    n: int
    bits: int
    block: int
    scales: str
    k2: int = 0
    planes: int = 0
    bits2: int = 0
    block2: int = 0
    scales2: str = ""
    rank: int = 0
    experts: int = 0
    groups: int = 0

    @property
    def columns(self) -> int:
        """Width of the output."""
        return self.groups * self.experts * self.rank if self.groups else self.n

    @property
    def bias(self) -> bool:
        """Whether a bias is the last input."""
        return self.plugin.endswith("Bias")

    @property
    def types(self) -> tuple[str, ...]:
        """Types of the plugin's inputs in order."""
        kinds = {"W": "int8", "AR": "int8", "B": "int8", "W_scale": self.scales, "AR_scale": self.scales}
        beside = self.scales2 or self.scales
        kinds["B_scale"] = beside
        return tuple(kinds.get(name, self.dtype) for name in OPERATORS[self.plugin])

    @property
    def name(self) -> str:
        """A name that says all of it."""
        parts = [self.plugin, f"k{self.k}"]
        parts += [f"z{self.k2}x{self.planes}"] if self.planes else [f"z{self.k2}"] if self.k2 else []
        parts += [f"n{self.n}", f"w{self.bits}b{self.block}"]
        parts += [f"e{self.bits2}b{self.block2}"] if self.bits2 else []
        parts += [f"r{self.rank}x{self.experts}x{self.groups}"] if self.groups else []
        parts += [self.dtype, *("s32" for one in (self.scales, self.scales2) if one == "float32")]
        return "-".join(parts)


class PluginNodes:
    """Writes plugin nodes into a graph and remembers the kernels they need (`products`, by name).

    dtype: of activations, "float16" or "bfloat16". Methods return their output's name.
    """

    def __init__(self, graph: GraphBuilder, dtype: str = "float16") -> None:
        self.graph = graph
        self.dtype = dtype
        self.products: dict[str, Product] = {}
        self.count = 0
        graph.add_functions(functions())

    def linear(
        self,
        name: str,
        x: str,
        weight: QTensor,
        out: str,
        *,
        z: str | None = None,
        z_width: int = 0,
        planes: int = 0,
        bias: NDArray[np.floating] | None = None,
    ) -> str:
        """`out = [W | planes of sB] [x ; z ..] + bias`; without z `out = W x + bias`."""
        codes, scales, kind = self._operand(name, weight)
        inputs = [x, codes, scales] if z is None else [x, z, codes, scales]
        k = weight.shape[1] - planes * z_width
        plugin = "LowBitLinear" if z is None else "ILoRALinear"
        product = {"k": k, "n": weight.shape[0], "scales": kind, "k2": z_width, "planes": planes}
        return self._node(plugin, name, inputs, out, weight, bias, **product)

    def linear_experts(
        self,
        name: str,
        x: str,
        z: str,
        weight: QTensor,
        experts: QTensor,
        out: str,
        *,
        bias: NDArray[np.floating] | None = None,
    ) -> str:
        """`out = W x + sB z + bias` with two weights of their own bits in one launch."""
        codes, scales, kind = self._operand(name, weight)
        codes2, scales2, kind2 = self._operand(f"{name}.experts", experts)
        inputs = [x, z, codes, scales, codes2, scales2]
        product = {"k": weight.shape[1], "n": weight.shape[0], "scales": kind, "k2": experts.shape[1]}
        beside = {"bits2": experts.bits, "block2": experts.block, "scales2": kind2}
        return self._node("ILoRALinearExperts", name, inputs, out, weight, bias, **product, **beside)

    def route(
        self, name: str, x: str, weight: QTensor, out: str, *, rank: int, experts: int, groups: int
    ) -> str:
        """`out = flatten(softmax(R x) outer (A x))` of `groups` linears, weight = their A and R stacked."""
        codes, scales, kind = self._operand(name, weight)
        product = {"k": weight.shape[1], "n": weight.shape[0], "scales": kind}
        sizes = {"rank": rank, "experts": experts, "groups": groups}
        return self._node("ILoRARoute", name, [x, codes, scales], out, weight, None, **product, **sizes)

    def experts(self, name: str, y0: str, z: str, weight: QTensor, out: str) -> str:
        """`out = y0 + sB z`."""
        codes, scales, kind = self._operand(name, weight)
        product = {"k": weight.shape[1], "n": weight.shape[0], "scales": kind}
        return self._node("ILoRAExperts", name, [y0, z, codes, scales], out, weight, None, **product)

    def _operand(self, name: str, weight: QTensor) -> tuple[str, str, str]:
        """Names of codes and scales in the graph, and the scales' type."""
        from crab_edge.ilora.torch_ops import gpu_layout

        layout = gpu_layout(weight)
        codes = self.graph.weight(f"{name}.weight", layout.q.view(np.int8))
        return codes, self.graph.weight(f"{name}.scales", layout.scales), str(layout.scales.dtype)

    def _node(
        self,
        plugin: str,
        name: str,
        inputs: list[str],
        out: str,
        weight: QTensor,
        bias: NDArray[np.floating] | None,
        **sizes: Any,
    ) -> str:
        if bias is not None:
            plugin += "Bias"
            inputs = [*inputs, self._bias(name, bias)]
        product = Product(plugin, self.dtype, bits=weight.bits, block=weight.block, **sizes)
        self.products[product.name] = product
        self.count += 1
        numbers = {key: getattr(product, key) for key in _NUMBERS[plugin.removesuffix("Bias")]}
        plugin_attributes = {ATTRIBUTE: product.name, "plugin_namespace": NAMESPACE, "aot": 1}
        return self.graph.node(plugin, inputs, out, domain=NAMESPACE, **plugin_attributes, **numbers)

    def _bias(self, name: str, bias: NDArray[np.floating]) -> str:
        if self.dtype == "float16":
            return self.graph.weight(f"{name}.bias", np.asarray(bias, np.float16))
        import ml_dtypes

        return self.graph.weight(f"{name}.bias", np.asarray(bias).astype(ml_dtypes.bfloat16))


# Numbers that the bodies read.
_NUMBERS: dict[str, tuple[str, ...]] = {
    "ILoRARoute": ("bits", "rank", "experts", "groups"),
    "ILoRAExperts": ("bits",),
    "ILoRALinear": ("bits", "planes"),
    "ILoRALinearExperts": ("bits", "bits2"),
    "LowBitLinear": ("bits",),
}
_PLUGIN_ATTRIBUTES = (ATTRIBUTE, "plugin_namespace", "aot")


def functions() -> list[FunctionProto]:
    """Bodies of all operators, in standard ONNX and float32, for consumers without the plugins."""
    out = [
        _function("ILoRARoute", _PRODUCT.format(x="x", w="AR", bits="bits", y="products") + _ROUTE, "z"),
        _function(
            "ILoRAExperts",
            _PRODUCT.format(x="z", w="B", bits="bits", y="mixed") + _sum("y0", "mixed", "y0"),
            "y",
        ),
    ]
    single = _PRODUCT.format(x="x", w="W", bits="bits", y="base")
    folded = _JOINED + _PRODUCT.format(x="both", w="W", bits="bits", y="base")
    beside = single + _PRODUCT.format(x="z", w="B", bits="bits2", y="mixed")
    beside += "total = Add (base, mixed)\n"
    for name, body, result in (
        ("LowBitLinear", single, "base"),
        ("ILoRALinear", folded, "base"),
        ("ILoRALinearExperts", beside, "total"),
    ):
        out.append(_function(name, f"{body}y = CastLike ({result}, x)\n", "y"))
        out.append(_function(f"{name}Bias", body + _sum("bias", result, "x"), "y"))
    return out


def _sum(first: str, second: str, like: str) -> str:
    return (
        f"first32 = Cast <to = 1> ({first})\nsum32 = Add (first32, {second})\ny = CastLike (sum32, {like})\n"
    )


def _function(name: str, body: str, output: str) -> FunctionProto:
    attributes = [*_NUMBERS[name.removesuffix("Bias")], *_PLUGIN_ATTRIBUTES]
    text = f"{name} <{', '.join(attributes)}> ({', '.join(OPERATORS[name])}) => ({output}) {{\n{body}}}"
    return onnx.parser.parse_function(f'<domain: "{NAMESPACE}", opset_import: ["" : 21]>\n{text}')


# y = x times the transpose of the weight that codes {w} and scales {w}_scale stand for, in float32. Columns
# of padding, which x doesn't have, are cut off.
_PRODUCT = """
{w}_bytes = Cast <to = 2> ({w})
{w}_bits = Constant <value_int: int = @{bits}> ()
{w}_four = Constant <value = int64 {{4}}> ()
{w}_packed = Equal ({w}_bits, {w}_four)
{w}_codes = If ({w}_packed) <
    then_branch = unpack () => (uint8[n, blocks, block] both_halves) {{
        low_half = Constant <value = uint8 {{15}}> ()
        places = Constant <value = uint8 {{4}}> ()
        low = BitwiseAnd ({w}_bytes, low_half)
        high = BitShift <direction = "RIGHT"> ({w}_bytes, places)
        both_halves = Concat <axis = -1> (low, high)
    }},
    else_branch = take () => (uint8[n, blocks, block] whole) {{ whole = Identity ({w}_bytes) }}
>
{w}_codes32 = Cast <to = 1> ({w}_codes)
{w}_one = Constant <value = int64 {{1}}> ()
{w}_power = Sub ({w}_bits, {w}_one)
{w}_two = Constant <value = float {{2.0}}> ()
{w}_zero = Pow ({w}_two, {w}_power)
{w}_signed = Sub ({w}_codes32, {w}_zero)
{w}_scale32 = Cast <to = 1> ({w}_scale)
{w}_scale_rows = Transpose <perm = [1, 0]> ({w}_scale32)
{w}_last = Constant <value = int64[1] {{-1}}> ()
{w}_scale_blocks = Unsqueeze ({w}_scale_rows, {w}_last)
{w}_blocks32 = Mul ({w}_signed, {w}_scale_blocks)
{w}_rows = Constant <value = int64[2] {{0, -1}}> ()
{w}_padded = Reshape ({w}_blocks32, {w}_rows)
{w}_width = Shape <start = -1> ({x})
{w}_start = Constant <value = int64[1] {{0}}> ()
{w}_axis = Constant <value = int64[1] {{1}}> ()
{w}_whole = Slice ({w}_padded, {w}_start, {w}_width, {w}_axis)
{w}_turned = Transpose <perm = [1, 0]> ({w}_whole)
{x}_32 = Cast <to = 1> ({x})
{y} = MatMul ({x}_32, {w}_turned)
"""

# both = x followed by z, `planes` times.
_JOINED = """
one = Constant <value = int64[1] {1}> ()
planes = Constant <value_int: int = @planes> ()
planes_1d = Reshape (planes, one)
lead = Shape <end = -1> (z)
lead_length = Shape (lead)
ones = ConstantOfShape <value = int64[1] {1}> (lead_length)
repeats = Concat <axis = 0> (ones, planes_1d)
repeated = Tile (z, repeats)
both = Concat <axis = -1> (x, repeated)
"""

_ROUTE = """
last = Constant <value = int64[1] {-1}> ()
one = Constant <value = int64[1] {1}> ()
rank_0d = Constant <value_int: int = @rank> ()
rank = Reshape (rank_0d, one)
experts_0d = Constant <value_int: int = @experts> ()
experts = Reshape (experts_0d, one)
groups_0d = Constant <value_int: int = @groups> ()
groups = Reshape (groups_0d, one)
lead = Shape <end = -1> (x)
by_linear = Concat <axis = 0> (lead, groups, one, last)
as_column = Concat <axis = 0> (lead, groups, last, one)
flat = Concat <axis = 0> (lead, last)
parts = Concat <axis = 0> (rank, experts)
linears = Reshape (products, by_linear)
h, logits = Split <axis = -1> (linears, parts)
weights = Softmax <axis = -1> (logits)
g = Reshape (weights, as_column)
outer = Mul (g, h)
z32 = Reshape (outer, flat)
z = CastLike (z32, x)
"""
