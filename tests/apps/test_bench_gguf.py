"""GGUF files of random decoders, read back with the format's own library."""

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from crab_edge_apps import _bench_gguf  # noqa: E402
from crab_edge_apps._bench_decoder import SHAPES, DecoderShape  # noqa: E402

SMALL = DecoderShape("small", 64, 128, 2, 2, 1, 32, 96, 32)


def tensors(path):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def test_base(tmp_path):
    path = tmp_path / "base.gguf"
    size = _bench_gguf.write_base(SMALL, path, context=64)
    found = tensors(path)
    assert len(found) == 3 + 2 * (2 + 7 + 3)
    # GGUF's shapes are written innermost first.
    assert list(found["blk.1.ffn_down.weight"].shape) == [128, 64]
    assert found["blk.1.ffn_down.weight"].tensor_type.name == "Q4_0"
    assert size == sum(tensor.n_bytes for name, tensor in found.items() if name != "token_embd.weight")
    first, second = (found[f"blk.{i}.ffn_up.weight"].data for i in (0, 1))
    assert not np.array_equal(first, second)
    values = gguf.quants.dequantize(first, gguf.GGMLQuantizationType.Q4_0)
    assert values.shape == (128, 64) and np.isfinite(values).all()
    # Products of a unit-variance input stay near 1.
    assert 0.5 < (values**2).sum(axis=1).mean() < 2
    fields = gguf.GGUFReader(path).fields
    assert fields["qwen2.attention.head_count_kv"].contents() == 1
    assert fields["qwen2.vocab_size"].contents() == 96


@pytest.mark.parametrize("rank", [32, 75.5, 96, 200])
def test_lora_matches_the_bytes_asked_for(tmp_path, rank):
    path = tmp_path / "lora.gguf"
    target = round(2 * sum(n + k for n, k in SMALL.linears().values()) * rank * 34 / 32)
    size, mean = _bench_gguf.write_lora(SMALL, path, target)
    found = tensors(path)
    assert len(found) == 28 and size == sum(tensor.n_bytes for tensor in found.values())
    assert size == pytest.approx(target, rel=0.06) and mean == pytest.approx(rank, rel=0.3)
    for name, tensor in found.items():
        if name.endswith("lora_a"):
            assert tensor.shape[1] == found[name.replace("lora_a", "lora_b")].shape[0]
            assert tensor.shape[1] % 32 == 0 and tensor.tensor_type.name == "Q8_0"


def test_large_adapters_match_closely():
    shape = SHAPES["1.5b"]
    for target in (100_000_000, 123_456_789, 160_000_000):
        size = sum(tensor.nbytes for tensor in _bench_gguf._lora_tensors(shape, target))
        assert size == pytest.approx(target, rel=3e-3)
