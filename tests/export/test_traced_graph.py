"""The traced variant of exported decoders: the same logits, and every router's weights beside them."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from crab_edge_export.precision import choose
from onnx import checker, helper

from crab_edge.engines.torch import TorchTracer
from crab_edge.ilora import reference
from crab_edge.ilora.traced_graph import PREFIX, addition, output_name, routes
from tests.export.graphs import low_bit_weights, open_session, write_decoder

TOKENS = 24
EXACT = {"block": 32, "accuracy_level": 0}
PRECISIONS = {
    "4 bits, two planes folded": choose(4, [], experts="residual4x2", **EXACT),
    "4 bits, one plane folded": choose(4, [], experts="plane4", **EXACT),
    "4 bits, unfolded": choose(4, [], experts="unfolded8", **EXACT),
    "8 bits, unfolded": choose(8, [], **EXACT),
    "float, folded": choose(32, []),
    "float, unfolded": replace(choose(32, []), folded=False),
}


@pytest.fixture(scope="module")
def inputs(tiny):
    """Embeddings float32 [S, H] and positions int64 [3, S]."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((TOKENS, tiny.config.text_config.hidden_size)).astype(np.float32)
    steps = np.arange(TOKENS)
    return embeds, np.stack([steps // 3 * 2, steps % 7, steps % 5]).astype(np.int64) + 4


def run(session, names, embeds, positions):
    """The outputs `names` of one pass from an empty cache."""
    feed = {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
    feed["seqlens_k"] = np.array([len(embeds) - 1], np.int32)
    feed["total_sequence_length"] = np.array([len(embeds)], np.int32)
    for entry in session.get_inputs():
        if entry.name.startswith("past."):
            feed[entry.name] = np.zeros((1, entry.shape[1], 32, entry.shape[3]), np.float32)
    return session.run(names, feed)


def open_bytes(model, folder):
    (folder / "traced.onnx").write_bytes(model)
    return open_session(folder / "traced.onnx")


@pytest.fixture(params=PRECISIONS)
def exported(request, tiny, tmp_path):
    return write_decoder(tiny, PRECISIONS[request.param], tmp_path / "decoder.onnx")


def test_weights_are_those_of_the_reference(exported, inputs, tmp_path):
    """softmax(R x) in float64, with x from the graph and R from its stored rows."""
    plain = exported.read_bytes()
    found = routes(plain)
    model = onnx.load_from_string(plain + addition(found))
    seen = sorted({route.inputs[0] for route in found})
    model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in seen)
    names = [output_name(number) for number in range(len(found))]
    outputs = run(open_bytes(model.SerializeToString(), tmp_path), [*names, *seen], *inputs)
    xs = dict(zip(seen, outputs[len(names) :], strict=True))
    stored = low_bit_weights(exported)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    for route, weights in zip(found, outputs[: len(names)], strict=True):
        rank, experts, groups = (route.sizes[name] for name in ("rank", "experts", "groups"))
        name = route.inputs[1]
        rows = stored.get(name.removesuffix(".weight"), arrays[name]).reshape(groups, rank + experts, -1)
        assert weights.shape == (1, TOKENS, groups, experts) and weights.dtype == np.float32
        for group in range(groups):
            expected = reference.router(xs[route.inputs[0]][0], rows[group, rank:])
            np.testing.assert_allclose(weights[0, :, group], expected, atol=2e-6)
            assert expected.max(axis=-1).mean() > 0.5, "routers that decide nothing would prove nothing"


def test_weights_are_those_that_the_route_used(tiny, inputs, tmp_path):
    """With int8 activations too: z = g outer h and g sums to 1, so the node's own g is in its output."""
    path = write_decoder(tiny, choose(4, [], accuracy_level=4), tmp_path / "decoder.onnx")
    plain = path.read_bytes()
    found = routes(plain)
    model = onnx.load_from_string(plain + addition(found))
    zs = [node.output[0] for node in model.graph.node if node.op_type == "ILoRARoute"]
    model.graph.output.extend(helper.make_tensor_value_info(name, 1, None) for name in zs)
    names = [output_name(number) for number in range(len(found))]
    outputs = run(open_bytes(model.SerializeToString(), tmp_path), [*names, *zs], *inputs)
    for route, weights, z in zip(found, outputs[: len(names)], outputs[len(names) :], strict=True):
        rank, experts, groups = (route.sizes[name] for name in ("rank", "experts", "groups"))
        z = z[0].reshape(TOKENS, groups, experts, rank).astype(np.float64)
        h = z.sum(axis=2, keepdims=True)
        used = (z * h).sum(axis=-1) / (h * h).sum(axis=-1)
        np.testing.assert_allclose(weights[0], used, atol=1e-5)


def test_nothing_else_changes(exported, inputs, tmp_path):
    plain = exported.read_bytes()
    traced = plain + addition(routes(plain))
    (expected,) = run(open_session(exported), ["logits"], *inputs)
    (actual,) = run(open_bytes(traced, tmp_path), ["logits"], *inputs)
    np.testing.assert_array_equal(actual, expected)
    before, after = onnx.load_from_string(plain), onnx.load_from_string(traced)
    for kept in ("node", "initializer", "input", "output"):
        was, now = getattr(before.graph, kept), getattr(after.graph, kept)
        assert list(now)[: len(was)] == list(was)
        assert all(entry.name.startswith(PREFIX) for entry in list(now)[len(was) :])
    assert before.functions == after.functions and before.opset_import == after.opset_import


def test_added_nodes_are_valid(exported):
    model = onnx.load_from_string(addition(routes(exported.read_bytes())))
    context = checker.C.CheckerContext()
    context.ir_version, context.opset_imports = 10, {"": 21}
    for node in model.graph.node:
        if not node.domain:
            checker.check_node(node, context)
    for tensor in model.graph.initializer:
        checker.check_tensor(tensor, context)
    for value in model.graph.output:
        checker.check_value_info(value, context)


@pytest.mark.parametrize("folded", [True, False])
def test_weights_are_those_of_the_torch_model(tiny, inputs, tmp_path, folded):
    path = write_decoder(tiny, replace(PRECISIONS["float, folded"], folded=folded), tmp_path / "d.onnx")
    plain = path.read_bytes()
    found = routes(plain)
    session = open_bytes(plain + addition(found), tmp_path)
    outputs = run(session, [output_name(number) for number in range(len(found))], *inputs)
    tracer = TorchTracer(tiny.torch)
    assert tuple(layer for route in found for layer in route.layers) == tracer.layers
    actual = np.concatenate([np.swapaxes(weights[0], 0, 1) for weights in outputs])
    np.testing.assert_allclose(actual, tracer(*inputs), atol=1e-5)


def test_layers_are_the_linears(tiny, tmp_path):
    path = write_decoder(tiny, PRECISIONS["8 bits, unfolded"], tmp_path / "d.onnx")
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    layers = [layer for route in routes(path.read_bytes()) for layer in route.layers]
    assert layers == [f"layers.{i}.{part}" for i in range(2) for part in parts]


def test_weights_in_another_file(tiny, inputs, tmp_path):
    """Big graphs keep their weights beside them; the traced variant is bytes that no file holds."""
    import onnxruntime

    path = write_decoder(
        tiny, PRECISIONS["4 bits, unfolded"], tmp_path / "d.onnx", data=tmp_path / "d.onnx.data"
    )
    plain = path.read_bytes()
    assert len(plain) < 200_000 < (tmp_path / "d.onnx.data").stat().st_size
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(tmp_path))
    session = onnxruntime.InferenceSession(
        plain + addition(routes(plain)), options, providers=["CPUExecutionProvider"]
    )
    actual, first = run(session, ["logits", output_name(0)], *inputs)
    (expected,) = run(open_session(path), ["logits"], *inputs)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(first.sum(axis=-1), 1, atol=1e-6)


def test_a_decoder_without_adapter_has_no_routes(tiny, tmp_path):
    path = write_decoder(tiny, PRECISIONS["float, folded"], tmp_path / "d.onnx", adapter=False)
    assert routes(path.read_bytes()) == []
