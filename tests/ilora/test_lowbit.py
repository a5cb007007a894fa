"""The store of low-bit weights against ONNX Runtime's own kernel."""

import numpy as np
import pytest

from crab_edge.errors import CrabError
from crab_edge.lowbit import QTensor, dequantize, n_blocks, pack, pad_columns, unpack

BITS = (4, 8)


def random_tensor(bits: int, block: int, rows: int, columns: int, seed: int = 0) -> QTensor:
    rng = np.random.default_rng(seed)
    blocks = n_blocks(columns, block)
    codes = rng.integers(0, 1 << bits, (rows, blocks, block), dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, (rows, blocks)).astype(np.float32) / (1 << (bits - 1))
    return pack(codes, scales, bits, block, columns)


def test_four_bits_put_the_earlier_column_into_the_low_half():
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    t = pack(codes, np.array([[2.0]], np.float32), 4, 16, 16)
    assert t.q.shape == (1, 1, 8) and t.q[0, 0, 0] == 0x10 and t.q[0, 0, 7] == 0xFE
    np.testing.assert_array_equal(dequantize(t)[0], (np.arange(16) - 8) * 2.0)


def test_eight_bits_have_their_zero_at_128():
    codes = np.array([0, 127, 128, 255] * 4, np.uint8).reshape(1, 1, 16)
    t = pack(codes, np.array([[0.5]], np.float32), 8, 16, 16)
    np.testing.assert_array_equal(dequantize(t)[0, :4], [-64.0, -0.5, 0.0, 63.5])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("columns", [128, 171, 5])
def test_unpack_inverts_pack_and_padding_is_zero(bits, block, columns):
    t = random_tensor(bits, block, 7, columns)
    again = pack(unpack(t), t.scales, bits, block, columns)
    np.testing.assert_array_equal(again.q, t.q)
    padding = unpack(t).reshape(7, -1)[:, columns:]
    assert (padding == t.zero_point).all()
    assert dequantize(t).shape == (7, columns) and t.nbytes == t.q.nbytes + t.scales.nbytes


def test_pad_columns_keeps_values_and_adds_zeros():
    w = np.arange(10, dtype=np.float32).reshape(2, 5)
    padded = pad_columns(w, 16)
    assert padded.shape == (2, 1, 16)
    np.testing.assert_array_equal(padded[:, 0, :5], w)
    assert not padded[:, 0, 5:].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("columns", [128, 171])
def test_onnx_runtimes_kernel_reads_the_layout(bits, block, columns):
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    rows = 24
    t = random_tensor(bits, block, rows, columns)
    x = np.random.default_rng(1).standard_normal((3, columns)).astype(np.float32)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "q", "s"], ["y"], domain="com.microsoft", K=columns, N=rows, bits=bits,
        block_size=block, accuracy_level=0,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", 1, [3, columns])], [value("y", 1, [3, rows])],
        [onnx.numpy_helper.from_array(t.q, "q"), onnx.numpy_helper.from_array(t.scales, "s")],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    truth = x.astype(np.float64) @ dequantize(t).astype(np.float64).T
    error = np.abs(session.run(None, {"x": x})[0] - truth).max() / np.abs(truth).max()
    assert error < 1e-5


def test_wrong_shapes_and_codes_are_refused():
    with pytest.raises(CrabError, match="3 bits"):
        pack(np.zeros((1, 1, 16), np.uint8), np.ones((1, 1), np.float32), 3, 16, 16)
    with pytest.raises(CrabError, match="below 16"):
        pack(np.full((1, 1, 16), 16, np.uint8), np.ones((1, 1), np.float32), 4, 16, 16)
    with pytest.raises(CrabError, match="K=40"):
        pack(np.zeros((1, 1, 32), np.uint8), np.ones((1, 1), np.float32), 4, 32, 40)
    good = random_tensor(4, 32, 2, 64)
    with pytest.raises(CrabError, match="scales"):
        QTensor(good.q, good.scales.astype(np.float64), 4, 32, (2, 64))
    with pytest.raises(CrabError, match="quantised weight"):
        QTensor(good.q, good.scales, 4, 32, (2, 96))
