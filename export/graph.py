"""Writing an ONNX graph node by node. Every node and every weight carries the name of its module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import crab_edge
from crab_edge.lowbit import QTensor

OPSET = 21
IR_VERSION = 10
MICROSOFT = "com.microsoft"
CRAB = "crab"
FLOAT, FLOAT16, INT32, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)
_ALIGNMENT = 4096
_INLINE_BYTES = 1024


class GraphBuilder:
    """Collects nodes, weights, inputs and outputs; `save` writes the model.

    With `data`, weights over 1 KiB go straight to that file (external data, page-aligned so that it can be
    mapped), so the graph never has to fit in memory; without, they stay inside the model file.
    """

    def __init__(self, name: str, data: Path | None = None) -> None:
        self.name = name
        self._functions: dict[str, onnx.FunctionProto] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._shared: dict[tuple[Any, ...], str] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._data_path = data
        self._data: BinaryIO | None = None

    def input(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """A graph input; strings in `shape` are dynamic axes."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Sequence[int | str]) -> str:
        """A graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """An initializer under its own name."""
        if name in self._weights:
            raise ValueError(f"weight {name} is written twice")
        value = np.ascontiguousarray(value)
        if self._data_path is None or value.nbytes < _INLINE_BYTES:
            self._weights[name] = numpy_helper.from_array(value, name)
        else:
            self._weights[name] = self._external(name, value)
        return name

    def constant(self, value: NDArray[Any] | Sequence[Any], dtype: Any = np.int64) -> str:
        """A small initializer, shared by all users of the same value."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._shared:
            self._shared[key] = self.weight(f"constant.{len(self._shared)}", array)
        return self._shared[key]

    def node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: str | Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Append a node named after its first output, which is returned."""
        outputs = [outputs] if isinstance(outputs, str) else list(outputs)
        self._nodes.append(
            helper.make_node(kind, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)
        )
        return outputs[0]

    def append(self, node: onnx.NodeProto) -> str:
        """Append a finished node; returns its first output."""
        self._nodes.append(node)
        return node.output[0]

    def add_functions(self, functions: Iterable[onnx.FunctionProto]) -> None:
        """Bodies of operators that the graph uses; the ones it doesn't use are left out when saving."""
        for function in functions:
            self._functions.setdefault(function.name, function)

    def matmul_nbits(
        self,
        name: str,
        x: str,
        weight: QTensor,
        out: str,
        *,
        accuracy_level: int,
        bias: NDArray[Any] | None = None,
    ) -> str:
        """`out = x W^T (+ bias)` with W [N, K] low-bit: MatMulNBits, weights `name.weight` and
        `name.scales`.
        """
        n, k = weight.shape
        inputs = [x, self.weight(f"{name}.weight", weight.q), self.weight(f"{name}.scales", weight.scales)]
        if bias is not None:
            inputs += ["", "", self.weight(f"{name}.bias", bias)]
        return self.node(
            "MatMulNBits",
            inputs,
            out,
            domain=MICROSOFT,
            N=n,
            K=k,
            bits=weight.bits,
            block_size=weight.block,
            accuracy_level=accuracy_level,
        )

    def matmul(
        self, name: str, x: str, weight: NDArray[np.float32], out: str, *, bias: NDArray[Any] | None = None
    ) -> str:
        """`out = x W^T (+ bias)` with W float [N, K]."""
        product = out if bias is None else f"{out}.product"
        self.node("MatMul", [x, self.weight(f"{name}.weight", weight.T)], product)
        if bias is not None:
            self.node("Add", [product, self.weight(f"{name}.bias", bias)], out)
        return out

    def split(self, x: str, sizes: Sequence[int], outputs: Sequence[str]) -> list[str]:
        """Cut the last axis into parts of `sizes`; a single part is `x` itself."""
        if len(sizes) == 1:
            return [x]
        self.node("Split", [x, self.constant(sizes)], outputs, axis=-1)
        return list(outputs)

    def reshape(self, x: str, shape: Sequence[int], out: str) -> str:
        """0 keeps an axis, -1 takes the rest."""
        return self.node("Reshape", [x, self.constant(shape)], out)

    def n_nodes(self) -> int:
        """Nodes of the main graph, functions counted as one."""
        return len(self._nodes)

    def save(self, path: Path) -> None:
        """Check the model and write it to `path`; `data` must lie in the same folder."""
        if self._data is not None:
            self._data.close()
            self._data = None
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._weights.values())
        )
        used = {node.op_type for node in self._nodes if node.domain == CRAB}
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        imports += [helper.make_opsetid(CRAB, 1)] if used else []
        model = helper.make_model(
            graph,
            functions=[body for name, body in self._functions.items() if name in used],
            opset_imports=imports,
            ir_version=IR_VERSION,
            producer_name="crab-edge",
            producer_version=crab_edge.__version__,
        )
        onnx.save(model, str(path))

    def _external(self, name: str, value: NDArray[Any]) -> onnx.TensorProto:
        assert self._data_path is not None
        if self._data is None:
            self._data = self._data_path.open("wb")
        self._data.write(b"\0" * (-self._data.tell() % _ALIGNMENT))
        offset = self._data.tell()
        self._data.write(memoryview(value).cast("B"))
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(value.dtype),
            dims=value.shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, entry in (("location", self._data_path.name), ("offset", offset), ("length", value.nbytes)):
            tensor.external_data.add(key=key, value=str(entry))
        return tensor
