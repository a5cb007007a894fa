from dataclasses import replace

import numpy as np
import onnx
import pytest
from crab_edge_export.precision import choose

from tests.export.graphs import Decoder, low_bit_weights, relative, write_decoder

TOKENS = 40
FLOAT = choose(32, [])


@pytest.fixture(scope="module")
def inputs(tiny):
    """Embeddings [S, H], positions [3, S] that differ on the axes, and torch's logits [V] at some lengths."""
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((TOKENS, tiny.config.text_config.hidden_size)).astype(np.float32)
    steps = np.arange(TOKENS)
    positions = np.stack([steps // 3 * 2, steps % 7, steps % 5]).astype(np.int64) + 4
    return embeds, positions


@pytest.fixture(scope="module")
def expected(tiny, inputs):
    embeds, positions = inputs

    def at(length):
        tiny.torch.rewind(0)
        out = tiny.torch.forward(embeds[None, :length], positions[:, None, :length]).copy()
        tiny.torch.rewind(0)
        return out

    return {length: at(length) for length in (25, 30, TOKENS)}


@pytest.mark.parametrize("folded", [True, False])
def test_float_graph_equals_torch(tiny, inputs, expected, tmp_path, folded):
    path = write_decoder(tiny, replace(FLOAT, folded=folded), tmp_path / "d.onnx")
    decoder = Decoder(path, tiny.config.text_config)
    assert relative(decoder(*inputs), expected[TOKENS]) < 1e-5


def test_float_graph_equals_the_operator_by_hand(tiny, inputs, tmp_path):
    """The first q_proj against the numpy reference in float64, from the files' own weights."""
    from crab_edge_export.weights import WeightStore

    from crab_edge.ilora.reference import ilora_linear
    from tests.export.graphs import open_session

    embeds, _ = inputs
    path = write_decoder(tiny, FLOAT, tmp_path / "d.onnx")
    model = onnx.load(str(path))
    name = "language_model.layers.0.self_attn.q_proj"
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    onnx.save(model, str(tmp_path / "traced.onnx"))
    session = open_session(tmp_path / "traced.onnx")
    feed = {"inputs_embeds": embeds[None], "position_ids": inputs[1][:, None]}
    feed |= {
        i.name: np.array([TOKENS - (i.name == "seqlens_k")], np.int32) for i in session.get_inputs()[2:4]
    }
    feed |= {
        i.name: np.zeros((1, 1, 64, 32), np.float32)
        for i in session.get_inputs()
        if i.name.startswith("past.")
    }
    (actual,) = session.run([name], feed)
    with WeightStore(tiny.base, tiny.adapter) as weights:
        linear = weights.linear(name)
        norm = weights.array("language_model.layers.0.input_layernorm.weight")
        parts = [weights.adapter_array(f"{name}.lora_B{i}.weight") for i in range(3)]
    x = embeds / np.sqrt((embeds.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * norm
    a = linear.adapter
    wanted = ilora_linear(x, linear.weight, linear.bias, a.down, a.route, parts, 2.0)
    assert relative(actual[0], wanted) < 1e-5


def test_cached_steps_equal_prefill(tiny, inputs, expected, tmp_path):
    embeds, positions = inputs
    decoder = Decoder(write_decoder(tiny, FLOAT, tmp_path / "d.onnx"), tiny.config.text_config)
    decoder(embeds[:24], positions[:, :24])
    for t in range(24, TOKENS):
        row = decoder(embeds[t : t + 1], positions[:, t : t + 1])
        if t + 1 in expected:
            assert relative(row, expected[t + 1]) < 1e-5


def test_low_bit_cached_steps_equal_prefill_at_level_0(tiny, inputs, tmp_path):
    embeds, positions = inputs
    path = write_decoder(tiny, choose(4, [64, 96], accuracy_level=0), tmp_path / "d.onnx")
    whole = Decoder(path, tiny.config.text_config)(embeds, positions)
    decoder = Decoder(path, tiny.config.text_config)
    decoder(embeds[:25], positions[:, :25])
    for t in range(25, TOKENS):
        row = decoder(embeds[t : t + 1], positions[:, t : t + 1])
    assert relative(row, whole) < 1e-5


def test_rewinding_to_a_prefix(tiny, inputs, expected, tmp_path):
    embeds, positions = inputs
    decoder = Decoder(write_decoder(tiny, FLOAT, tmp_path / "d.onnx"), tiny.config.text_config)
    decoder(embeds, positions)
    decoder.length = 20
    assert relative(decoder(embeds[20:30], positions[:, 20:30]), expected[30]) < 1e-5
    # Past and present are one buffer: written up to the longest length, untouched behind it.
    key = decoder.cache["1.key"][0, 0]
    assert (key[TOKENS:] == 7).all() and not (key[TOKENS - 1] == 7).any()


def test_half_precision_cache(tiny, inputs, expected, tmp_path):
    path = write_decoder(tiny, replace(FLOAT, kv_dtype="float16"), tmp_path / "d.onnx")
    decoder = Decoder(path, tiny.config.text_config, dtype=np.float16)
    assert 1e-7 < relative(decoder(*inputs), expected[TOKENS]) < 2e-3


@pytest.mark.parametrize("experts", ["residual4x2", "plane4", "unfolded8"])
def test_low_bit_graph_equals_torch_with_its_weights(tiny, inputs, tmp_path, experts):
    """Quantisation is the only difference: torch with the graph's own dequantised weights agrees."""
    import torch

    from crab_edge.engines.torch import TorchEngine

    path = write_decoder(tiny, choose(4, [64, 96], accuracy_level=0, experts=experts), tmp_path / "d.onnx")
    stored = low_bit_weights(path)
    reference = TorchEngine.load(tiny.base, tiny.adapter)
    head = reference._inner.get_base_model() if hasattr(reference._inner, "get_base_model") else reference
    with torch.no_grad():
        head._head.weight.copy_(torch.from_numpy(stored["lm_head"]))
        groups = {"self_attn.qkv": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up": ("gate_proj", "up_proj")}
        groups |= {"self_attn.o_proj": ("o_proj",), "mlp.down_proj": ("down_proj",)}
        for i, layer in enumerate(reference._inner.language_model.layers):
            for group, names in groups.items():
                routes = stored[f"language_model.layers.{i}.{group}.ilora_route"].reshape(len(names), 35, -1)
                for route, name in zip(routes, names, strict=True):
                    module = getattr(layer.self_attn if "self" in group else layer.mlp, name)
                    weight = stored[f"language_model.layers.{i}.{group.split('.')[0]}.{name}"]
                    k = module.in_features
                    if experts == "unfolded8":
                        up = stored[f"language_model.layers.{i}.{group.split('.')[0]}.{name}.ilora_experts"]
                    else:
                        planes = weight[:, k:]
                        up = planes.reshape(len(weight), -1, 96).sum(axis=1)
                    module.base_layer.weight.copy_(torch.from_numpy(weight[:, :k].copy()))
                    module.lora_A["default"].weight.copy_(torch.from_numpy(route[:32].copy()))
                    module.lora_route["default"].weight.copy_(torch.from_numpy(route[32:].copy()))
                    for e, expert in enumerate(module.experts("default")):
                        expert.weight.copy_(torch.from_numpy(up[:, 32 * e : 32 * e + 32].copy() / 2))
    embeds, positions = inputs
    wanted = reference.forward(embeds[None], positions[:, None])
    assert relative(Decoder(path, tiny.config.text_config)(embeds, positions), wanted) < 1e-5


def test_the_experts_modes_differ_in_error_as_documented(tiny, inputs, tmp_path):
    """Errors of z B alone: two planes and 8 bits are alike, one plane is an order worse."""
    from crab_edge_export.weights import WeightStore

    with WeightStore(tiny.base, tiny.adapter) as weights:
        linear = weights.linear("language_model.layers.0.mlp.up_proj")
    errors = {}
    for experts in ("residual4x2", "plane4", "unfolded8"):
        path = write_decoder(tiny, choose(4, [64, 96], experts=experts), tmp_path / f"{experts}.onnx")
        stored = low_bit_weights(path)
        if experts == "unfolded8":
            up = stored[f"{linear.path}.ilora_experts"]
        else:
            up = stored[linear.path][:, 64:].reshape(96, -1, 96).sum(axis=1)
        errors[experts] = relative(up, linear.adapter.up)
    assert errors["residual4x2"] < 0.01 and errors["unfolded8"] < 0.01
    assert errors["plane4"] > 5 * errors["residual4x2"]


def test_graph_form(tiny, tmp_path):
    """What other engines rely on: versions, names, one router a group, bodies, level on every product."""
    model = onnx.load(str(write_decoder(tiny, choose(4, [64, 96]), tmp_path / "d.onnx")))
    assert model.ir_version <= 10
    assert {o.domain: o.version for o in model.opset_import}[""] <= 21
    nodes = model.graph.node
    routes = {n.name: {a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "ILoRARoute"}
    assert len(routes) == 4 * tiny.config.text_config.num_hidden_layers
    assert routes["language_model.layers.1.self_attn.qkv.ilora_route"]["groups"] == 3
    assert [f.name for f in model.functions] == ["ILoRARoute"]
    assert all(n.name for n in nodes) and len({n.name for n in nodes}) == len(nodes)
    products = [{a.name: a.i for a in n.attribute} for n in nodes if n.op_type == "MatMulNBits"]
    assert {p["accuracy_level"] for p in products} == {4}
    assert {p["bits"] for p in products} == {4, 8}  # 8: the head
    names = [i.name for i in model.graph.input]
    assert names[:4] == ["inputs_embeds", "position_ids", "seqlens_k", "total_sequence_length"]
    assert {"past.0.key", "past.1.value"} <= set(names)
    assert {o.name for o in model.graph.output} >= {"logits", "present.0.key", "present.1.value"}


def test_without_adapter_no_operator_is_left(tiny, inputs, tmp_path):
    from crab_edge.engines.torch import TorchEngine

    path = write_decoder(tiny, FLOAT, tmp_path / "d.onnx", adapter=False)
    model = onnx.load(str(path))
    assert not model.functions and "crab" not in {n.domain for n in model.graph.node}
    embeds, positions = inputs
    wanted = TorchEngine.load(tiny.base).forward(embeds[None], positions[:, None])
    assert relative(Decoder(path, tiny.config.text_config)(*inputs), wanted) < 1e-5


def test_weights_beside_the_graph(tiny, inputs, tmp_path):
    inside = write_decoder(tiny, choose(4, [64, 96]), tmp_path / "inside.onnx")
    beside = write_decoder(tiny, choose(4, [64, 96]), tmp_path / "d.onnx", data=tmp_path / "d.onnx.data")
    assert beside.stat().st_size < inside.stat().st_size / 2
    config = tiny.config.text_config
    assert np.array_equal(Decoder(inside, config)(*inputs), Decoder(beside, config)(*inputs))
