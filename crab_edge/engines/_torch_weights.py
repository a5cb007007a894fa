"""A bundle's graph as torch weights: linears with their adapters, norms and tables, on one device.

The forwards of the torch engine are written by hand and look their weights up by the names of the nodes.
Every node they stand for is taken from the graph; one that is left over, or that isn't what was expected,
means that another version wrote the graph, and it is refused instead of being run without that node.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from crab_edge import __version__
from crab_edge.errors import BundleError, CrabError, EngineError
from crab_edge.graph_file import GraphFile, Node
from crab_edge.ilora import torch_ops
from crab_edge.lowbit import QTensor, dequantize
from crab_edge.manifest import COPY_AGAIN

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    Seen = Callable[["Group", Tensor], None]

FLOAT = 32
# What `crab::lowbit_linear` takes as one: so many linears, each from a row on that is a multiple of the tile.
_JOINED, _TILE = 3, 16


@dataclass(frozen=True)
class LowBit:
    """A MatMulNBits operand on the device: codes, scales, an optional bias [N] of the activations' type."""

    q: Tensor
    scales: Tensor
    bits: int
    block: int
    bias: Tensor | None = None


@dataclass(frozen=True)
class Float:
    """A float operand, `weight` [K, N] as it lies in the file, and an optional bias [N]."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """[M, K] -> [M, N]."""
        out = x @ self.weight
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Route:
    """A group's router and shared projections: x [M, K] -> z [M, groups*experts*rank]."""

    operand: LowBit | Float
    rank: int
    experts: int
    groups: int
    stored: QTensor | NDArray[np.float32]
    """The stack of A and R as it lies in the file."""

    def __call__(self, x: Tensor) -> Tensor:
        sizes = (self.rank, self.experts, self.groups)
        if isinstance(self.operand, LowBit):
            low = self.operand
            return torch.ops.crab.ilora_route(x, low.q, low.scales, low.bits, low.block, *sizes)
        products = self.operand(x).unflatten(-1, (self.groups, self.rank + self.experts))
        h, logits = products.split([self.rank, self.experts], dim=-1)
        p = logits.float().softmax(-1).to(h.dtype)
        return (p[..., :, None] * h[..., None, :]).flatten(1)

    def router(self) -> NDArray[np.float32]:
        """R of the group's linears, [groups, experts, K], for who wants to see what it chooses."""
        first = np.arange(self.groups)[:, None] * (self.rank + self.experts) + self.rank
        rows = (first + np.arange(self.experts)).reshape(-1)
        stored = self.stored
        if isinstance(stored, QTensor):
            K = stored.shape[1]
            stored = dequantize(
                QTensor(stored.q[rows], stored.scales[rows], stored.bits, stored.block, (len(rows), K))
            )
        else:
            stored = stored[rows]
        return stored.reshape(self.groups, self.experts, -1)


@dataclass(frozen=True)
class Linear:
    """One linear: its base, and where an adapter is, how z [M, groups*experts*rank] enters.

    planes: times that z is repeated behind x in the base product; experts: B beside the base instead;
    begin, end: this linear's columns of z. rows: of the linears that `joined` made this one of.
    """

    base: LowBit | Float
    planes: int = 0
    experts: LowBit | Float | None = None
    begin: int = 0
    end: int = 0
    rows: tuple[int, ...] = ()

    def __call__(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """[M, K] -> [M, N]."""
        mine = None if z is None or not self.end else z[:, self.begin : self.end]
        base, experts = self.base, self.experts
        if isinstance(base, Float):
            both = x if mine is None or not self.planes else torch.cat([x] + [mine] * self.planes, dim=1)
            out = base(both)
            return out if mine is None or experts is None else out + _product(experts, mine)
        if experts is None:
            sizes = (base.bits, base.block, self.planes, base.bias)
            rows = list(self.rows) if self.rows and mine is not None else None
            return torch.ops.crab.lowbit_linear(x, mine, base.q, base.scales, *sizes, rows)
        if isinstance(experts, Float):
            return _product(base, x) + experts(mine)
        return torch.ops.crab.lowbit_linear_experts(
            x,
            mine,
            base.q,
            base.scales,
            base.bits,
            base.block,
            experts.q,
            experts.scales,
            experts.bits,
            experts.block,
            base.bias,
        )


def _product(operand: LowBit | Float, x: Tensor) -> Tensor:
    if isinstance(operand, Float):
        return operand(x)
    sizes = (operand.bits, operand.block, 0, operand.bias)
    return torch.ops.crab.lowbit_linear(x, None, operand.q, operand.scales, *sizes)


@dataclass(frozen=True)
class Group:
    """Linears of one input, and the router that they share if any of them is adapted."""

    linears: tuple[Linear, ...]
    route: Route | None
    adapted: tuple[str, ...]
    """Names of the linears that have an adapter, in the order of z."""

    def __call__(self, x: Tensor, seen: Seen | None = None) -> list[Tensor]:
        """[M, K] -> one [M, N] a linear, maybe columns of a wider matrix.

        `seen(group, x)` is told of a route that is passed.
        """
        z = None
        if self.route is not None:
            if seen is not None:
                seen(self, x)
            z = self.route(x)
        outs: list[Tensor] = []
        for linear in self.linears:
            y = linear(x, z)
            outs += y.split(linear.rows, dim=-1) if linear.rows else [y]
        return outs


def joined(group: Group) -> Group:
    """The group with its linears as one, where one launch can run them; else the group as it is.

    They must be stored alike, experts inside the base product or absent, and begin at rows that a tile
    doesn't straddle.
    """
    linears = group.linears
    bases = [linear.base for linear in linears if isinstance(linear.base, LowBit) and linear.experts is None]
    ends = [linear.end for linear in linears]
    if not 2 <= len(bases) == len(linears) <= _JOINED or not (all(ends) or not any(ends)):
        return group
    alike = {(base.bits, base.block, base.q.shape[1], base.scales.dtype) for base in bases}
    rows = tuple(len(base.q) for base in bases)
    whole = all(begin % _TILE == 0 for begin in itertools.accumulate(rows[:-1]))
    in_order = [linear.begin for linear in linears] == [0, *ends[:-1]] or not any(ends)
    if len(alike) > 1 or len({linear.planes for linear in linears}) > 1 or not whole or not in_order:
        return group
    bias = None
    if any(base.bias is not None for base in bases):
        parts = [base.scales.new_zeros(len(base.q)) if base.bias is None else base.bias for base in bases]
        kind = next(base.bias.dtype for base in bases if base.bias is not None)
        bias = torch.cat([part.to(kind) for part in parts])
    q = torch.cat([base.q for base in bases])
    # The kernels read scales column by column, also where there is one column.
    scales = bases[0].scales.new_empty(q.shape[1], len(q)).t()
    scales.copy_(torch.cat([base.scales for base in bases]))
    base = LowBit(q, scales, bases[0].bits, bases[0].block, bias)
    return replace(group, linears=(Linear(base, linears[0].planes, None, 0, max(ends), rows),))


class GraphReader:
    """Takes the nodes of one graph and puts their weights on `device`, floats as `dtype`.

    Raises BundleError for a damaged graph, EngineError for one of a form that this version doesn't know.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype) -> None:
        try:
            self._file = GraphFile(path)
        except OSError as error:
            raise BundleError(f"{path}: can't be read ({error.strerror}); {COPY_AGAIN}") from error
        except ValueError as error:
            raise BundleError(f"{path}: not a graph ({error}); {COPY_AGAIN}") from error
        self.path, self.device, self.dtype = path, device, dtype
        self._nodes = {output: node for node in self._file.nodes for output in node.outputs if output}
        self._left = {node.outputs[0]: node for node in self._file.nodes}
        self._routes: dict[str, Route] = {}

    def __contains__(self, output: str) -> bool:
        return output in self._nodes

    def device_bytes(self) -> int:
        """What the weights take on the device: codes as they are, floats in the reader's type."""
        floats = self._file.n_bytes("float32")
        return self._file.n_bytes() - floats + floats * self.dtype.itemsize // 4

    def take(self, output: str, *kinds: str) -> Node:
        """The node that makes `output`, which must be of one of `kinds`."""
        node = self._nodes.get(output)
        if node is None or node.kind not in kinds:
            raise self._unknown(f"{output} is {'missing' if node is None else 'a ' + node.kind}")
        self._left.pop(node.outputs[0], None)
        return node

    def finish(self) -> None:
        """Raises EngineError where nodes are left that no forward stands for."""
        if self._left:
            name, node = next(iter(self._left.items()))
            raise self._unknown(f"it has the node {name} ({node.kind}) and {len(self._left) - 1} more")

    def _unknown(self, what: str) -> EngineError:
        return EngineError(
            f"{self.path}: engine torch of crab-edge {__version__} doesn't know this form of graph (written "
            f"by {self._file.producer or 'an unknown program'}): {what}; export the model again or use "
            "engine onnxruntime"
        )

    def array(self, name: str) -> NDArray[Any]:
        """A weight as it lies in the mapped file."""
        try:
            return self._file.weight(name)
        except (OSError, ValueError) as error:
            raise BundleError(f"{self.path}: damaged ({error}); {COPY_AGAIN}") from error

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A weight on the device; floats become `dtype` (default: the reader's)."""
        tensor = _mapped(self.array(name))
        kind = (dtype or self.dtype) if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, kind)

    def group(self, outputs: Sequence[str]) -> Group:
        """The linears that make `outputs` out of one input."""
        found = [self._linear(output) for output in outputs]
        routes = [route for _, route in found if route is not None]
        if any(route is not routes[0] for route in routes):
            raise self._unknown(f"{outputs[0]} and its neighbours have different routers")
        begins = [
            (linear.begin, name) for name, (linear, _) in zip(outputs, found, strict=True) if linear.end
        ]
        adapted = tuple(name for _, name in sorted(begins))
        group = Group(tuple(linear for linear, _ in found), routes[0] if routes else None, adapted)
        return joined(group)

    def _linear(self, output: str) -> tuple[Linear, Route | None]:
        node = self.take(output, "MatMulNBits", "MatMul", "Add", "ILoRAExperts")
        if node.kind == "ILoRAExperts":
            base, _ = self._base(node.inputs[0])
            begin, end, route = self._z(node.inputs[1])
            experts = self._operand(node, node.inputs[2:], "block")
            return Linear(base, 0, experts, begin, end), route
        base, x = self._base(output)
        joined = self._nodes.get(x)
        if joined is None or joined.name != f"{output}.xz":
            return Linear(base), None
        self.take(x, "Concat")
        begin, end, route = self._z(joined.inputs[1])
        return Linear(base, len(joined.inputs) - 1, None, begin, end), route

    def _base(self, output: str) -> tuple[LowBit | Float, str]:
        """A product with its bias, and the name of its input."""
        node = self.take(output, "MatMulNBits", "MatMul", "Add")
        if node.kind == "MatMulNBits":
            bias = self.tensor(node.inputs[5]) if len(node.inputs) > 5 else None
            return self._operand(node, node.inputs[1:3], "block_size", bias), node.inputs[0]
        bias = None
        if node.kind == "Add":
            bias = self.tensor(node.inputs[1])
            node = self.take(node.inputs[0], "MatMul")
        name = node.inputs[1]
        if name in self._file:
            return Float(self.tensor(name), bias), node.inputs[0]
        turned = self.take(name, "Transpose")
        return Float(self.tensor(turned.inputs[0]).T, bias), node.inputs[0]

    def _operand(
        self, node: Node, names: Sequence[str], block: str, bias: Tensor | None = None
    ) -> LowBit | Float:
        if node.ints.get("bits") == FLOAT:
            return Float(self.tensor(names[0]).T, bias)
        stored = self._stored(node, names, block)
        weight = torch_ops.prepare(stored, self.device)
        scales = weight.scales
        if self.device.type == "cpu":
            # The reference takes the file's own float32 scales, not what the kernels make of them.
            scales = torch.from_numpy(stored.scales)
        return LowBit(weight.q, scales, weight.bits, weight.block, bias)

    def _stored(self, node: Node, names: Sequence[str], block: str) -> QTensor:
        q, scales = (np.require(self.array(name), requirements="A") for name in names)
        try:
            return QTensor(q, scales, node.ints["bits"], node.ints[block], (len(q), node.ints["K"]))
        except KeyError as error:
            raise self._unknown(f"{node.name} lacks the attribute {error}") from None
        except CrabError as error:
            raise BundleError(f"{self.path}: damaged ({node.name}: {error}); {COPY_AGAIN}") from error

    def _z(self, name: str) -> tuple[int, int, Route]:
        """A linear's columns of z, and the route that makes it."""
        node = self.take(name, "Split", "ILoRARoute")
        part = 0
        if node.kind == "Split":
            part = node.outputs.index(name)
            node = self.take(node.inputs[0], "ILoRARoute")
        route = self._route(node)
        width = route.experts * route.rank
        return part * width, (part + 1) * width, route

    def _route(self, node: Node) -> Route:
        known = self._routes.get(node.name)
        if known is not None:
            return known
        try:
            rank, experts, groups = (node.ints[name] for name in ("rank", "experts", "groups"))
        except KeyError as error:
            raise self._unknown(f"{node.name} lacks the attribute {error}") from None
        operand = self._operand(node, node.inputs[1:], "block")
        low = isinstance(operand, LowBit)
        stored = self._stored(node, node.inputs[1:], "block") if low else self.array(node.inputs[1])
        if len(stored.q if isinstance(stored, QTensor) else stored) != groups * (rank + experts):
            raise BundleError(f"{self.path}: damaged ({node.name} has rows missing); {COPY_AGAIN}")
        route = self._routes[node.name] = Route(operand, rank, experts, groups, stored)
        return route


def _mapped(array: NDArray[Any]) -> Tensor:
    """The array's own memory as a tensor; a copy where it lies at an address that torch can't take."""
    return torch.from_numpy(np.require(array, requirements=["A", "W"]))
