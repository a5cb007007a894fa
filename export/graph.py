"""Writing an ONNX graph node by node. Every node and every weight carries the name of its module."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
FLOAT, FLOAT16, INT32, INT64, BOOL, INT4, INT8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
    TensorProto.INT4,
    TensorProto.INT8,
)
ALIGNMENT = 4096
INLINE_BYTES = 1024
SHARED = "constant."


@dataclass(frozen=True)
class Piece:
    """What one step added to a graph: its nodes and weights, and the data bytes that it wrote.

    begin, end: offsets in the data file; sha256: of the bytes between them.
    """

    graph: onnx.GraphProto
    begin: int
    end: int
    sha256: str


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
        self._mark = (0, 0, 0, 0, 0)
        self._digest = hashlib.sha256()

    @property
    def data_path(self) -> Path | None:
        """Where large weights go, or None when they stay in the model file."""
        return self._data_path

    def piece(self) -> Piece:
        """What was added since the last call (or `replay`). Its data are on the disk when this returns, and
        out of memory.
        """
        nodes, weights, inputs, outputs, begin = self._mark
        graph = helper.make_graph(
            self._nodes[nodes:],
            self.name,
            self._inputs[inputs:],
            self._outputs[outputs:],
            list(self._weights.values())[weights:],
        )
        end = self._settle()
        piece = Piece(graph, begin, end, self._digest.hexdigest())
        self._set_mark(end)
        return piece

    def replay(self, piece: Piece) -> None:
        """Append a piece of an earlier run, whose bytes are in the data file. Pieces come in order."""
        self._nodes += piece.graph.node
        self._inputs += piece.graph.input
        self._outputs += piece.graph.output
        for tensor in piece.graph.initializer:
            self._weights[tensor.name] = tensor
            if tensor.name.startswith(SHARED):
                self._shared[_key(self._value(tensor))] = tensor.name
        if self._data_path is not None and piece.end:
            if self._data is None:
                self._data = self._data_path.open("r+b")
            self._data.seek(piece.end)
        self._set_mark(piece.end)

    def tensor(self, name: str) -> onnx.TensorProto | None:
        """The weight `name` as it lies in the graph: with its values, or with its place in the data file."""
        return self._weights.get(name)

    def _set_mark(self, end: int) -> None:
        counts = (len(self._nodes), len(self._weights), len(self._inputs), len(self._outputs))
        self._mark = (*counts, end)
        self._digest = hashlib.sha256()

    def _settle(self) -> int:
        """Bring the data file to the disk and let the kernel forget its pages; returns its length."""
        if self._data is None:
            return 0
        # An earlier run may have left a torn end.
        self._data.truncate()
        self._data.flush()
        os.fdatasync(self._data.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._data.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return self._data.tell()

    def _value(self, tensor: onnx.TensorProto) -> NDArray[Any]:
        base = "" if self._data_path is None else str(self._data_path.parent)
        return numpy_helper.to_array(tensor, base)

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
        if self._data_path is None or value.nbytes < INLINE_BYTES:
            self._weights[name] = numpy_helper.from_array(value, name)
        else:
            self._weights[name] = self._external(name, value)
        return name

    def packed(self, name: str, values: NDArray[np.uint8], kind: int, dims: Sequence[int]) -> str:
        """An initializer of a type that numpy doesn't have (INT4), or of bytes under another type.

        values: its bytes as ONNX lays them out, two 4-bit numbers in each, the earlier one in the low half.
        """
        values = np.ascontiguousarray(values).reshape(-1)
        self.weight(name, values)
        tensor = self._weights[name]
        tensor.data_type = kind
        del tensor.dims[:]
        tensor.dims.extend(dims)
        return name

    def constant(self, value: NDArray[Any] | Sequence[Any], dtype: Any = np.int64) -> str:
        """A small initializer, shared by all users of the same value."""
        array = np.asarray(value, dtype)
        key = _key(array)
        if key not in self._shared:
            self._shared[key] = self.weight(f"{SHARED}{len(self._shared)}", array)
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
        self.weight(f"{name}.weight", weight.q)
        self.weight(f"{name}.scales", weight.scales)
        if bias is not None:
            self.weight(f"{name}.bias", bias)
        sizes = {"n": n, "k": k, "bits": weight.bits, "block": weight.block}
        return self.low_bit_product(
            name, x, out, **sizes, accuracy_level=accuracy_level, bias=bias is not None
        )

    def low_bit_product(
        self,
        name: str,
        x: str,
        out: str,
        *,
        n: int,
        k: int,
        bits: int,
        block: int,
        accuracy_level: int,
        bias: bool = False,
    ) -> str:
        """The MatMulNBits node over `name.weight`, `name.scales` and, with `bias`, `name.bias`."""
        inputs = [x, f"{name}.weight", f"{name}.scales", *(["", "", f"{name}.bias"] if bias else [])]
        return self.node(
            "MatMulNBits",
            inputs,
            out,
            domain=MICROSOFT,
            N=n,
            K=k,
            bits=bits,
            block_size=block,
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

    @property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Inputs so far, in order."""
        return list(self._inputs)

    @property
    def outputs(self) -> list[onnx.ValueInfoProto]:
        """Outputs so far, in order."""
        return list(self._outputs)

    def n_nodes(self) -> int:
        """Nodes of the main graph, functions counted as one."""
        return len(self._nodes)

    def save(self, path: Path) -> None:
        """Check the model and write it to `path`; `data` must lie in the same folder."""
        if self._data is not None:
            self._settle()
            self._data.close()
            self._data = None
        graph = helper.make_graph(
            self._nodes, self.name, self._inputs, self._outputs, list(self._weights.values())
        )
        onnx.save(self.model(graph), str(path))

    def model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        """`graph`, the whole or a cut of this one, as a model with the functions that it uses."""
        used = {node.op_type for node in graph.node if node.domain == CRAB}
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        imports += [helper.make_opsetid(CRAB, 1)] if used else []
        return helper.make_model(
            graph,
            functions=[body for name, body in self._functions.items() if name in used],
            opset_imports=imports,
            ir_version=IR_VERSION,
            producer_name="crab-edge",
            producer_version=crab_edge.__version__,
        )

    def stream(self, name: str, dtype: Any, shape: Sequence[int], rows: Iterable[NDArray[Any]]) -> str:
        """An initializer that comes in blocks of rows, in order: with a data file, one block is in memory.

        Raises ValueError unless the blocks fill `shape`.
        """
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if self._data_path is None or size < INLINE_BYTES:
            return self.weight(name, np.concatenate(list(rows)).astype(dtype).reshape(shape))
        if name in self._weights:
            raise ValueError(f"weight {name} is written twice")
        offset, written = self._align(), 0
        for block in rows:
            written += self._write(np.ascontiguousarray(block, dtype))
        if written != size:
            raise ValueError(f"weight {name} needs {size} bytes for {list(shape)}, got {written}")
        self._weights[name] = self._reference(name, dtype, shape, offset, size)
        return name

    def _external(self, name: str, value: NDArray[Any]) -> onnx.TensorProto:
        offset = self._align()
        self._write(value)
        return self._reference(name, value.dtype, value.shape, offset, value.nbytes)

    def _align(self) -> int:
        """Fill the data file up to a page; returns the offset."""
        assert self._data_path is not None
        if self._data is None:
            self._data = self._data_path.open("wb")
        self._write(np.zeros(-self._data.tell() % ALIGNMENT, np.uint8))
        return self._data.tell()

    def _write(self, value: NDArray[Any]) -> int:
        assert self._data is not None
        view = memoryview(value.reshape(-1)).cast("B")
        self._digest.update(view)
        self._data.write(view)
        return view.nbytes

    def _reference(
        self, name: str, dtype: Any, shape: Sequence[int], offset: int, size: int
    ) -> onnx.TensorProto:
        assert self._data_path is not None
        tensor = TensorProto(
            name=name,
            data_type=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)),
            dims=shape,
            data_location=TensorProto.EXTERNAL,
        )
        for key, entry in (("location", self._data_path.name), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(entry))
        return tensor


def _key(array: NDArray[Any]) -> tuple[Any, ...]:
    return (array.dtype.str, array.shape, array.tobytes())
