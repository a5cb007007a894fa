"""The torch engine on a tiny real bundle with exact products, and on the packaged one, on the CPU."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from crab_edge import engines
from crab_edge.bundle import Bundle, sample_clip
from crab_edge.errors import DependencyError, DeviceError, EngineError, InputError
from crab_edge.session import load

pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bundle():
    from tests.shared_bundle import shared_tiny_bundle

    return Bundle.open(shared_tiny_bundle())


@pytest.fixture
def engine(bundle):
    return engines.create("torch", bundle, threads=1, device="cpu")


@pytest.fixture(scope="module")
def reference(bundle):
    return engines.create("onnxruntime", bundle, threads=1)


@pytest.fixture(scope="module")
def tokens(bundle):
    """Embeddings float32 [1, 60, H] and positions int64 [3, 1, 60] of a made-up prompt."""
    ids = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 60)
    positions = np.stack([np.arange(60), np.arange(60) // 2, np.arange(60) % 7])[:, None]
    return bundle.embedding.rows(ids)[None], positions.astype(np.int64)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=5e-5 * np.abs(expected).max())


def test_all_graphs_equal_onnxruntime(engine, reference, bundle, tokens):
    reference.rewind(0)
    close(engine.forward(*tokens), reference.forward(*tokens))
    assert engine.length == 60
    random = np.random.default_rng(0)
    pixels = random.standard_normal((512, 1176)).astype(np.float32)
    close(engine.vision(pixels), reference.vision(pixels))
    mel = random.standard_normal((3, bundle.features.n_mels, 200)).astype(np.float32)
    lengths = np.array([200, 61, 4])
    close(engine.audio(mel, lengths), reference.audio(mel, lengths))


def test_steps_equal_one_pass_and_rewinding_forgets(engine, tokens):
    embeds, positions = tokens
    whole = engine.forward(embeds, positions).copy()
    engine.rewind(20)
    for at in range(20, 60):
        step = engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
    assert engine.length == 60
    close(step, whole)
    engine.rewind(0)
    prefix = engine.forward(embeds[:, :40], positions[..., :40]).copy()
    engine.forward(embeds[:, 45:], positions[..., 45:])
    engine.rewind(25)
    close(engine.forward(embeds[:, 25:40], positions[..., 25:40]), prefix)
    for wrong in (-1, 41):
        with pytest.raises(EngineError, match="can't rewind"):
            engine.rewind(wrong)


def test_the_cache_grows_under_steps_and_chunks(engine, tokens, monkeypatch):
    from crab_edge.engines import _torch_cache

    embeds, positions = tokens
    expected = engine.forward(embeds, positions).copy()
    monkeypatch.setattr(_torch_cache, "FIRST_CAPACITY", 16)
    small = engines.create("torch", engine._bundle, device="cpu")
    small.forward(embeds[:, :15], positions[..., :15])
    capacities = []
    for at in range(15, 40):
        small.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
        capacities.append(small._cache.capacity)
    assert sorted(set(capacities)) == [16, 32, 64]
    small.forward(embeds[:, 40:59], positions[..., 40:59])
    close(small.forward(embeds[:, 59:], positions[..., 59:]), expected)
    assert all((buffer[:, 60:] == 0).all() and buffer[:, :60].any() for buffer in small._cache.keys), (
        "tokens that aren't there yet have no keys"
    )


def test_what_the_model_cannot_hold_is_an_error(engine, bundle, tokens):
    limit = bundle.manifest.model.max_positions
    embeds = np.zeros((1, limit + 1, tokens[0].shape[2]), np.float32)
    with pytest.raises(EngineError, match=f"more than the {limit}"):
        engine.forward(embeds, np.zeros((3, 1, limit + 1), np.int64))
    with pytest.raises(EngineError, match=r"expected \[1, S, 64\]"):
        engine.forward(embeds[0], np.zeros((3, 1, 1), np.int64))
    with pytest.raises(EngineError, match=r"expected \(3, 1, 2\)"):
        engine.forward(embeds[:, :2], np.zeros((3, 1, 3), np.int64))
    assert engine.length == 0


def test_memory_that_runs_out_is_said_and_forgotten(engine, tokens, monkeypatch):
    embeds, positions = tokens
    expected = engine.forward(embeds, positions).copy()

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    with monkeypatch.context() as patch:
        patch.setattr("crab_edge.engines._torch_cache.Cache.reserve", full)
        with pytest.raises(EngineError, match=r"short of memory for 60 tokens: about \d+ MB.*crab-edge plan"):
            engine.rewind(0)
            engine.forward(embeds, positions)
    assert engine.length == 0
    close(engine.forward(embeds, positions), expected)


def test_an_interrupted_step_leaves_no_half_grown_cache(engine, tokens, monkeypatch):
    embeds, positions = tokens
    expected = engine.forward(embeds, positions).copy()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("crab_edge.engines._torch_cache.Cache.reserve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.forward(embeds[:, :1], positions[..., :1])
    assert engine.length == 0 and engine._cache is None and engine._step is None
    close(engine.forward(embeds, positions), expected)


def test_graphs_are_loaded_once_and_dropped(bundle, tokens):
    small = engines.create("torch", bundle, device="cpu", low_memory=True)
    mel = np.zeros((1, bundle.features.n_mels, 200), np.float32)
    small.warm(vision=False)
    assert small._graphs.names() == {"audio"}
    heard = small.audio(mel, np.array([200]))
    said = small.forward(*tokens).copy()
    assert small._graphs.names() == {"decoder"}
    close(small.audio(mel, np.array([200])), heard)
    kept = engines.create("torch", bundle, device="cpu")
    assert not kept.low_memory
    kept.warm()
    futures = {name: kept._graphs.start(name) for name in kept._graphs.names()}
    assert set(futures) == {"decoder", "audio", "vision"}
    close(kept.forward(*tokens), said)
    assert {name: kept._graphs.start(name) for name in kept._graphs.names()} == futures
    kept.close()
    assert kept.length == 0 and kept._graphs.names() == set()
    close(kept.forward(*tokens), said)


def test_router_weights_equal_onnxruntime(engine, reference, tokens, monkeypatch):
    from crab_edge.engines import _torch_trace

    embeds, positions = tokens[0][0], tokens[1][:, 0]
    theirs = reference.tracer()
    ours = engine.tracer()
    assert ours.layers == theirs.layers
    whole = ours(embeds, positions)
    np.testing.assert_allclose(whole, theirs(embeds, positions), atol=2e-5)
    assert engine.length == 0
    monkeypatch.setattr(_torch_trace, "CHUNK", 7)
    np.testing.assert_allclose(ours(embeds[:50], positions[:, :50]), whole[:, :50], atol=1e-5)
    ours.close()
    with pytest.raises(EngineError, match="closed"):
        ours(embeds, positions)


def test_a_decoder_without_routers_cannot_be_traced(engine):
    from dataclasses import replace

    decoder = engine._part("decoder")
    decoder.layers = [
        replace(layer, **{name: replace(getattr(layer, name), route=None) for name in groups})
        for layer in decoder.layers
        for groups in [("qkv", "o", "gate_up", "down")]
    ]
    with pytest.raises(InputError, match="no linear of the decoder has a router"):
        engine.tracer()


def test_describe_says_what_runs(bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    described = engines.create("torch", bundle).describe()
    assert described["name"] == "torch" and described["device"] == "cpu" and described["dtype"] == "float32"
    assert "torch finds no GPU" in described["provider"]
    short = engines.create("torch", bundle, device="cpu", dtype="bfloat16").describe()
    assert short["dtype"] == "bfloat16" and "finds no GPU" not in short["provider"]


def test_devices_and_types_that_are_not_there(bundle, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        with pytest.raises(EngineError, match=rf"device {device}: torch .* finds no GPU \(.+\); check"):
            engines.create("torch", bundle, device=device)
    for device in ("gpu", "cuda:", "cuda:x", "cuda-1"):
        with pytest.raises(InputError, match="auto, cpu, cuda and cuda:N"):
            engines.create("torch", bundle, device=device)
    with pytest.raises(InputError, match="dtype int8: on cpu expected one of float32, bfloat16, float16"):
        engines.create("torch", bundle, device="cpu", dtype="int8")


def test_cards(bundle, monkeypatch):
    """What is refused on a machine with one card, without having it."""
    from crab_edge.engines import _torch_device as devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Turing")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (300 << 20, 400 << 20))
    kind = SimpleNamespace(is_integrated=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: kind)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 30 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10 << 20)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: object())
    card = devices.choose_device("auto")
    assert card == devices.choose_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(EngineError, match=r"cuda:1 isn't there; choose one of: cuda:0 \(Turing\)"):
        devices.choose_device("cuda:1")
    assert devices.choose_dtype(None, card) == torch.bfloat16
    with pytest.raises(EngineError, match=r"capability 7\.5, but bfloat16 needs 8\.0; use dtype float16"):
        devices.check_dtype(card, torch.bfloat16)
    with pytest.raises(InputError, match="dtype float32: on cuda:0 expected one of bfloat16, float16"):
        devices.choose_dtype("float32", card)
    devices.check_room(card, "it", 319 << 20)
    with pytest.raises(DeviceError, match="about 321 MB are needed, 320 MB are free"):
        devices.check_room(card, "it", 321 << 20)
    # A Jetson's file cache gives way.
    kind.is_integrated = 1
    monkeypatch.setattr(devices, "available_bytes", lambda: 380 << 20)
    devices.check_room(card, "it", 400 << 20)
    with pytest.raises(DeviceError, match="about 401 MB are needed, 400 MB are free"):
        devices.check_room(card, "it", 401 << 20)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DependencyError, match=r"crab-edge\[cuda\]"):
        devices.choose_device("cuda")


def test_short_memory_is_a_device_error():
    """Without a number where nobody knows what is needed."""
    from crab_edge.engines import _torch_device as devices

    cpu = torch.device("cpu")
    for needed, said in ((0, "for it: 0 MB are free"), (5 << 20, "for it: about 5 MB are needed, 0 MB")):
        with pytest.raises(DeviceError, match=said), devices.running(cpu, "it", needed):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(EngineError, match=r"it failed on cpu \(RuntimeError: no\)") as other:
        with devices.running(cpu, "it", 0):
            raise RuntimeError("no")
    assert not isinstance(other.value, DeviceError)


def test_a_damaged_graph_comes_with_its_first_use(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle.path, folder)
    copy = Bundle.open(folder)
    (folder / "audio.onnx").write_bytes(b"\x0a\xff")
    engine = engines.create("torch", copy, device="cpu")
    engine.warm()
    mel, lengths = np.zeros((1, 32, 200), np.float32), np.array([200])
    with pytest.raises(InputError, match=r"audio.onnx: not a graph .*copy the bundle again"):
        engine.audio(mel, lengths)
    shutil.copy(bundle.path / "audio.onnx", folder)
    assert engine.audio(mel, lengths).shape == (50, 64)


def test_the_packaged_bundle_answers_like_onnxruntime():
    """Exact products here, int8 activations there: the answers are the same all the same."""
    ours, theirs = (load(None, name, threads=1).open(sample_clip()) for name in ("torch", "onnxruntime"))
    assert ours.ask(task="ave").raw == theirs.ask(task="ave").raw


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_cuda_equals_the_cpu(bundle, tokens, dtype):
    """Kernels against exact products of the same type, and a replayed step against its chunk."""
    embeds, positions = tokens
    exact, fast = (engines.create("torch", bundle, device=device, dtype=dtype) for device in ("cpu", "cuda"))

    def near(actual, expected):
        assert np.linalg.norm(actual - expected) < 3e-2 * np.linalg.norm(expected)

    near(fast.forward(embeds, positions), exact.forward(embeds, positions))
    fast.rewind(50)
    for at in range(50, 60):
        said = fast.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
    assert fast._step.graph is not None
    exact.rewind(59)
    near(said, exact.forward(embeds[:, 59:], positions[..., 59:]))
    pixels = np.random.default_rng(0).standard_normal((256, 1176)).astype(np.float32)
    near(fast.vision(pixels), exact.vision(pixels))
    mel = np.random.default_rng(0).standard_normal((2, bundle.features.n_mels, 200)).astype(np.float32)
    near(fast.audio(mel, np.array([200, 61])), exact.audio(mel, np.array([200, 61])))
