"""Run by test_torch_kernels.py with TRITON_INTERPRET=1, which Triton wants to see when it is imported."""

import pytest
import torch

from crab_edge.bundle import Bundle, default_bundle
from crab_edge.engines import _torch_kernels as kernels
from crab_edge.engines import _torch_layers as layers
from crab_edge.engines._torch_cache import Cache, Chunk, Step
from crab_edge.engines._torch_decoder import Decoder
from crab_edge.engines._torch_step import Stepper
from crab_edge.engines._torch_weights import GraphReader

CPU = torch.device("cpu")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (3, 3584)])
def test_add_norm(rows, width, dtype):
    norm = layers.Norm(random(width), None, 1e-6, dtype)
    residual, x = random(rows, width, seed=1), random(rows, width, dtype=dtype, seed=2)
    for given in (x, None):
        ours, theirs = (module.add_norm(norm, residual, given) for module in (kernels, layers))
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(
            ours[1], theirs[1], atol=2e-3 if dtype == torch.float16 else 1e-5, rtol=1e-3
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_silu_mul(dtype):
    gate, up = random(3, 2200, dtype=dtype).split(1100, dim=1)
    torch.testing.assert_close(kernels.silu_mul(gate, up), layers.silu_mul(gate, up), atol=1e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "depth", "capacity", "past"),
    [(2, 1, 32, 96, 0), (28, 4, 128, 200, 130), (4, 2, 64, 150, 149), (16, 2, 16, 4200, 64)],
)
def test_a_step_of_attention(heads, kv_heads, depth, capacity, past):
    """Against torch's own step: the output, and what both leave in the cache."""
    angles = random(1, depth // 2)
    turned = layers.turn(angles.cos(), angles.sin())
    q, k, v = (random(1, n, depth, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    outs, caches = [], []
    for kind in (kernels.FastStep, Step):
        cache = Cache(2, kv_heads, depth, capacity, CPU, torch.float32)
        cache.reserve(capacity, 0)
        # What lies behind the token is garbage of an earlier, longer prompt.
        cache.keys[1][:], cache.values[1][:] = (random(kv_heads, capacity, depth, seed=s) for s in (7, 8))
        outs.append(kind(cache, torch.tensor([past]))(1, q, k, v, turned, depth**-0.5))
        caches.append((cache.keys[1], cache.values[1]))
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-4)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_a_decoder_with_the_kernels():
    """The packaged decoder as it runs on a GPU, but for the products and the capture."""
    bundle = Bundle.open(default_bundle())
    model = bundle.manifest.model
    embeds = torch.from_numpy(bundle.embedding.rows(torch.arange(40, 46).numpy()))
    positions = torch.arange(6).expand(3, 6).contiguous()
    said = []
    with torch.inference_mode():
        decoder = Decoder(GraphReader(bundle.graph("decoder"), CPU, torch.float32), model)
        for between, kind in ((layers, Step), (kernels, kernels.FastStep)):
            cache = Cache(model.layers, model.kv_heads, model.head_dim, 64, CPU, torch.float32)
            cache.reserve(6, 0)
            step = Stepper(decoder, cache, model.hidden_size, model.vocab_size, CPU)
            decoder._between, step._attend = between, kind
            decoder(embeds[:5], positions[:, :5], Chunk(cache, 0, 5))
            said.append(step(embeds[5:].numpy(), positions[:, 5:].numpy(), 5).copy())
    torch.testing.assert_close(*map(torch.from_numpy, said), atol=1e-4, rtol=1e-4)
