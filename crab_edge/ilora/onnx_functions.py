"""I-LoRA's two ONNX operators, `crab::ILoRARoute` and `crab::ILoRAExperts`, as functions with bodies.

A consumer that knows the operators (a plugin, a kernel) takes each as one node; every other inlines the
body. All attributes are scalars, because TensorRT's Python plugins refuse lists.

    ILoRARoute(x [batch, tokens, K], AR, AR_scale) -> z [batch, tokens, groups*experts*rank]
    ILoRAExperts(y0 [batch, tokens, N], z [batch, tokens, K], B, B_scale) -> y = y0 + z B^T

AR and B are MatMulNBits operands (`crab_edge.lowbit`); in float files (`bits=32`) they are plain [N, K] and
the scale inputs are absent. Orders, both made here:
- rows of AR (`stack_routes`): for every linear of the group its A (rank rows), then its R (experts rows);
- z, and columns of B (`concat_experts`, with s = alpha / r folded in): linear by linear, expert by expert,
  rank inside.

The route's body is 7 nodes at run time (product, Reshape, Split, Softmax, Reshape, Mul, Reshape). Rows
interleaved by linear let one Reshape put every h and g where they are needed, with the softmax over the
last axis; on ONNX Runtime's CPU this beat all A before all R (softmax over the last axis but one) and a
batched outer product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from crab_edge.errors import CrabError

DOMAIN = "crab"
VERSION = 1
OPSET = 21
MICROSOFT = "com.microsoft"
ROUTE, EXPERTS = "ILoRARoute", "ILoRAExperts"
FLOAT = 32


def stack_routes(A: Sequence[NDArray[np.floating]], R: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """AR [groups*(rank+experts), K] of linears that share an input: A_0, R_0, A_1, R_1, ..."""
    if (
        len(A) != len(R)
        or not A
        or any(a.shape != A[0].shape for a in A)
        or any(r.shape != R[0].shape for r in R)
    ):
        raise CrabError(
            f"a group needs A and R of one shape each, got {[a.shape for a in A]} {[r.shape for r in R]}"
        )
    return np.concatenate([m for pair in zip(A, R, strict=True) for m in pair], axis=0).astype(np.float32)


def concat_experts(B: Sequence[NDArray[np.floating]], scale: float) -> NDArray[np.float32]:
    """s [B_0|..|B_{N-1}], [out, experts*rank], of one linear."""
    return (np.concatenate(list(B), axis=1) * scale).astype(np.float32)


def functions(bits: int) -> list[FunctionProto]:
    """Both bodies for a file: `bits` 4 or 8 (one body serves both), or 32 for float files."""
    _check(bits)
    return [_route(bits == FLOAT), _experts(bits == FLOAT)]


def opset_imports() -> list:
    """What a model that uses the operators imports."""
    return [
        helper.make_opsetid("", OPSET),
        helper.make_opsetid(MICROSOFT, 1),
        helper.make_opsetid(DOMAIN, VERSION),
    ]


def route_node(
    inputs: Sequence[str],
    output: str,
    *,
    K: int,
    rank: int,
    experts: int,
    groups: int,
    bits: int,
    block: int = 0,
    accuracy_level: int = 0,
    name: str = "",
) -> NodeProto:
    """One ILoRARoute. `inputs` are x, AR, AR_scale (x, AR in float files)."""
    sizes = {"K": K, "N": groups * (rank + experts), "rank": rank, "experts": experts, "groups": groups}
    return _node(ROUTE, inputs, output, 3, sizes, bits, block, accuracy_level, name)


def experts_node(
    inputs: Sequence[str],
    output: str,
    *,
    K: int,
    N: int,
    bits: int,
    block: int = 0,
    accuracy_level: int = 0,
    name: str = "",
) -> NodeProto:
    """One ILoRAExperts of K = experts*rank, N = out. `inputs` are y0, z, B, B_scale (no scale in float)."""
    return _node(EXPERTS, inputs, output, 4, {"K": K, "N": N}, bits, block, accuracy_level, name)


def _node(
    op: str,
    inputs: Sequence[str],
    output: str,
    arity: int,
    sizes: dict[str, int],
    bits: int,
    block: int,
    accuracy_level: int,
    name: str,
) -> NodeProto:
    _check(bits)
    expected = arity - 1 if bits == FLOAT else arity
    if len(inputs) != expected:
        raise CrabError(f"{op} with bits={bits} takes {expected} inputs, got {len(inputs)}")
    attributes: dict[str, Any] = {**sizes, "bits": bits}
    if bits != FLOAT:
        attributes |= {"block": block, "accuracy_level": accuracy_level}
    return helper.make_node(op, inputs, [output], name=name or output, domain=DOMAIN, **attributes)


def _check(bits: int) -> None:
    if bits not in (4, 8, FLOAT):
        raise CrabError(f"I-LoRA operators of {bits} bits don't exist: expected 4, 8 or {FLOAT} (float)")


def _reference(node: NodeProto, attribute: str, of: str) -> None:
    """Let a node of a body take an attribute from the attribute `of` of the function's caller."""
    node.attribute.append(AttributeProto(name=attribute, ref_attr_name=of, type=AttributeProto.INT))


def _product(x: str, weight: str, output: str, is_float: bool) -> list[NodeProto]:
    """x times the transpose of a [N, K] weight."""
    if is_float:
        turned = f"{weight}_T"
        return [
            helper.make_node("Transpose", [weight], [turned], perm=[1, 0]),
            helper.make_node("MatMul", [x, turned], [output]),
        ]
    node = helper.make_node("MatMulNBits", [x, weight, f"{weight}_scale"], [output], domain=MICROSOFT)
    for attribute, of in (("K", "K"), ("N", "N"), ("bits", "bits"), ("block_size", "block")):
        _reference(node, attribute, of)
    _reference(node, "accuracy_level", "accuracy_level")
    return [node]


def _function(
    name: str, inputs: list[str], output: str, sizes: list[str], nodes: list, is_float: bool
) -> FunctionProto:
    defaults = [] if is_float else [helper.make_attribute("accuracy_level", 0)]
    return helper.make_function(
        DOMAIN,
        name,
        inputs,
        [output],
        nodes,
        opset_imports()[:2],
        attributes=[*sizes, "bits"] if is_float else [*sizes, "bits", "block"],
        attribute_protos=defaults,
    )


def _route(is_float: bool) -> FunctionProto:
    nodes = _product("x", "AR", "products", is_float)

    def ints(name: str, values: list[int]) -> str:
        nodes.append(helper.make_node("Constant", [], [name], value_ints=values))
        return name

    def size(attribute: str) -> str:
        scalar = helper.make_node("Constant", [], [f"{attribute}_scalar"])
        _reference(scalar, "value_int", attribute)
        nodes.append(scalar)
        nodes.append(helper.make_node("Reshape", [f"{attribute}_scalar", "one"], [f"{attribute}_size"]))
        return f"{attribute}_size"

    def shape(name: str, parts: list[str]) -> str:
        nodes.append(helper.make_node("Concat", parts, [name], axis=0))
        return name

    # Everything up to here depends on attributes only and is folded when the file is opened.
    ints("one", [1])
    ints("keep", [0, 0])
    ints("rest", [-1])
    groups = size("groups")
    by_linear = shape("by_linear", ["keep", groups, "one", "rest"])
    as_column = shape("as_column", ["keep", groups, "rest", "one"])
    parts = shape("parts", [size("rank"), size("experts")])
    ints("flat", [0, 0, -1])
    nodes += [
        helper.make_node("Reshape", ["products", by_linear], ["linears"]),
        helper.make_node("Split", ["linears", parts], ["h", "logits"], axis=-1),
        # The router's softmax is fp32 in every file; in fp32 files both casts vanish.
        helper.make_node("Cast", ["logits"], ["logits32"], to=TensorProto.FLOAT),
        helper.make_node("Softmax", ["logits32"], ["weights32"], axis=-1),
        helper.make_node("CastLike", ["weights32", "h"], ["weights"]),
        helper.make_node("Reshape", ["weights", as_column], ["g"]),
        helper.make_node("Mul", ["g", "h"], ["outer"]),
        helper.make_node("Reshape", ["outer", "flat"], ["z"]),
    ]
    inputs = ["x", "AR"] if is_float else ["x", "AR", "AR_scale"]
    return _function(ROUTE, inputs, "z", ["K", "N", "rank", "experts", "groups"], nodes, is_float)


def _experts(is_float: bool) -> FunctionProto:
    nodes = [*_product("z", "B", "mixed", is_float), helper.make_node("Add", ["y0", "mixed"], ["y"])]
    inputs = ["y0", "z", "B"] if is_float else ["y0", "z", "B", "B_scale"]
    return _function(EXPERTS, inputs, "y", ["K", "N"], nodes, is_float)
