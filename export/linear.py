"""Linears with I-LoRA as nodes: one router a group of linears that share an input, experts folded or not.

The operator's two identities carry it: linears that share x stack their A and R, and
`W x + s B z = [W | sB] [x ; z]` is a single product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from crab_edge_calibration import QuantisationReport, quantize_gptq, quantize_planes, quantize_rtn
from numpy.typing import NDArray

from crab_edge.ilora import onnx_functions
from crab_edge.lowbit import QTensor, dequantize, n_blocks

from .graph import GraphBuilder
from .precision import PLANES, Precision
from .weights import Adapter, Floats, Linear, WeightStore

Moments = Mapping[str, NDArray[np.float32]]
Tick = Callable[[], None]
_WEIGHTED = "rtn weighted by input energy"
# Weights of the head that are in memory at a time.
_HEAD_WEIGHTS = 1 << 23


class LinearWriter:
    """Writes linears into a graph at one precision, and records how far each weight moved.

    moments: of the linears' inputs by module path, the mean of x x^T [K, K] or its diagonal [K]. With the
    whole, 4-bit weights are rounded with error feedback; the diagonal weights the search for scales; without
    either all channels count alike.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        precision: Precision,
        report: QuantisationReport,
        moments: Moments | None = None,
    ) -> None:
        self.graph = graph
        self.precision = precision
        self.report = report
        self.moments = moments or {}
        # Those that no node uses are left out when the graph is saved.
        graph.add_functions(onnx_functions.functions(precision.adapter_bits))

    def plain(self, x: str, linear: Linear, out: str, *, bits: int | None = None) -> str:
        """`out = W x + b` at `bits` (default: the precision's own)."""
        bits = bits or self.precision.bits
        if bits == 32:
            return self.graph.matmul(linear.path, x, linear.weight, out, bias=linear.bias)
        return self._product(linear.path, x, self._base(linear, bits), out, linear.bias)

    def head(self, x: str, weights: WeightStore, name: str, out: str, *, bits: int) -> str:
        """`out = W x` with the weight `name`, which is read and written in blocks of rows: it may be the
        largest of the model.
        """
        n, k = weights.shape(f"{name}.weight")
        graph, path = self.graph, "lm_head"
        rows = max(1, _HEAD_WEIGHTS // k)
        read = row_blocks(weights, f"{name}.weight", rows)
        if bits == 32:
            # Transposed, rows would be columns: a float graph keeps them and multiplies by the transpose.
            graph.stream(f"{path}.weight", np.float32, (n, k), read)
            turned = graph.node("Transpose", [f"{path}.weight"], f"{path}.weight.transposed", perm=[1, 0])
            return graph.node("MatMul", [x, turned], out)
        block = self.precision.block_of(bits)
        energy = self.moments.get(path)
        scales = np.empty((n, n_blocks(k, block)), np.float32)
        error = self.report.start(path, bits, energy, "rtn" if energy is None else _WEIGHTED)

        def quantised() -> Iterator[NDArray[np.uint8]]:
            done = 0
            for part in read:
                stored = quantize_rtn(part, bits, block, energy)
                scales[done : done + len(part)] = stored.scales
                error.add(part, dequantize(stored))
                done += len(part)
                yield stored.q

        shape = (n, n_blocks(k, block), block * bits // 8)
        graph.stream(f"{path}.weight", np.uint8, shape, quantised())
        error.finish()
        graph.weight(f"{path}.scales", scales)
        return graph.low_bit_product(
            path, x, out, n=n, k=k, bits=bits, block=block, accuracy_level=self.precision.accuracy_level
        )

    def single(self, x: str, linear: Linear, out: str) -> str:
        """One linear that shares its input with no other."""
        return self.group(linear.path, x, [linear], [out])[0]

    def group(self, name: str, x: str, linears: Sequence[Linear], outs: Sequence[str]) -> list[str]:
        """Linears of the same input `x`, each with its adapter if it has one; `name` names the shared
        router.
        """
        z = self._route(name, x, [linear for linear in linears if linear.adapter is not None])
        for linear, out in zip(linears, outs, strict=True):
            if linear.adapter is None:
                self.plain(x, linear, out)
            elif self.precision.folds:
                self._folded(x, z[linear.path], linear, linear.adapter, out)
            else:
                self._beside(x, z[linear.path], linear, linear.adapter, out)
        return list(outs)

    def _route(self, name: str, x: str, linears: Sequence[Linear]) -> dict[str, str]:
        """z [..., N*r] of every linear of the group, by path."""
        if not linears:
            return {}
        adapters = [linear.adapter for linear in linears if linear.adapter is not None]
        rank, experts = adapters[0].rank, adapters[0].experts
        stacked = onnx_functions.stack_routes([a.down for a in adapters], [a.route for a in adapters])
        node = f"{name}.ilora_route"
        inputs = [x, *self._operand(node, stacked, self.moments.get(linears[0].path))]
        sizes = {"K": stacked.shape[1], "rank": rank, "experts": experts, "groups": len(adapters)}
        self.graph.append(
            onnx_functions.route_node(inputs, f"{node}.z", name=node, **sizes, **self._attributes())
        )
        outs = [f"{linear.path}.z" for linear in linears] if len(linears) > 1 else [f"{node}.z"]
        self.graph.split(f"{node}.z", [experts * rank] * len(linears), outs)
        return {linear.path: out for linear, out in zip(linears, outs, strict=True)}

    def _folded(self, x: str, z: str, linear: Linear, adapter: Adapter, out: str) -> None:
        """`[W | planes of sB] [x ; z ..]` as one product."""
        if self.precision.experts == "float":
            both = self.graph.node("Concat", [x, z], f"{linear.path}.xz", axis=-1)
            weight = np.concatenate([linear.weight, adapter.up], axis=1)
            self.graph.matmul(linear.path, both, weight, out, bias=linear.bias)
            return
        planes = self._planes(f"{linear.path}.experts", adapter.up, PLANES[self.precision.experts])
        both = self.graph.node("Concat", [x] + [z] * len(planes), f"{linear.path}.xz", axis=-1)
        self._product(
            linear.path,
            both,
            join_columns([self._base(linear, self.precision.bits), *planes]),
            out,
            linear.bias,
        )

    def _beside(self, x: str, z: str, linear: Linear, adapter: Adapter, out: str) -> None:
        """The base product, then a `crab::ILoRAExperts` node."""
        base = self.plain(x, linear, f"{out}.base")
        node = f"{linear.path}.ilora_experts"
        inputs = [base, z, *self._operand(node, adapter.up, None)]
        n, k = adapter.up.shape
        self.graph.append(onnx_functions.experts_node(inputs, out, K=k, N=n, name=node, **self._attributes()))

    def _operand(self, node: str, weight: Floats, moment: NDArray[np.float32] | None) -> list[str]:
        """The weight inputs of one of the operator's nodes; its function bodies are in the graph."""
        bits = self.precision.adapter_bits
        if bits == 32:
            return [self.graph.weight(f"{node}.weight", weight)]
        stored = self._quantise(node, weight, bits, moment)
        return [
            self.graph.weight(f"{node}.weight", stored.q),
            self.graph.weight(f"{node}.scales", stored.scales),
        ]

    def _attributes(self) -> dict[str, int]:
        low = self.precision
        if low.adapter_bits == 32:
            return {"bits": 32}
        block = low.block_of(low.adapter_bits)
        return {"bits": low.adapter_bits, "block": block, "accuracy_level": low.accuracy_level}

    def _base(self, linear: Linear, bits: int) -> QTensor:
        return self._quantise(linear.path, linear.weight, bits, self.moments.get(linear.path))

    def _planes(self, name: str, up: Floats, count: int) -> list[QTensor]:
        bits = self.precision.bits
        planes = quantize_planes(up, bits, self.precision.block, count)
        total = sum((dequantize(plane) for plane in planes[1:]), dequantize(planes[0]))
        self.report.add(name, bits * count, up, total)
        return planes

    def _quantise(self, name: str, weight: Floats, bits: int, moment: NDArray[np.float32] | None) -> QTensor:
        block = self.precision.block_of(bits)
        if bits == 4 and moment is not None and moment.ndim == 2:
            stored, method = quantize_gptq(weight, bits, block, moment), "gptq"
        else:
            energy = np.diagonal(moment) if moment is not None and moment.ndim == 2 else moment
            stored = quantize_rtn(weight, bits, block, energy)
            method = "rtn" if moment is None else _WEIGHTED
        self.report.add(name, bits, weight, dequantize(stored), moment, method)
        return stored

    def _product(self, name: str, x: str, weight: QTensor, out: str, bias: Floats | None) -> str:
        level = self.precision.accuracy_level
        return self.graph.matmul_nbits(name, x, weight, out, accuracy_level=level, bias=bias)


def row_blocks(weights: WeightStore, name: str, count: int) -> Iterator[Floats]:
    """A weight in blocks of `count` rows or fewer, one after the other: for what is too large to hold."""
    rows = weights.shape(name)[0]
    for begin in range(0, rows, count):
        yield weights.rows(name, begin, min(rows, begin + count))


def join_columns(parts: Sequence[QTensor]) -> QTensor:
    """[P_0 | P_1 | ..] of equal bits and block; all but the last must be whole blocks wide."""
    first = parts[0]
    for part in parts[:-1]:
        if part.shape[1] % part.block:
            raise ValueError(f"a weight of {part.shape[1]} columns ends inside a block of {part.block}")
    return QTensor(
        q=np.concatenate([part.q for part in parts], axis=1),
        scales=np.concatenate([part.scales for part in parts], axis=1),
        bits=first.bits,
        block=first.block,
        shape=(first.shape[0], sum(part.shape[1] for part in parts)),
    )
