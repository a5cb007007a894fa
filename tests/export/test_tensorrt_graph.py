"""The files for TensorRT in ONNX Runtime: the bundle's answers, from the bundle's bytes."""

import numpy as np
import onnx
import pytest
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.precision import choose
from crab_edge_export.tensorrt_graph import rewrite_audio, rewrite_decoder, rewrite_vision
from crab_edge_export.tensorrt_products import Products
from crab_edge_export.tensorrt_source import Source
from crab_edge_export.tensorrt_weights import half_scales, pack_int4, signed_codes

from crab_edge.errors import BundleError
from crab_edge.lowbit import pack, unpack
from tests.export.graphs import Decoder, open_session, relative, write_decoder, write_tower
from tests.export.tensorrt import HalfDecoder, exact_session

TOKENS, CAPACITY = 40, 96
HALF = 3e-3
"""What float16 products may differ from float32 ones, relative: a few of its roundings."""
FORMS = {
    "residual4x2": choose(4, [64, 96], accuracy_level=0),
    "plane4": choose(4, [64, 96], accuracy_level=0, experts="plane4"),
    "unfolded8": choose(4, [64, 96], accuracy_level=0, experts="unfolded8"),
    "8 bits": choose(8, [64, 96], accuracy_level=0),
    "float": choose(32, []),
    # 64 isn't a multiple of 128: every weight is padded, and so are the activations.
    "padded": choose(4, [], accuracy_level=0, block=128, experts="unfolded8"),
}


def rewritten(source, out, capacity=CAPACITY, data=None):
    """The decoder file `source` in TensorRT's form at `out`."""
    graph = GraphBuilder("decoder", data)
    rewrite_decoder(Source(source), graph, Products(), capacity)
    graph.save(out)
    onnx.checker.check_model(str(out))
    return out


@pytest.fixture(scope="module")
def inputs(tiny):
    rng = np.random.default_rng(0)
    embeds = rng.standard_normal((TOKENS, tiny.config.text_config.hidden_size)).astype(np.float32)
    steps = np.arange(TOKENS)
    return embeds, np.stack([steps // 3 * 2, steps % 7, steps % 5]).astype(np.int64) + 4


@pytest.mark.parametrize("form", FORMS)
def test_the_answer_equals_the_bundles(tiny, inputs, tmp_path, form):
    """Prefill, single steps and a chunk against the bundle's decoder with exact products."""
    embeds, positions = inputs
    path = write_decoder(tiny, FORMS[form], tmp_path / "d.onnx")
    reference, decoder = (
        Decoder(path, tiny.config.text_config),
        HalfDecoder(rewritten(path, tmp_path / "t.onnx")),
    )
    for begin, end in ((0, 20), (20, 21), (21, 22), (22, TOKENS)):
        wanted = reference(embeds[begin:end], positions[:, begin:end])
        got = decoder(embeds[begin:end], positions[:, begin:end])
        assert relative(got, wanted) < HALF
        assert got.dtype == np.float32


def test_rewinding_is_setting_a_length(tiny, inputs, tmp_path):
    embeds, positions = inputs
    path = write_decoder(tiny, FORMS["residual4x2"], tmp_path / "d.onnx")
    decoder = HalfDecoder(rewritten(path, tmp_path / "t.onnx"))
    first = decoder(embeds[:30], positions[:, :30])
    decoder(embeds[30:], positions[:, 30:])
    decoder.length = 20
    assert relative(decoder(embeds[20:30], positions[:, 20:30]), first) < HALF
    # What lies behind the length is neither read nor moved.
    assert (decoder.cache["1.key"][0, 0, TOKENS:] == decoder.filling).all()


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("name", ["vision", "audio"])
def test_encoders_equal_the_bundles(tiny, tmp_path, name, adapter):
    """Widths of 80 and 48 don't fill their blocks of 32."""
    precision = choose(4, [64, 96], accuracy_level=0).tower()
    write_tower(tiny, name, precision, tmp_path / "b.onnx", tiny.adapter if adapter else None)
    graph = GraphBuilder(name)
    {"vision": rewrite_vision, "audio": rewrite_audio}[name](Source(tmp_path / "b.onnx"), graph, Products())
    graph.save(tmp_path / "t.onnx")
    onnx.checker.check_model(str(tmp_path / "t.onnx"))
    rng = np.random.default_rng(1)
    if name == "vision":
        feed = {"pixel_values": rng.standard_normal((3 * 256, 1176)).astype(np.float32)}
    else:
        mel = tiny.config.audio_config.num_mel_bins
        feed = {"mel": rng.standard_normal((3, mel, 200)).astype(np.float32)}
        feed["lengths"] = np.array([200, 131, 9], np.int64)
    (wanted,) = open_session(tmp_path / "b.onnx").run(None, feed)
    out = exact_session(tmp_path / "t.onnx").run(None, feed)
    if name == "audio":
        rows, tokens = out
        assert rows.shape[:2] == (3, 50) and tokens.tolist() == [50, 33, 2]
        out = [np.concatenate([chunk[:count] for chunk, count in zip(rows, tokens, strict=True)])]
    assert out[0].shape == wanted.shape and relative(out[0], wanted) < HALF


def test_weights_are_the_stores_own_codes(tiny, tmp_path):
    """Nothing is quantised anew: codes are the bundle's, moved by the zero point, scales are rounded once."""
    path = write_decoder(tiny, FORMS["unfolded8"], tmp_path / "d.onnx")
    rewritten(path, tmp_path / "t.onnx")
    source = Source(path)
    made = {t.name: t for t in onnx.load(str(tmp_path / "t.onnx")).graph.initializer}
    products = [n for n in source.graph.node if n.op_type in ("MatMulNBits", "ILoRARoute", "ILoRAExperts")]
    kinds = set()
    for node in products:
        given = {a.name: a.i for a in node.attribute}
        codes = next(name for name in node.input if name.endswith(".weight"))
        scales = codes.replace(".weight", ".scales")
        block = given.get("block_size") or given["block"]
        stored = source.quantised(codes, scales, given["K"], given["bits"], block)
        tensor = made[codes]
        kinds.add(tensor.data_type)
        expected = unpack(stored).reshape(stored.shape[0], -1).astype(int) - stored.zero_point
        assert list(tensor.dims) == list(expected.T.shape)
        actual = onnx.numpy_helper.to_array(tensor).astype(int)
        assert (actual == expected.T).all()
        half = onnx.numpy_helper.to_array(made[scales])
        assert half.dtype == np.float16
        assert np.allclose(half.T.astype(np.float32), stored.scales, rtol=2**-10)
    assert kinds == {onnx.TensorProto.INT4, onnx.TensorProto.INT8}


def test_large_weights_lie_beside_the_graph(tiny, inputs, tmp_path):
    embeds, positions = inputs
    path = write_decoder(tiny, FORMS["plane4"], tmp_path / "d.onnx", data=tmp_path / "d.onnx.data")
    inside = HalfDecoder(rewritten(path, tmp_path / "in.onnx"))
    beside = HalfDecoder(rewritten(path, tmp_path / "t.onnx", data=tmp_path / "t.onnx.data"))
    assert (tmp_path / "t.onnx.data").stat().st_size > (tmp_path / "t.onnx").stat().st_size / 2
    assert (inside(embeds, positions) == beside(embeds, positions)).all()


def test_form_of_the_file(tiny, tmp_path):
    """Opset and IR for the oldest readers, operators only of ONNX and ours, past and present of one shape."""
    path = write_decoder(tiny, FORMS["residual4x2"], tmp_path / "d.onnx")
    model = onnx.load(str(rewritten(path, tmp_path / "t.onnx")))
    assert model.ir_version <= 10
    assert {o.domain: o.version for o in model.opset_import}[""] == 21
    assert {n.domain for n in model.graph.node} == {"", "crab"}
    assert {f.name for f in model.functions} == {"ILoRARoute", "Attention", "TensorScatter"}
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes["past.1.key"] == shapes["present.1.key"] == [1, 1, CAPACITY, 32]
    assert "total_sequence_length" not in shapes and shapes["logits"][:2] == [1, 1]
    # No product of positions: TensorRT may compute it with ten bits of mantissa.
    products = {n.output[0] for n in model.graph.node if n.op_type == "MatMul"}
    assert not any("rotary" in name for name in products)


def test_negative_codes_pack_as_twos_complement():
    weight = pack(np.array([[0, 8, 15, 7] * 8], np.uint8), np.ones((1, 1), np.float32), 4, 32, 32)
    codes = signed_codes(weight)
    assert codes[:4, 0].tolist() == [-8, 0, 7, -1]
    assert pack_int4(codes)[:2].tolist() == [0x08, 0xF7]
    assert pack_int4(np.array([-1, 2, 3], np.int8)).tolist() == [0x2F, 0x03]


def test_scales_that_tensorrt_cannot_take_are_refused():
    assert half_scales(np.array([[1e-9, 0.5]], np.float32), "w").min() > 0
    with pytest.raises(BundleError, match=r"w: .* positive"):
        half_scales(np.array([[0.5, -0.1]], np.float32), "w")
    with pytest.raises(BundleError, match="float16"):
        half_scales(np.array([[1e5]], np.float32), "w")


def test_an_operator_without_a_form_is_named(tiny, tmp_path):
    path = write_decoder(tiny, FORMS["float"], tmp_path / "d.onnx")
    model = onnx.load(str(path))
    next(n for n in model.graph.node if n.op_type == "QuickGelu").op_type = "Mish"
    onnx.save(model, str(path))
    with pytest.raises(BundleError, match="Mish"):
        rewrite_decoder(Source(path), GraphBuilder("decoder"), Products(), CAPACITY)
