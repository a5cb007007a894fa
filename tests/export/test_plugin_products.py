"""The packaged model's graphs with their low-bit products as plugins, against the same graphs without."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.plugin_products import PluginProducts
from crab_edge_export.targets import target
from crab_edge_export.tensorrt_graph import rewrite_audio, rewrite_decoder, rewrite_vision
from crab_edge_export.tensorrt_products import Products
from crab_edge_export.tensorrt_source import Source

from crab_edge.bundle import Bundle, default_bundle
from crab_edge.ilora.tensorrt_plugins import OPERATORS

CAPACITY, TOKENS = 64, 5


def written(name, products, path):
    graph, source = GraphBuilder(name), Source(Bundle.open(default_bundle()).graph(name))
    if name == "decoder":
        rewrite_decoder(source, graph, products, CAPACITY)
    else:
        {"vision": rewrite_vision, "audio": rewrite_audio}[name](source, graph, products)
    graph.save(path)
    options = ort.SessionOptions()
    # Without its rewriting: it would turn DequantizeLinear and MatMul into a product on int8 activations.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def feeds(session, tokens=TOKENS):
    """Inputs for a session of any of the three graphs; `tokens` for the decoder's first pass."""
    random = np.random.default_rng(3)
    kinds = {"float": np.float32, "float16": np.float16, "int64": np.int64, "int32": np.int32}
    given = {}
    for one in session.get_inputs():
        shape = [
            axis if isinstance(axis, int) else {"patches": 256, "chunks": 1}.get(axis, tokens)
            for axis in one.shape
        ]
        dtype = kinds[one.type.removeprefix("tensor(").removesuffix(")")]
        value = random.normal(size=shape) * 0.1
        if one.name == "position_ids":
            value = np.broadcast_to(np.arange(tokens), shape)
        elif one.name == "seqlens_k":
            value = np.full(shape, tokens - 1)
        elif one.name == "lengths":
            value = np.full(shape, 200)
        elif one.name.startswith("past."):
            value = np.zeros(shape)
        given[one.name] = value.astype(dtype)
    return given


@pytest.mark.parametrize("name", ["decoder", "vision", "audio"])
def test_the_same_values_come_out(name, tmp_path):
    """Both files read the bundle's own codes; they differ by the rounding of float16 products."""
    products = PluginProducts(target("jetson-orin"))
    plugins = written(name, products, tmp_path / "plugins.onnx")
    plain = written(name, Products(), tmp_path / "plain.onnx")
    given = feeds(plain)
    first = [output.name for output in plain.get_outputs() if output.name in ("logits", "embeddings")]
    (expected,), (actual,) = plain.run(first, given), plugins.run(first, given)
    assert np.linalg.norm(actual - expected) <= 0.01 * np.linalg.norm(expected)
    model = onnx.load(str(tmp_path / "plugins.onnx"))
    ops = [node.op_type for node in model.graph.node]
    # On Orin nothing low-bit is left to the library.
    assert "DequantizeLinear" not in ops
    assert products.nodes.count == sum(ops.count(name) for name in OPERATORS)
    if name == "decoder":
        kinds = {one.plugin for one in products.kernels.values()}
        assert kinds == {"ILoRARoute", "ILoRALinear", "ILoRALinearBias", "LowBitLinear"}
        assert {one.planes for one in products.kernels.values() if one.k2} == {2}


def test_a_probe_build_leaves_4_bit_products_to_the_library(tmp_path):
    """`--int4 dequantize` on Orin: the base products are the library's, 8-bit ones stay with the plugin."""
    products = PluginProducts(target("jetson-orin"), "dequantize")
    written("decoder", products, tmp_path / "probe.onnx")
    assert {one.plugin for one in products.kernels.values()} == {"ILoRARoute", "LowBitLinear"}
    ops = [node.op_type for node in onnx.load(str(tmp_path / "probe.onnx")).graph.node]
    assert ops.count("DequantizeLinear") == 7 * Bundle.open(default_bundle()).manifest.model.layers
