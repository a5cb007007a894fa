"""The torch engine's decode step as it runs on a GPU, every Triton launch executed as PTX on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from crab_edge.bundle import Bundle, default_bundle  # noqa: E402
from crab_edge.engines import _torch_kernels as kernels  # noqa: E402
from crab_edge.engines import _torch_layers as layers  # noqa: E402
from crab_edge.engines._torch_cache import Cache, Chunk, Step  # noqa: E402
from crab_edge.engines._torch_decoder import Decoder  # noqa: E402
from crab_edge.engines._torch_step import Stepper  # noqa: E402
from crab_edge.engines._torch_weights import GraphReader  # noqa: E402
from crab_edge.ilora import torch_ops, triton_launch  # noqa: E402
from tests.ptx.jit import Launcher  # noqa: E402

CPU = torch.device("cpu")
HALF, BRAIN = torch.float16, torch.bfloat16
SMS = (87, 90, 120)


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def launcher(request, monkeypatch):
    # Whatever torch leaves empty is NaN then, so that a store left out shows.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    return Launcher(request.param).install(monkeypatch)


@pytest.mark.parametrize("launcher", SMS, indirect=True)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
@pytest.mark.parametrize(("rows", "width"), [(1, 96), (3, 3584)])
def test_add_norm(launcher, rows, width, dtype):
    norm = layers.Norm(drawn(width), None, 1e-6, dtype)
    residual, x = drawn(rows, width, seed=1), drawn(rows, width, dtype=dtype, seed=2)
    for given in (x, None):
        ours, theirs = (module.add_norm(norm, residual, given) for module in (kernels, layers))
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1], atol=2e-3, rtol=8e-3 if dtype == BRAIN else 1e-3)
    assert launcher.launches == ["_add_norm"] * 2


@pytest.mark.parametrize("launcher", SMS, indirect=True)
@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_silu_mul(launcher, dtype):
    gate, up = drawn(3, 2200, dtype=dtype).split(1100, dim=1)
    ours, theirs = kernels.silu_mul(gate, up), layers.silu_mul(gate, up)
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=8e-3 if dtype == BRAIN else 2e-3)


@pytest.mark.parametrize("launcher", SMS, indirect=True)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "depth", "capacity", "past", "dtype"),
    [
        (2, 1, 32, 96, 0, HALF),
        (28, 4, 128, 200, 130, BRAIN),
        (4, 2, 64, 150, 149, HALF),
        (16, 2, 16, 4200, 64, HALF),
    ],
)
def test_a_step_of_attention(launcher, heads, kv_heads, depth, capacity, past, dtype):
    """Against torch's own step in float32: the output, and what is left in the cache."""
    angles = drawn(1, depth // 2)
    turned = layers.turn(angles.cos(), angles.sin())
    given = [drawn(1, n, depth, dtype=dtype, seed=n + i) for i, n in enumerate((heads, kv_heads, kv_heads))]
    outs, caches = [], []
    for kind, of in ((kernels.FastStep, dtype), (Step, torch.float32)):
        cache = Cache(2, kv_heads, depth, capacity, CPU, of)
        cache.reserve(capacity, 0)
        cache.keys[1][:], cache.values[1][:] = (
            drawn(kv_heads, capacity, depth, dtype=dtype, seed=s).to(of) for s in (7, 8)
        )
        q, k, v = (one.to(of) for one in given)
        outs.append(kind(cache, torch.tensor([past]))(1, q, k, v, turned, depth**-0.5).float())
        caches.append((cache.keys[1].float(), cache.values[1].float()))
    bound = 2e-2 if dtype == BRAIN else 2e-3
    torch.testing.assert_close(outs[0], outs[1], atol=bound, rtol=bound)
    for ours, theirs in zip(*caches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=bound, rtol=bound)
    assert launcher.launches == ["_turn_and_store", "_attend_part", "_join_parts"]


@pytest.mark.parametrize("launcher", [90], indirect=True)
def test_a_decode_step_of_the_packaged_model(launcher, monkeypatch):
    """Against the same decoder in float32 without a kernel."""
    bundle = Bundle.open(default_bundle())
    model = bundle.manifest.model
    embeds = torch.from_numpy(bundle.embedding.rows(torch.arange(40, 46).numpy()))
    positions = torch.arange(6).expand(3, 6).contiguous()
    said = []
    for between, kind, dtype in (
        (layers, Step, torch.float32),
        (kernels, kernels.FastStep, HALF),
    ):
        with torch.inference_mode():
            decoder = Decoder(GraphReader(bundle.graph("decoder"), CPU, dtype), model)
            cache = Cache(model.layers, model.kv_heads, model.head_dim, 64, CPU, dtype)
            cache.reserve(6, 0)
            step = Stepper(decoder, cache, model.hidden_size, model.vocab_size, CPU)
            decoder(embeds[:5], positions[:, :5], Chunk(cache, 0, 5))
            if dtype == HALF:
                products_on_ptx(monkeypatch)
                decoder._between, step._attend = between, kind
            said.append(torch.from_numpy(step(embeds[5:].numpy(), positions[:, 5:].numpy(), 5).copy()))
    assert (said[1] - said[0]).norm() < 3e-3 * said[0].norm()
    assert said[1].argmax() == said[0].argmax()
    each = {
        "route_kernel": 4, "linear_kernel": 4, "_add_norm": 2, "_silu_mul": 1, "_turn_and_store": 1,
        "_attend_part": 1, "_join_parts": 1,
    }  # fmt: skip
    expected = Counter({name: count * model.layers for name, count in each.items()})
    # The first norm, and the head.
    assert Counter(launcher.launches) == expected + Counter({"_add_norm": 1, "linear_kernel": 1})


def products_on_ptx(monkeypatch):
    """The operators on CPU tensors do what they do on CUDA, with the scales that a weight has there."""

    def halved(launched, place):
        def operator(*given):
            scales = given[place].half().t().contiguous().t()
            return launched(*given[:place], scales, *given[place + 1 :])

        return operator

    for operator, launched, place in (
        (torch_ops.ilora_route, triton_launch.route, 2),
        (torch_ops.lowbit_linear, triton_launch.linear, 3),
    ):
        monkeypatch.setitem(operator._backend_fns, "cpu", halved(launched, place))
