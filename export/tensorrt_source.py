"""A graph of a bundle, read to be rewritten: its nodes, and its weights one at a time, mapped from disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from crab_edge.errors import BundleError
from crab_edge.lowbit import QTensor
from crab_edge.manifest import COPY_AGAIN


class Source:
    """The ONNX file `path` of an opened bundle. Large weights stay on the disk until they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except Exception as error:
            raise BundleError(f"{path}: not an ONNX file ({error}); {COPY_AGAIN}") from None
        self.graph = self.model.graph
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self._by_output = {out: node for node in self.graph.node for out in node.output if out}

    def live(self, wanted: list[str]) -> Iterator[onnx.NodeProto]:
        """The nodes that `wanted` values depend on, in the graph's order."""
        needed, stack = set(), list(wanted)
        while stack:
            node = self._by_output.get(stack.pop())
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                stack += node.input
        return (node for node in self.graph.node if id(node) in needed)

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that makes a value; None for inputs and weights."""
        return self._by_output.get(name)

    def rename_value(self, name: str) -> str:
        """Gives what is computed under an output's name another one, which is returned: the first is free."""
        node = self._by_output.pop(name)
        renamed = f"{name}.value"
        node.output[list(node.output).index(name)] = renamed
        self._by_output[renamed] = node
        return renamed

    def shape(self, name: str) -> list[int | str]:
        """Shape of an input or output of the graph."""
        for value in (*self.graph.input, *self.graph.output):
            if value.name == name:
                return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        raise BundleError(f"{self.path}: has no input or output {name}; {COPY_AGAIN}")

    def kind(self, name: str) -> int:
        """Element type (TensorProto) of an input of the graph."""
        return next(i.type.tensor_type.elem_type for i in self.graph.input if i.name == name)

    def array(self, name: str) -> NDArray[Any]:
        """A weight's values; those in a data file are mapped, not read."""
        tensor = self.weights[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file = self.path.parent / Path(entries["location"]).name
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        return np.memmap(file, dtype, "r", int(entries.get("offset", 0)), tuple(tensor.dims))

    def quantised(self, codes: str, scales: str, k: int, bits: int, block: int) -> QTensor:
        """A low-bit weight [N, k] by the names of its codes and scales."""
        q, found = self.array(codes), self.array(scales)
        return QTensor(q, np.asarray(found).reshape(q.shape[:2]), bits, block, (len(q), k))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes by name."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}
