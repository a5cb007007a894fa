import numpy as np
import pytest
from crab_edge_calibration import (
    QuantisationReport,
    quantize_gptq,
    quantize_planes,
    quantize_rows,
    quantize_rtn,
)

from crab_edge.lowbit import dequantize, unpack


def weights(n=48, k=128, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def error(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_representable_weights_come_back_exactly():
    codes = np.random.default_rng(1).integers(-8, 8, (16, 64)).astype(np.float32)
    codes[:, ::32] = -8  # every block uses its outermost code
    w = codes * np.repeat(np.float32([0.5, 0.125]), 32)
    assert np.array_equal(dequantize(quantize_rtn(w, 4, 32)), w)


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.095), (8, 0.006)])
def test_search_beats_rounding_to_the_largest_weight(bits, bound):
    w = weights()
    zero = 1 << (bits - 1)
    blocks = w.reshape(48, 4, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / (zero - 1)
    plain = (np.clip(np.rint(blocks / scale), -zero, zero - 1) * scale).reshape(w.shape)
    found = error(dequantize(quantize_rtn(w, bits, 32)), w)
    assert found < error(plain, w)
    assert found < bound


def test_scales_are_positive_and_empty_blocks_exact():
    w = weights()
    w[3, 32:64] = 0
    stored = quantize_rtn(w, 4, 32)
    assert (stored.scales > 0).all()
    assert not dequantize(stored)[3, 32:64].any()


def test_columns_beyond_k_are_zero():
    w = weights(k=100)
    stored = quantize_rtn(w, 8, 32)
    assert stored.shape == (48, 100) and stored.q.shape == (48, 4, 32)
    assert (unpack(stored).reshape(48, -1)[:, 100:] == stored.zero_point).all()
    assert error(dequantize(stored), w) < 0.006


def test_energy_moves_error_to_silent_channels():
    w = weights()
    energy = np.where(np.arange(128) % 4 == 0, 50.0, 0.1).astype(np.float32)

    def loss(stored):
        return float((((dequantize(stored) - w) ** 2) * energy).sum())

    assert loss(quantize_rtn(w, 4, 32, energy)) < 0.9 * loss(quantize_rtn(w, 4, 32))


def test_two_planes_of_four_bits_come_close_to_eight():
    w = weights()
    planes = quantize_planes(w, 4, 32)
    assert all(plane.bits == 4 for plane in planes)
    both = error(sum(dequantize(plane) for plane in planes), w)
    assert both < 0.1 * error(dequantize(planes[0]), w)
    assert both < 1.5 * error(dequantize(quantize_rtn(w, 8, 32)), w)


def test_rows_of_an_embedding():
    table = weights(20, 64)
    table[5] = 0
    rows, scales = quantize_rows(table)
    assert rows.dtype == np.int8 and scales.dtype == np.float32
    assert np.abs(rows * scales[:, None] - table).max() <= scales.max() / 2 + 1e-7


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValueError, match="finite"):
        quantize_rtn(np.full((2, 32), np.nan, np.float32), 4, 32)
    with pytest.raises(ValueError, match="bits"):
        quantize_rtn(weights(), 3, 32)
    with pytest.raises(ValueError, match="energy"):
        quantize_rtn(weights(), 4, 32, np.ones(3, np.float32))


def test_report_names_the_worst():
    report = QuantisationReport()
    w = weights()
    report.add("good", 8, w, dequantize(quantize_rtn(w, 8, 32)))
    report.add("bad", 8, w, np.zeros_like(w))
    summary = report.summary(worst=1)["8-bit"]
    assert summary["worst"] == {"bad": 1.0} and summary["tensors"] == 2


@pytest.fixture
def inputs():
    """Calibration and test inputs [rows, K] of correlated channels, K = 100 (not whole blocks)."""
    rng = np.random.default_rng(4)
    mixing = rng.standard_normal((100, 100)).astype(np.float32) * np.geomspace(3, 0.03, 100, dtype=np.float32)
    return [(rng.standard_normal((600, 100)).astype(np.float32) @ mixing.T) for _ in range(2)]


def test_error_feedback_keeps_outputs_on_inputs_it_never_saw(inputs):
    w = weights(k=100)
    moment = inputs[0].T @ inputs[0] / len(inputs[0])
    stored = quantize_gptq(w, 4, 32, moment)
    nearest = quantize_rtn(w, 4, 32, np.diagonal(moment))
    assert stored.q.shape == nearest.q.shape and (stored.scales > 0).all()
    assert (unpack(stored).reshape(48, -1)[:, 100:] == 8).all()
    errors = [error(inputs[1] @ dequantize(t).T, inputs[1] @ w.T) for t in (stored, nearest)]
    assert errors[0] < 0.6 * errors[1]


def test_without_correlations_error_feedback_is_rounding_to_nearest():
    w = weights()
    assert np.array_equal(quantize_gptq(w, 4, 32, np.eye(128, dtype=np.float32)).q, quantize_rtn(w, 4, 32).q)


def test_dead_channels_do_not_break_error_feedback(inputs):
    x = inputs[0].copy()
    x[:, 10:50] = 0
    stored = quantize_gptq(weights(k=100), 4, 32, x.T @ x / len(x))
    assert np.isfinite(stored.scales).all()
    assert error(dequantize(stored), weights(k=100)) < 0.5


def test_report_measures_outputs_where_the_inputs_are_known(inputs):
    w, x = weights(k=100), inputs[0]
    stored = dequantize(quantize_rtn(w, 4, 32))
    found = QuantisationReport().add("w", 4, w, stored, x.T @ x / len(x))
    assert found == pytest.approx(error(x @ stored.T, x @ w.T), rel=1e-3)


def test_input_moments_sees_adapted_linears_under_their_own_name(tiny):
    import torch
    from crab_edge_calibration.statistics import input_moments

    embeds = torch.randn(1, 5, 64)
    engine = tiny.torch
    with input_moments(engine.model, lambda name, width: name.endswith("q_proj")) as seen:
        engine.rewind(0)
        engine.forward(embeds.numpy(), np.zeros((3, 1, 5), np.int64) + np.arange(5))
    engine.rewind(0)
    moments = seen.moments()
    assert not [name for name in moments if "lora_" in name or "base_layer" in name]
    name = next(n for n in moments if n.endswith("layers.0.self_attn.q_proj"))
    normed = embeds / embeds.square().mean(-1, keepdim=True).sqrt()
    scale = engine._inner.language_model.layers[0].input_layernorm.weight.detach()
    x = (normed * scale)[0]
    assert np.allclose(moments[name], (x.T @ x / 5).detach().numpy(), rtol=1e-3, atol=1e-4)
    wide = name.replace("q_proj", "k_proj")
    assert np.allclose(moments[wide], np.diagonal(moments[name]), rtol=1e-5)
