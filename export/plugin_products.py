"""A graph's low-bit products as TensorRT plugins: the other way than `tensorrt_products.Products`."""

from __future__ import annotations

from typing import Any

import onnx

from crab_edge.errors import BundleError
from crab_edge.ilora.onnx_functions import FLOAT as FLOAT_BITS
from crab_edge.ilora.onnx_functions import ROUTE

from .graph import FLOAT16
from .plugin_nodes import PluginNodes, Product
from .targets import Route, Target
from .tensorrt_products import Products
from .tensorrt_source import attributes


class PluginProducts(Products):
    """Gives to plugins what `target` wants there (`Target.route`), the rest to the library.

    A product over `[W | planes of sB]`, which a bundle has as Concat and MatMulNBits, becomes one node that
    takes x and z as they are. A base product with `ILoRAExperts` behind it stays two nodes.
    """

    def __init__(self, target: Target, int4: Route | None = None) -> None:
        super().__init__()
        self._target = target
        self._int4 = int4
        self._nodes: PluginNodes | None = None

    @property
    def nodes(self) -> PluginNodes:
        """What has been written: `count` nodes, and the `products` that need kernels."""
        if self._nodes is None:
            self._nodes = PluginNodes(self.it.graph)
        return self._nodes

    @property
    def kernels(self) -> dict[str, Product]:
        """The kernels that the graph's nodes need, by name."""
        return self.nodes.products

    def low_bit(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """A MatMulNBits: x W^T (+ bias), with the experts folded in or not."""
        if not self._to_plugin(given["bits"], given["block_size"]):
            super().low_bit(node, given)
            return
        it, out = self.it, node.output[0]
        x, codes, scales = node.input[:3]
        name = codes.removesuffix(".weight")
        weight = it.source.quantised(codes, scales, given["K"], given["bits"], given["block_size"])
        bias = it.source.array(node.input[5]) if len(node.input) > 5 and node.input[5] else None
        folded = self._folded(x)
        if folded is None:
            self.nodes.linear(name, it.to(x, FLOAT16), weight, out, bias=bias)
        else:
            x, z, planes = folded
            self.nodes.linear(
                name,
                it.to(x, FLOAT16),
                weight,
                out,
                z=it.to(z, FLOAT16),
                z_width=self._width(z),
                planes=planes,
                bias=bias,
            )
        it.types[out] = FLOAT16

    def route(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """An ILoRARoute."""
        if given["bits"] == FLOAT_BITS or not self._to_plugin(given["bits"], given["block"]):
            super().route(node, given)
            return
        it, (x, codes, scales) = self.it, node.input
        weight = it.source.quantised(codes, scales, given["K"], given["bits"], given["block"])
        sizes = {key: given[key] for key in ("rank", "experts", "groups")}
        self.nodes.route(codes.removesuffix(".weight"), it.to(x, FLOAT16), weight, node.output[0], **sizes)
        it.types[node.output[0]] = FLOAT16

    def experts(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """An ILoRAExperts."""
        if given["bits"] == FLOAT_BITS or not self._to_plugin(given["bits"], given["block"]):
            super().experts(node, given)
            return
        it, (y0, z, codes, scales) = self.it, node.input
        weight = it.source.quantised(codes, scales, given["K"], given["bits"], given["block"])
        name = codes.removesuffix(".weight")
        self.nodes.experts(name, it.to(y0, FLOAT16), it.to(z, FLOAT16), weight, node.output[0])
        it.types[node.output[0]] = FLOAT16

    def _to_plugin(self, bits: int, block: int) -> bool:
        return self._target.route(bits, block, self._int4) == "plugin"

    def _folded(self, x: str) -> tuple[str, str, int] | None:
        """(x, z, planes) where `x` is x with z behind it; None where it isn't."""
        joined = self.it.source.producer(x)
        if joined is None or joined.op_type != "Concat" or len(set(joined.input[1:])) != 1:
            return None
        return joined.input[0], joined.input[1], len(joined.input) - 1

    def _width(self, z: str) -> int:
        """Columns of a linear's z: its route's rank times experts."""
        source = self.it.source
        node = source.producer(z)
        if node is not None and node.op_type == "Split":
            node = source.producer(node.input[0])
        if node is None or node.op_type != ROUTE:
            raise BundleError(f"{source.path}: {z} comes from no {ROUTE}; export the bundle again")
        given = attributes(node)
        return int(given["rank"]) * int(given["experts"])
