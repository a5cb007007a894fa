"""Low-bit products in the files for TensorRT, as blockwise `DequantizeLinear` before `MatMul`.

TensorRT keeps the constant behind such a node in 4 or 8 bits, and ONNX Runtime makes one MatMulNBits of both.
Where K isn't a multiple of the block, the store has filled the weight up with zeros, and TensorRT wants whole
blocks: the activations are padded to meet it. (Cutting the weight back would part it from its product.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from crab_edge.errors import BundleError
from crab_edge.ilora.onnx_functions import EXPERTS, ROUTE
from crab_edge.ilora.onnx_functions import FLOAT as FLOAT_BITS
from crab_edge.lowbit import QTensor

from .graph import CRAB, FLOAT16
from .tensorrt_functions import experts, route
from .tensorrt_weights import write_operand

if TYPE_CHECKING:
    from .tensorrt_graph import Rewriter


class Products:
    """Writes the products of one graph for its `Rewriter`."""

    def __init__(self) -> None:
        self._it: Rewriter | None = None
        self._route_sizes: tuple[int, ...] = ()

    @property
    def it(self) -> Rewriter:
        """The rewriter that this writes for."""
        if self._it is None:
            raise RuntimeError("a rewriter attaches its products")
        return self._it

    def attach(self, rewriter: Rewriter) -> None:
        """Called by the rewriter, once."""
        self._it = rewriter

    def low_bit(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """A MatMulNBits: x W^T (+ bias)."""
        it, out = self.it, node.output[0]
        bias = node.input[5] if len(node.input) > 5 else ""
        x, matrix = self._operands(node.input[0], node.input[1:3], given, given["block_size"])
        if not bias:
            it.node("MatMul", [x, matrix], out, FLOAT16)
            return
        product = it.node("MatMul", [x, matrix], f"{out}/product", FLOAT16)
        it.node("Add", [product, it.weight(bias, FLOAT16)], out, FLOAT16)

    def route(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """An ILoRARoute."""
        it, sizes = self.it, (given["rank"], given["experts"])
        x, matrix = self._operands(node.input[0], node.input[1:], given, given.get("block", 0))
        if self._route_sizes not in ((), sizes):
            raise BundleError(
                f"{it.source.path}: routers of different sizes, {self._route_sizes} and {sizes} (rank, "
                "experts), which no adapter has; copy the bundle again"
            )
        self._route_sizes = sizes
        it.graph.add_functions([route(*sizes)])
        it.node(ROUTE, [x, matrix], node.output[0], FLOAT16, domain=CRAB)

    def experts(self, node: onnx.NodeProto, given: dict[str, Any]) -> None:
        """An ILoRAExperts."""
        it = self.it
        z, matrix = self._operands(node.input[1], node.input[2:], given, given.get("block", 0))
        it.graph.add_functions([experts()])
        it.node(EXPERTS, [it.to(node.input[0], FLOAT16), z, matrix], node.output[0], FLOAT16, domain=CRAB)

    def _operands(self, x: str, stored: Sequence[str], given: dict[str, Any], block: int) -> tuple[str, str]:
        """The activations, padded where the weight is, and the weight [K, N], both float16.

        stored: names of codes and scales, or of a float weight [N, K] alone.
        """
        it, name = self.it, stored[0].removesuffix(".weight")
        if given["bits"] == FLOAT_BITS:
            turned = np.ascontiguousarray(it.source.array(stored[0]).T.astype(np.float16))
            return it.to(x, FLOAT16), it.add(f"{name}.weight", turned)
        weight = it.source.quantised(stored[0], stored[1], given["K"], given["bits"], block)
        operand = write_operand(it.graph, name, weight)
        matrix = it.node(
            "DequantizeLinear",
            [operand.codes, operand.scales],
            f"{name}/dequantised",
            FLOAT16,
            axis=0,
            block_size=block,
        )
        return self._filled(x, weight), matrix

    def _filled(self, x: str, weight: QTensor) -> str:
        """x [B, S, K] in float16, K filled up to whole blocks of the weight."""
        it, missing = self.it, weight.scales.shape[1] * weight.block - weight.shape[1]
        half = it.to(x, FLOAT16)
        if not missing:
            return half
        out = f"{half}/filled{missing}"
        if out not in it.types:
            pads = it.integer([0, 0, 0, 0, 0, missing])
            it.node("Pad", [half, pads, it.scalar(0, FLOAT16)], out, FLOAT16)
        return out
