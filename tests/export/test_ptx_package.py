"""What `export --target jetson-orin` writes for the packaged model, run without a Jetson: the graphs by ONNX
Runtime, and every plugin's kernel, instruction by instruction, on the operands that its node gets there.
"""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("torch")
pytest.importorskip("triton")

from crab_edge_export.tensorrt_engines import EngineOptions, add_engines  # noqa: E402

from crab_edge.bundle import Bundle, default_bundle  # noqa: E402
from crab_edge.ilora import plugin_kernels  # noqa: E402
from crab_edge.ilora.tensorrt_plugins import ATTRIBUTE, NAMESPACE, OPERATORS  # noqa: E402
from tests.export.test_plugin_products import feeds  # noqa: E402
from tests.ptx import plugin  # noqa: E402

ORIN = "jetson-orin"
# Of the largest value: both round a float32 sum to float16, in another order.
BOUND = 2e-3


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    out = tmp_path_factory.mktemp("package") / "orin"
    bundle = Bundle.open(add_engines(default_bundle(), out, EngineOptions((ORIN,), capacity=128)))
    return bundle, plugin_kernels.read(bundle.path / "engines" / ORIN / "kernels")


def traced(path, tokens):
    """The graph's plugin nodes, each with its operands and result as ONNX Runtime computes them."""
    model = onnx.load(str(path))
    nodes = [one for one in model.graph.node if one.domain == NAMESPACE and one.op_type in OPERATORS]
    constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    there = {one.name for one in model.graph.output}
    for name in {name for node in nodes for name in (*node.input, *node.output)} - set(constants) - there:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16, None))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    values = dict(zip(names, session.run(None, feeds(session, tokens)), strict=True)) | constants
    for node in nodes:
        kernel = next(one.s.decode() for one in node.attribute if one.name == ATTRIBUTE)
        yield node.name, kernel, [values[name] for name in node.input], values[node.output[0]]


def compare(kernels, path, tokens, tactic, *, first_of_each):
    seen = set()
    for node, kernel, inputs, expected in traced(path, tokens):
        if first_of_each and kernel in seen:
            continue
        seen.add(kernel)
        rows = expected.size // expected.shape[-1]
        got = plugin.run(kernels, kernel, tactic, rows, inputs, np.zeros_like(expected))
        worst = np.abs(got.astype(float) - expected).max()
        assert worst <= BOUND * np.abs(expected.astype(float)).max(), f"{node} by {kernel}: {worst}"
    return seen


def test_every_plugin_of_a_decode_step(package):
    bundle, kernels = package
    seen = compare(kernels, bundle.path / "engines" / ORIN / "decoder.onnx", 1, "decode", first_of_each=False)
    assert {name.split("-")[0] for name in seen} == {
        "ILoRALinear", "ILoRALinearBias", "ILoRARoute", "LowBitLinear",
    }  # fmt: skip


@pytest.mark.parametrize("graph", ["decoder", "vision", "audio"])
def test_every_kernel_of_a_prompt(graph, package):
    bundle, kernels = package
    path = bundle.path / "engines" / ORIN / f"{graph}.onnx"
    assert compare(kernels, path, 70, "prefill", first_of_each=True)


def test_no_kernel_is_left_out(package):
    bundle, kernels = package
    named = set()
    for graph in ("decoder", "vision", "audio"):
        model = onnx.load(str(bundle.path / "engines" / ORIN / f"{graph}.onnx"), load_external_data=False)
        named |= {a.s.decode() for node in model.graph.node for a in node.attribute if a.name == ATTRIBUTE}
    assert named == set(kernels.sets)
