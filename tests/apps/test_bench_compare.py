"""The comparison's arithmetic, its graphs and its processes on a decoder of a few kilobytes; no times."""

import json

import pytest
from crab_edge_apps import _bench_bars, _bench_bundle, _bench_compare, _bench_memory, bench
from crab_edge_apps._bench_compare import BASE, BUNDLE, LLAMA, LLAMA_LORA, TORCH, Settings
from crab_edge_apps._bench_decoder import SHAPES, DecoderShape

from crab_edge.errors import CheckError, InputError
from crab_edge.memory import peak_bytes
from tests.shared_bundle import shared_tiny_bundle

SMALL = DecoderShape("small", 64, 128, 2, 2, 1, 32, 96, 32)
QUICK = Settings(rounds=2, steps=2, context=8, prefill=5, threads=1, against=())


def row(variant, size, decode, prefill, bandwidth=20e9, loaded=None, runtime="onnxruntime"):
    median = sorted(decode)[len(decode) // 2]
    return {
        "variant": variant,
        "runtime": runtime,
        "weight_bytes": size,
        "byte_ratio": size / 700e6,
        "bandwidth_share": size / median / bandwidth,
        "gigabytes_per_s": size / median / 1e9,
        "loaded_bytes": size if loaded is None else loaded,
        "runs": [{"decode_s": d, "prefill_s": p} for d, p in zip(decode, prefill, strict=True)],
    }


def test_rows_compare_with_the_base_of_the_same_run():
    result = _bench_compare.measure(SMALL, ["plane4"], QUICK)
    base, adapted = result["rows"]
    assert base["variant"] == BASE and base["decode_time_ratio"] == base["byte_ratio"] == 1.0
    assert base["decode_time_ratio_spread"] == [1.0, 1.0]
    assert adapted["weight_bytes"] > base["weight_bytes"] and adapted["nodes"] > base["nodes"]
    assert adapted["byte_ratio"] == adapted["weight_bytes"] / base["weight_bytes"]
    ratios = [
        ours["decode_s"] / other["decode_s"]
        for ours, other in zip(adapted["runs"], base["runs"], strict=True)
    ]
    assert adapted["decode_time_ratio_spread"] == [min(ratios), max(ratios)]
    assert adapted["peak_bytes"] > 10e6
    assert result["problems"] == [] and result["read_gigabytes_per_s"] > 0
    assert result["machine"]["threads"] == 1 and result["machine"]["versions"]["onnxruntime"]
    json.dumps(result)


def test_a_bundle_is_compared_with_decoders_of_its_own_shape_and_recipe():
    found = _bench_bundle.open_decoder(shared_tiny_bundle())
    shape, recipe = found.shape, found.recipe
    assert (shape.hidden, shape.layers, shape.rank, shape.experts) == (64, 2, 32, 3)
    assert found.plain_linears == 0
    settings = _bench_compare.of_bundle(found, QUICK)
    assert (settings.block, settings.accuracy_level) == (recipe.block, recipe.accuracy_level)
    forms = _bench_compare.possible_forms(shape, settings, [recipe.experts])
    result = _bench_compare.measure(shape, forms, settings, found)
    rows = {entry["variant"]: entry for entry in result["rows"]}
    assert list(rows) == [BASE, recipe.experts, BUNDLE]
    # The random decoder stands for the bundle: as many nodes, and the same bytes but for its rotary table.
    assert rows[BUNDLE]["nodes"] == rows[recipe.experts]["nodes"]
    assert rows[BUNDLE]["weight_bytes"] == rows[recipe.experts]["weight_bytes"]


def test_torch_takes_part():
    pytest.importorskip("torch")
    settings = Settings(rounds=1, steps=1, context=4, prefill=3, threads=1, against=("torch",))
    result = _bench_compare.measure(SMALL, ["plane4"], settings)
    last = result["rows"][-1]
    assert last["variant"] == TORCH and last["weight_bytes"] == 2 * SMALL.parameters()
    assert [bar["bar"] for bar in result["bars"]][-1] == "decode speed against torch bf16"


def test_torch_runs_the_official_formula():
    torch = pytest.importorskip("torch")
    from crab_edge_apps import _bench_torch

    from crab_edge.ilora.torch_layer import ILoRALinear

    decoder, head = _bench_torch.build(SMALL, torch.float32)
    linears = [module for module in decoder.modules() if isinstance(module, ILoRALinear)]
    assert len(linears) == 14 and head.weight.shape == (96, 64)
    assert sum(p.numel() for p in decoder.parameters()) + head.weight.numel() == SMALL.parameters() + 8 * 64
    layer, x = linears[0], torch.randn(1, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), ILoRALinear.forward(layer, x), rtol=1e-4, atol=1e-5)
        assert not torch.equal(layer(x), layer.base_layer(x))


def test_llama_takes_part():
    pytest.importorskip("llama_cpp")
    settings = Settings(rounds=1, steps=1, context=4, prefill=3, threads=1, against=("llama",))
    result = _bench_compare.measure(SMALL, ["plane4"], settings)
    rows = {entry["variant"]: entry for entry in result["rows"]}
    assert rows[LLAMA]["weight_bytes"] < rows[LLAMA_LORA]["weight_bytes"]
    assert {bar["bar"] for bar in result["bars"]} >= {
        "decode speed against llama.cpp with a byte-matched LoRA",
        "prefill speed against llama.cpp with a byte-matched LoRA",
    }


@pytest.mark.parametrize(("block", "limits"), [(128, [1.05, 1.25]), (32, [None, None])])
def test_bars(block, limits):
    rows = [
        row(BASE, 700e6, [0.040, 0.050, 0.042], [4.0, 4.0, 4.0]),
        row("plane4", 805e6, [0.046, 0.0575, 0.0504], [4.4, 4.8, 4.4]),
        row(LLAMA_LORA, 820e6, [0.0506, 0.0632, 0.0504], [6.6, 4.8, 5.5], runtime="llama.cpp"),
        row(TORCH, 3.2e9, [0.44, 0.56, 0.48], [9.0] * 3, runtime="torch"),
    ]
    time, share, decode, prefill, torch = _bench_bars.bars(rows, block=block)
    # 1.15 twice and 1.2 once, over a ratio of bytes of 1.15.
    assert time["value"] == pytest.approx(1.0) and time["spread"][1] == pytest.approx(1.2 / 1.15)
    assert time["met"] is True and share["met"] is False
    assert share["value"] == pytest.approx(805e6 / 0.0504 / 20e9 - 700e6 / 0.042 / 20e9)
    assert decode["value"] == pytest.approx(0.0632 / 0.0575) and prefill["value"] == pytest.approx(1.25)
    assert [decode["limit"], prefill["limit"]] == limits
    assert decode["met"] is (True if block == 128 else None)
    assert torch["value"] == pytest.approx(0.44 / 0.046) and torch["met"] is False


def test_figures_that_cannot_be_true():
    shared = row("repeats a layer", 700e6, [0.05], [1.0], loaded=50e6)
    fast = row("too fast", 700e6, [0.02], [1.0])
    small = row("in the cache", 5e6, [0.0001], [1.0], loaded=0)
    fine = row(BASE, 700e6, [0.05], [1.0])
    found = _bench_compare.problems([shared, fast, small, fine], 20e9)
    assert len(found) == 2
    assert "repeats a layer took 50 MB" in found[0] and "too fast reads 35.0 GB/s" in found[1]


def test_forms_that_a_shape_allows():
    settings = Settings(block=128)
    # N*r = 192 is one and a half blocks: two planes would share a block, one may end inside it.
    assert _bench_compare.possible_forms(SHAPES["1.5b"], settings, []) == ["unfolded8", "plane4"]
    assert _bench_compare.possible_forms(SHAPES["7b"], settings, ["auto"]) == ["residual4x2"]
    with pytest.raises(InputError, match="192"):
        _bench_compare.possible_forms(SHAPES["1.5b"], settings, ["residual4x2"])


def test_bandwidth_is_measured_in_a_fresh_process():
    assert _bench_memory.fresh_read_bandwidth(1, megabytes=8) > 1e8
    assert peak_bytes() > 10e6


def test_bad_input():
    with pytest.raises(InputError, match="--against tvm"):
        bench._runtimes(["tvm"])
    with pytest.raises(InputError, match="none alone"):
        bench._runtimes(["none", "torch"])
    assert bench._runtimes(["none"]) == () and bench._runtimes(None) is None
    with pytest.raises(CheckError, match=r"plane4: decode time over the ratio of bytes 1\.200, bar 1\.06"):
        bench._check(
            [
                {
                    "variant": "plane4",
                    "bar": "decode time over the ratio of bytes",
                    "value": 1.2,
                    "limit": 1.06,
                }
            ]
        )
