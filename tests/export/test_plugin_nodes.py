"""Plugin nodes: ONNX Runtime computes them through their bodies, over the bytes that the kernels read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from crab_edge_calibration import quantize_rtn
from crab_edge_export.graph import FLOAT16, GraphBuilder
from crab_edge_export.linear import join_columns
from crab_edge_export.plugin_nodes import PluginNodes

from crab_edge.ilora.tensorrt_plugins import OPERATORS
from crab_edge.lowbit import dequantize

RANDOM = np.random.default_rng(5)


def weight(n: int, k: int, bits: int, block: int):
    return quantize_rtn(RANDOM.normal(size=(n, k)).astype(np.float32), bits, block, None)


def activations(*shape: int):
    return RANDOM.normal(size=shape).astype(np.float16)


def saved(graph):
    """The model that `graph` writes."""
    with tempfile.TemporaryDirectory() as folder:
        graph.save(Path(folder) / "model.onnx")
        return onnx.load(str(Path(folder) / "model.onnx"))


def run(build, feeds: dict, rank: int = 3):
    """(output of the graph that `build` writes with its plugin nodes, the nodes)."""
    graph = GraphBuilder("test")
    for name, value in feeds.items():
        axes = [f"{name}_{i}" for i in range(value.ndim - 1)]
        graph.input(name, FLOAT16, [*axes, value.shape[-1]])
    nodes = PluginNodes(graph)
    build(nodes)
    graph.output("y", FLOAT16, [f"y_{i}" for i in range(rank)])
    model = saved(graph)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feeds)[0], nodes


def close(actual, expected) -> None:
    assert actual.dtype == np.float16 and actual.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual.astype(np.float32), expected, rtol=2e-3, atol=2e-3 * scale)


@pytest.mark.parametrize(("bits", "block", "k"), [(4, 32, 96), (8, 16, 48), (4, 64, 100), (8, 128, 200)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_plain_product_with_whole_and_partial_blocks(bits, block, k, biased):
    w = weight(40, k, bits, block)
    bias = RANDOM.normal(size=40).astype(np.float16) if biased else None
    x = activations(2, 3, k)
    y, nodes = run(lambda n: n.linear("lin", "x", w, "y", bias=bias), {"x": x})
    close(y, x.astype(np.float32) @ dequantize(w).T + (0 if bias is None else bias))
    assert [p.plugin for p in nodes.products.values()] == ["LowBitLinearBias" if biased else "LowBitLinear"]


@pytest.mark.parametrize("planes", [1, 2])
def test_experts_folded_into_the_product(planes):
    parts = [weight(24, 64, 4, 32), *(weight(24, 96, 4, 32) for _ in range(planes))]
    x, z = activations(1, 5, 64), activations(1, 5, 96)
    joined = join_columns(parts)
    y, nodes = run(
        lambda n: n.linear("lin", "x", joined, "y", z="z", z_width=96, planes=planes), {"x": x, "z": z}
    )
    both = np.concatenate([x] + [z] * planes, axis=-1).astype(np.float32)
    close(y, both @ dequantize(joined).T)
    (product,) = nodes.products.values()
    assert (product.k, product.k2, product.planes, product.columns) == (64, 96, planes, 24)
    assert product.types == ("float16", "float16", "int8", "float16")


def test_experts_beside_the_product():
    w, b = weight(24, 64, 4, 32), weight(24, 48, 8, 16)
    bias = RANDOM.normal(size=24).astype(np.float16)
    x, z = activations(7, 64), activations(7, 48)
    y, nodes = run(
        lambda n: n.linear_experts("lin", "x", "z", w, b, "y", bias=bias), {"x": x, "z": z}, rank=2
    )
    close(y, x.astype(np.float32) @ dequantize(w).T + z.astype(np.float32) @ dequantize(b).T + bias)
    assert len(next(iter(nodes.products.values())).types) == 7
    y, _ = run(lambda n: n.experts("e", "y0", "z", b, "y"), {"y0": y, "z": z}, rank=2)


def test_the_route_of_a_group():
    rank, experts, groups = 8, 3, 2
    w = weight(groups * (rank + experts), 64, 8, 32)
    x = activations(1, 6, 64)
    sizes = {"rank": rank, "experts": experts, "groups": groups}
    y, nodes = run(lambda n: n.route("r", "x", w, "y", **sizes), {"x": x})
    products = (x.astype(np.float32) @ dequantize(w).T).reshape(1, 6, groups, rank + experts)
    h, logits = products[..., :rank], products[..., rank:]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = (p[..., None] * h[..., None, :]).reshape(1, 6, groups * experts * rank)
    close(y, expected)
    (product,) = nodes.products.values()
    assert product.columns == 48


def test_equal_products_share_a_kernel_and_the_node_is_a_plugin_s():
    graph = GraphBuilder("test")
    nodes = PluginNodes(graph)
    graph.input("x", FLOAT16, [1, "s", 64])
    for i in range(3):
        nodes.linear(f"lin{i}", "x", weight(32, 64, 4, 32), f"y{i}")
    nodes.linear("other", "x", weight(48, 64, 4, 32), "y3")
    for i in range(4):
        graph.output(f"y{i}", FLOAT16, [1, "s", 48 if i == 3 else 32])
    assert nodes.count == 4 and len(nodes.products) == 2
    model = saved(graph)
    assert len({name for name in nodes.products}) == 2
    for node in model.graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.op_type in OPERATORS and node.domain == "crab"
        # What TensorRT's parser prefers a plugin for, and what forbids a kernel that needs Python.
        assert attributes["plugin_namespace"] == b"crab" and attributes["aot"] == 1
        assert attributes["kernel"].decode() in nodes.products
    codes = [t for t in model.graph.initializer if t.name.endswith(".weight")]
    assert {t.data_type for t in codes} == {onnx.TensorProto.INT8}
