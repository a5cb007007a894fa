"""The traced variant of a decoder graph: the same graph, with the weights of every router as outputs more.

Protocol Buffers merge messages that follow each other: appended to the bytes of a model file, a second model
whose graph holds nodes, weights and outputs only adds these to the first one's graph. So the traced variant
of any exported decoder is its file and a few kilobytes, and nothing in the bundle changes.

For every `crab::ILoRARoute` the addition computes g = softmax_fp32(R x) from the node's own input x and the
rows of its own weight that are R, with the product that the node's body uses:

    Gather R's rows of AR -> product with x -> Reshape [1, S, groups, experts] -> Cast float32 -> Softmax

The Gathers fold into constants when the graph is opened, so a pass costs next to nothing more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from crab_edge.graph_file import Node, read_nodes
from crab_edge.protobuf import field

# Of onnx.proto: field numbers by message, and values of its enumerations.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_OUTPUT = 1, 5, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 8, 20
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_FLOAT, _INT64, _IS_INT, _IS_INTS = 1, 7, 2, 7

_CRAB, _MICROSOFT, _ROUTE = "crab", "com.microsoft", "ILoRARoute"
_ROOT, _ROUTE_SUFFIX, _Z_SUFFIX = "language_model.", ".ilora_route", ".z"
PREFIX = "router_trace"
"""Begins the name of everything that is added."""


@dataclass(frozen=True)
class Route:
    """One ILoRARoute of a graph: `inputs` are x, AR and, unless it is float, AR's scales.

    `layers` are the module paths of the group's linears; `sizes` the node's attributes.
    """

    inputs: tuple[str, ...]
    layers: tuple[str, ...]
    sizes: Mapping[str, int]


def routes(model: bytes) -> list[Route]:
    """The routes of a model file, in the order of the graph.

    ValueError where the file isn't a model or a route isn't one of ours.
    """
    nodes = read_nodes(model)
    splits = {node.inputs[0]: node.outputs for node in nodes if node.kind == "Split" and node.inputs}
    return [_route(node, splits) for node in nodes if (node.domain, node.kind) == (_CRAB, _ROUTE)]


def _route(node: Node, splits: Mapping[str, Sequence[str]]) -> Route:
    sizes = node.ints
    missing = {"K", "rank", "experts", "groups", "bits"} - sizes.keys()
    if missing:
        raise ValueError(f"{node.name} lacks the attribute {min(missing)}")
    if len(node.inputs) != (2 if sizes["bits"] == 32 else 3) or len(node.outputs) != 1:
        raise ValueError(f"{node.name} has {len(node.inputs)} inputs and {len(node.outputs)} outputs")
    group = node.name.removesuffix(_ROUTE_SUFFIX)
    parts = splits.get(node.outputs[0], ())
    if sizes["groups"] == 1:
        layers = [group]
    elif len(parts) == sizes["groups"] and all(part.endswith(_Z_SUFFIX) for part in parts):
        layers = [part.removesuffix(_Z_SUFFIX) for part in parts]
    else:
        layers = [f"{group}.{number}" for number in range(sizes["groups"])]
    return Route(tuple(node.inputs), tuple(layer.removeprefix(_ROOT) for layer in layers), sizes)


def output_name(number: int) -> str:
    """Of the output float32 [1, S, groups, experts] that belongs to the route `number` of `routes`."""
    return f"{PREFIX}.{number}"


def addition(found: Sequence[Route]) -> bytes:
    """The bytes that turn the model whose routes are `found` into its traced variant when appended to it."""
    constants: dict[str, bytes] = {}
    parts = [part for number, route in enumerate(found) for part in _trace(number, route, constants)]
    graph = b"".join([*parts, *(field(_GRAPH_INITIALIZER, tensor) for tensor in constants.values())])
    return field(_MODEL_GRAPH, graph)


def _trace(number: int, route: Route, constants: dict[str, bytes]) -> list[bytes]:
    """The graph's fields for one route."""
    name, sizes, x = output_name(number), route.sizes, route.inputs[0]
    rank, experts, groups = sizes["rank"], sizes["experts"], sizes["groups"]
    rows = [g * (rank + experts) + rank + e for g in range(groups) for e in range(experts)]
    index = _constant(constants, f"rows.{rank}.{experts}.{groups}", rows)
    shape = _constant(constants, f"shape.{experts}.{groups}", [0, 0, groups, experts])

    nodes = [
        _node("Gather", [weight, index], f"{name}.{part}", axis=0)
        for weight, part in zip(route.inputs[1:], ("weight", "scales"), strict=False)
    ]
    if sizes["bits"] == 32:
        nodes.append(_node("Transpose", [f"{name}.weight"], f"{name}.turned", perm=[1, 0]))
        nodes.append(_node("MatMul", [x, f"{name}.turned"], f"{name}.product"))
    else:
        how = {"K": sizes["K"], "N": len(rows), "bits": sizes["bits"], "block_size": sizes["block"]}
        how["accuracy_level"] = sizes.get("accuracy_level", 0)
        inputs = [x, f"{name}.weight", f"{name}.scales"]
        nodes.append(_node("MatMulNBits", inputs, f"{name}.product", _MICROSOFT, **how))
    nodes += [
        _node("Reshape", [f"{name}.product", shape], f"{name}.logits"),
        _node("Cast", [f"{name}.logits"], f"{name}.logits32", to=_FLOAT),
        _node("Softmax", [f"{name}.logits32"], name, axis=-1),
    ]
    out = [field(_GRAPH_NODE, node) for node in nodes]
    out.append(field(_GRAPH_OUTPUT, _value_info(name, [1, "S", groups, experts])))
    return out


def _node(
    kind: str, inputs: Iterable[str], output: str, domain: str = "", **attributes: int | Sequence[int]
) -> bytes:
    """A NodeProto, named after its output."""
    parts = [field(_NODE_INPUT, name) for name in inputs]
    parts += [field(_NODE_OUTPUT, output), field(_NODE_NAME, output), field(_NODE_TYPE, kind)]
    for name, value in attributes.items():
        attribute = field(_ATTRIBUTE_NAME, name)
        if isinstance(value, int):
            attribute += field(_ATTRIBUTE_INT, value) + field(_ATTRIBUTE_TYPE, _IS_INT)
        else:
            attribute += b"".join(field(_ATTRIBUTE_INTS, item) for item in value)
            attribute += field(_ATTRIBUTE_TYPE, _IS_INTS)
        parts.append(field(_NODE_ATTRIBUTE, attribute))
    if domain:
        parts.append(field(_NODE_DOMAIN, domain))
    return b"".join(parts)


def _constant(constants: dict[str, bytes], key: str, values: Sequence[int]) -> str:
    """An int64 [n] initializer, shared by all that want the same."""
    name = f"{PREFIX}.{key}"
    raw = struct.pack(f"<{len(values)}q", *values)
    constants[name] = (
        field(_TENSOR_DIMS, len(values))
        + field(_TENSOR_TYPE, _INT64)
        + field(_TENSOR_NAME, name)
        + field(_TENSOR_RAW, raw)
    )
    return name


def _value_info(name: str, shape: Sequence[int | str]) -> bytes:
    """A float32 ValueInfoProto: name = 1, type = 2 / tensor_type = 1 / elem_type = 1, shape = 2 / dim = 1."""
    dims = b"".join(field(1, field(1, size) if isinstance(size, int) else field(2, size)) for size in shape)
    tensor = field(1, _FLOAT) + field(2, dims)
    return field(1, name) + field(2, field(1, tensor))
