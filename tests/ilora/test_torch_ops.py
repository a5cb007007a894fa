"""The torch operators: exact on CPU against store and reference; on CUDA, where there is one, equal."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from crab_edge.errors import CrabError  # noqa: E402
from crab_edge.ilora import reference, torch_ops  # noqa: E402
from crab_edge.lowbit import dequantize, n_blocks, pack  # noqa: E402

OPS = torch.ops.crab
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def stored(n, k, bits, block, seed=0, magnitude=1.0):
    rng = np.random.default_rng(seed)
    shape = (n, n_blocks(k, block), block)
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, shape[:2]) * magnitude / (1 << (bits - 1))
    return pack(codes, scales.astype(np.float16).astype(np.float32), bits, block, k)


def operand(t, device="cpu"):
    made = torch_ops.prepare(t, device)
    return made.q, made.scales, made.bits, made.block


def arguments(device="cpu", dtype=torch.float32):
    """Arguments of every operator, by its name."""
    torch.manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape).to(device, dtype)

    folded = operand(stored(48, 256 + 2 * 128, 4, 64), device)
    base, up = operand(stored(40, 96, 4, 32), device), operand(stored(40, 48, 8, 16), device)
    routes = operand(stored(2 * (16 + 3), 96, 8, 32), device)
    return {
        "ilora_route": (draw(2, 3, 96), *routes, 16, 3, 2),
        "lowbit_linear": (draw(3, 256), draw(3, 2 * 128), *folded, 2, draw(48), [32, 16]),
        "ilora_experts": (draw(3, 40), draw(3, 48), *up),
        "lowbit_linear_experts": (draw(3, 96), draw(3, 48), *base, *up, None),
    }


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("block", (16, 32, 128))
def test_prepared_weights_are_the_stored_ones(bits, block):
    t = stored(7, 171, bits, block)
    made = torch_ops.prepare(t, "cpu")
    matrix = torch_ops.dequantize(made.q, made.scales, bits, block).numpy()
    np.testing.assert_array_equal(matrix[:, :171], dequantize(t))
    assert not matrix[:, 171:].any()
    assert made.scales.dtype == torch.float16 and made.scales.t().is_contiguous()
    assert made.shape == (7, 171) and made.nbytes == made.q.nbytes + made.scales.nbytes


def test_four_bits_put_a_blocks_second_half_into_the_high_halves():
    codes = np.arange(16, dtype=np.uint8).reshape(1, 1, 16)
    q, _ = torch_ops.gpu_layout(pack(codes, np.ones((1, 1), np.float32), 4, 16, 16))
    np.testing.assert_array_equal(q[0, 0], [0x80, 0x91, 0xA2, 0xB3, 0xC4, 0xD5, 0xE6, 0xF7])


@pytest.mark.parametrize("magnitude", (1e-6, 1e6))
def test_scales_that_float16_would_lose_stay_float32(magnitude):
    t = stored(5, 64, 4, 32, magnitude=magnitude)
    t = pack(*_parts(t, magnitude), 4, 32, 64)
    made = torch_ops.prepare(t, "cpu")
    assert made.scales.dtype == torch.float32
    np.testing.assert_array_equal(made.scales.numpy(), t.scales)


def _parts(t, magnitude):
    from crab_edge.lowbit import unpack

    return unpack(t), np.full(t.scales.shape, magnitude / 7, np.float32)


def test_route_is_the_references():
    t = stored(2 * 19, 96, 8, 32)
    x = torch.randn(2, 3, 96)
    z = OPS.ilora_route(x, *operand(t), 16, 3, 2)
    rows = dequantize(t).reshape(2, 19, 96)
    np.testing.assert_allclose(z, reference.route(x, rows[:, :16], rows[:, 16:]), atol=2e-4)


@pytest.mark.parametrize(("k2", "planes"), ((64, 2), (96, 1), (48, 1)))
def test_folded_product_is_the_joined_one(k2, planes):
    t = stored(24, 128 + planes * k2, 4, 64)
    x, z, bias = torch.randn(2, 128), torch.randn(2, k2), torch.randn(24)
    y = OPS.lowbit_linear(x, z, *operand(t), planes, bias)
    both = torch.cat([x] + [z] * planes, dim=1).double().numpy()
    np.testing.assert_allclose(y, both @ dequantize(t).T.astype(np.float64) + bias.numpy(), atol=1e-3)


def test_linears_of_one_input_in_one_weight_are_the_linears():
    x, z, bias, (q, scales, bits, block), planes, rows = _grouped()
    y = OPS.lowbit_linear(x, z, q, scales, bits, block, planes, bias, rows)
    first = OPS.lowbit_linear(x, z[:, :128], q[:32], scales[:32], bits, block, planes, bias[:32])
    second = OPS.lowbit_linear(x, z[:, 128:], q[32:], scales[32:], bits, block, planes, bias[32:])
    torch.testing.assert_close(y, torch.cat([first, second], dim=1))


def _grouped():
    x, z, q, scales, bits, block, planes, bias, rows = arguments()["lowbit_linear"]
    return x, z, bias, (q, scales, bits, block), planes, rows


def test_experts_beside_equal_experts_after():
    x, z, *rest = arguments()["lowbit_linear_experts"]
    base, up, bias = rest[:4], rest[4:8], torch.randn(40)
    y = OPS.lowbit_linear_experts(x, z, *base, *up, bias)
    y0 = OPS.lowbit_linear(x, None, *base, 0, bias)
    torch.testing.assert_close(y, OPS.ilora_experts(y0, z, *up))


@pytest.mark.parametrize("name", sorted(arguments()))
def test_torch_can_hold_the_operator(name):
    torch.library.opcheck(getattr(OPS, name).default, arguments()[name])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_result_has_the_activations_type(dtype):
    for name, given in arguments(dtype=dtype).items():
        assert getattr(OPS, name)(*given).dtype == dtype


def test_what_does_not_fit_is_refused():
    x, z, bias, weight, _, rows = _grouped()
    with pytest.raises(CrabError, match="without z"):
        OPS.lowbit_linear(x, None, *weight, 2, bias)
    with pytest.raises(CrabError, match=r"expected those of 256 \+ 2 x 256"):
        OPS.lowbit_linear(x, z, *weight, 2, bias)
    with pytest.raises(CrabError, match="multiples of 16"):
        OPS.lowbit_linear(x, z, *weight, 2, bias, [40, 8])
    with pytest.raises(CrabError, match="2 or 3 linears"):
        OPS.lowbit_linear(x, z, *weight, 2, bias, [16, 16])
    with pytest.raises(CrabError, match="expected rows and dtype"):
        OPS.lowbit_linear(x, z[:1], *weight, 2, bias, rows)
    with pytest.raises(CrabError, match="blocks of 64"):
        OPS.lowbit_linear(x, None, *weight, 0, bias)
    with pytest.raises(CrabError, match="block 32"):
        OPS.lowbit_linear(x, None, *weight[:3], 32, 0, bias)
    with pytest.raises(CrabError, match="route has 48 rows"):
        OPS.ilora_route(x, *weight, 16, 3, 2)


def test_operands_that_a_kernel_would_read_beyond_are_refused():
    """The kernels trust these shapes: on a GPU a wrong one would read another tensor's memory."""
    x, z, bias, weight, planes, rows = _grouped()
    for wrong in (bias[:40], bias[:1], torch.randn(96)[::2]):
        with pytest.raises(CrabError, match="bias is"):
            OPS.lowbit_linear(x, z, *weight, planes, wrong, rows)
    with pytest.raises(CrabError, match="255 columns, expected the same number for each of 2"):
        OPS.lowbit_linear(x, z[:, :255], *weight, planes, bias, rows)
    q, *rest = weight
    with pytest.raises(CrabError, match="contiguous"):
        OPS.lowbit_linear(x, z, q.transpose(0, 1).contiguous().transpose(0, 1), *rest, planes, bias, rows)
    y0, z, *up = arguments()["ilora_experts"]
    for wrong in (y0[:2], y0[:, :39]):
        with pytest.raises(CrabError, match="y0 is"):
            OPS.ilora_experts(wrong, z, *up)
    x, z, *base = arguments()["lowbit_linear_experts"]
    with pytest.raises(CrabError, match="don't belong"):
        OPS.lowbit_linear_experts(x, z[:1], *base)
    fewer = [*base[:4], base[4][:32], base[5][:32], *base[6:]]
    with pytest.raises(CrabError, match="32 rows of experts"):
        OPS.lowbit_linear_experts(x, z, *fewer)


@CUDA
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("name", sorted(arguments()))
def test_cuda_equals_cpu(name, dtype):
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    expected = getattr(OPS, name)(*arguments(dtype=dtype)[name]).float()
    actual = getattr(OPS, name)(*arguments("cuda", dtype)[name]).float().cpu()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@CUDA
@pytest.mark.parametrize("name", sorted(arguments()))
def test_cuda_graph_replays_the_operator(name):
    given = arguments("cuda", torch.float16)[name]
    op = getattr(OPS, name)
    expected = op(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(*given)
    captured.zero_()
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
