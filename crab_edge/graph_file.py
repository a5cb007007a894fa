"""Reads ONNX files without the package `onnx`: nodes with their attributes, and weights as mapped arrays.

An engine that runs a bundle's weights by itself needs names, numbers and bytes, not a checker or a shape
inference; a device gets by with `crab_edge.protobuf` then. Nothing is copied: the model file and its data
file are mapped privately, and a page is read when somebody looks at it.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge.protobuf import fields

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of onnx.proto: field numbers by message, and values of its enumerations.
_MODEL_PRODUCER, _MODEL_VERSION, _MODEL_GRAPH = 2, 3, 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_FLOAT, _ATTRIBUTE_INT = 1, 2, 3
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}


@dataclass(frozen=True)
class Node:
    """What is read of a node; absent inputs are empty names, attributes of other kinds are left out."""

    kind: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, int]
    floats: Mapping[str, float]


@dataclass(frozen=True)
class _Tensor:
    """Where a weight lies: in the model file (`raw`), or in the file `location` of its folder."""

    dtype: str
    shape: tuple[int, ...]
    raw: memoryview | None
    location: str = ""
    offset: int = 0

    @property
    def n_bytes(self) -> int:
        width = {"float32": 4, "int32": 4, "int64": 8, "float16": 2}.get(self.dtype, 1)
        return width * math.prod(self.shape)


def read_nodes(model: bytes | memoryview) -> list[Node]:
    """The nodes of a model, in its order. ValueError where the bytes aren't a model."""
    graphs = (value for number, value in fields(memoryview(model)) if number == _MODEL_GRAPH)
    return [_node(value) for graph in graphs for number, value in _message(graph) if number == _GRAPH_NODE]


class GraphFile:
    """An ONNX file: `nodes`, `producer` (name and version) and, by name, its weights.

    Raises OSError where a file can't be read, ValueError (with what is wrong) where it isn't a model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: dict[str, memoryview] = {}
        model = self._mapped(path.name)
        self.producer = ""
        self.nodes: list[Node] = []
        self._weights: dict[str, _Tensor] = {}
        for number, value in fields(model):
            if number in (_MODEL_PRODUCER, _MODEL_VERSION):
                self.producer = f"{self.producer} {_text(value)}".strip()
            elif number == _MODEL_GRAPH:
                for part, message in _message(value):
                    if part == _GRAPH_NODE:
                        self.nodes.append(_node(message))
                    elif part == _GRAPH_INITIALIZER:
                        name, tensor = _tensor(message)
                        self._weights[name] = tensor
        if not self.nodes:
            raise ValueError("no graph in it")

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def n_bytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights, or of those of one type (as numpy names it)."""
        return sum(each.n_bytes for each in self._weights.values() if dtype in (None, each.dtype))

    def weight(self, name: str) -> NDArray[Any]:
        """The weight `name`, lying in the mapped file. ValueError where it isn't there or is cut off.

        The mapping is private: writing to the array changes neither the file nor what others see.
        """
        import numpy as np

        tensor = self._weights.get(name)
        if tensor is None:
            raise ValueError(f"no weight {name}")
        data = tensor.raw
        if data is None:
            data = self._mapped(tensor.location)[tensor.offset : tensor.offset + tensor.n_bytes]
        if len(data) != tensor.n_bytes:
            raise ValueError(f"weight {name} has {len(data)} bytes, expected {tensor.n_bytes}")
        return np.frombuffer(data, tensor.dtype).reshape(tensor.shape)

    def _mapped(self, name: str) -> memoryview:
        if name not in self._maps:
            with (self.path.parent / name).open("rb") as file:
                # Copy on write, because torch takes no read-only arrays.
                self._maps[name] = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
        return self._maps[name]


def _message(value: int | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return fields(value)


def _text(value: int | memoryview) -> str:
    if isinstance(value, int):
        raise ValueError("a number where a text belongs")
    return str(value, "utf-8")


def _signed(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ValueError("a text where a number belongs")
    return value - (1 << 64) if value >> 63 else value


def _node(message: int | memoryview) -> Node:
    texts: dict[int, list[str]] = {}
    ints: dict[str, int] = {}
    floats: dict[str, float] = {}
    for number, value in _message(message):
        if number == _NODE_ATTRIBUTE:
            parts = dict(_message(value))
            name, found = _text(parts.get(_ATTRIBUTE_NAME, 0)), parts.get(_ATTRIBUTE_FLOAT)
            if _ATTRIBUTE_INT in parts:
                ints[name] = _signed(parts[_ATTRIBUTE_INT])
            elif isinstance(found, memoryview) and len(found) == 4:
                (floats[name],) = struct.unpack("<f", found)
        elif isinstance(value, memoryview):
            texts.setdefault(number, []).append(_text(value))
    kind, domain, name = ("".join(texts.get(n, [])) for n in (_NODE_TYPE, _NODE_DOMAIN, _NODE_NAME))
    inputs, outputs = tuple(texts.get(_NODE_INPUT, ())), tuple(texts.get(_NODE_OUTPUT, ()))
    return Node(kind, domain, name, inputs, outputs, ints, floats)


def _tensor(message: int | memoryview) -> tuple[str, _Tensor]:
    name, kind, raw = "", 0, None
    shape: list[int] = []
    place: dict[str, str] = {}
    for number, value in _message(message):
        if number == _TENSOR_DIMS:
            shape.append(_signed(value))
        elif number == _TENSOR_TYPE:
            kind = _signed(value)
        elif number == _TENSOR_NAME:
            name = _text(value)
        elif number == _TENSOR_RAW and isinstance(value, memoryview):
            raw = value
        elif number == _TENSOR_EXTERNAL:
            entry = dict(_message(value))
            place[_text(entry.get(_ENTRY_KEY, 0))] = _text(entry.get(_ENTRY_VALUE, 0))
    if kind not in _DTYPES or min(shape, default=0) < 0:
        raise ValueError(f"weight {name} is of type {kind} and shape {shape}")
    location, offset = place.get("location", ""), int(place.get("offset", 0))
    if raw is None and (Path(location).name != location or not location or offset < 0):
        raise ValueError(f"weight {name} has no bytes, and no place beside the model ({location!r})")
    return name, _Tensor(_DTYPES[kind], tuple(shape), raw, location, offset)
