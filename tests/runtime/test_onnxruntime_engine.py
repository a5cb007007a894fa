"""The ONNX Runtime engine on a tiny real bundle with exact products (accuracy level 0)."""

import shutil

import numpy as np
import pytest

from crab_edge import engines
from crab_edge.bundle import Bundle
from crab_edge.engines import onnxruntime as module
from crab_edge.errors import BundleError, DependencyError, EngineError
from crab_edge.manifest import FileInfo
from crab_edge.session import Model, load
from tests import media

pytest.importorskip("onnxruntime")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def bundle():
    from tests.shared_bundle import shared_tiny_bundle

    return Bundle.open(shared_tiny_bundle())


@pytest.fixture
def engine(bundle):
    return engines.create("auto", bundle, threads=1)


@pytest.fixture(scope="module")
def tokens(bundle):
    """Embeddings float32 [1, 60, H] and positions int64 [3, 1, 60] of a made-up prompt."""
    random = np.random.default_rng(0)
    ids = random.integers(0, bundle.manifest.model.vocab_size, 60)
    positions = np.stack([np.arange(60), np.arange(60) // 2, np.arange(60) % 7])[:, None]
    return bundle.embedding.rows(ids)[None], positions.astype(np.int64)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max())


def test_describe(engine):
    described = engine.describe()
    assert described["name"] == "onnxruntime" and described["provider"] == "CPUExecutionProvider"
    assert described["threads"] == 1


def test_steps_equal_one_pass(engine, tokens):
    embeds, positions = tokens
    whole = engine.forward(embeds, positions).copy()
    engine.rewind(0)
    engine.forward(embeds[:, :20], positions[..., :20])
    for at in range(20, 60):
        step = engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
    assert engine.length == 60
    close(step, whole)


def test_rewinding_forgets(engine, tokens):
    embeds, positions = tokens
    expected = engine.forward(embeds[:, :40], positions[..., :40]).copy()
    engine.forward(embeds[:, 40:], positions[..., 40:])
    engine.rewind(25)
    close(engine.forward(embeds[:, 25:40], positions[..., 25:40]), expected)
    for wrong in (-1, 41):
        with pytest.raises(EngineError, match="can't rewind"):
            engine.rewind(wrong)


def test_the_cache_is_written_in_place(engine, tokens):
    embeds, positions = tokens
    engine.forward(embeds[:, :10], positions[..., :10])
    buffers = engine._cache._buffers
    assert all(np.abs(buffer[:, :, :10]).max() > 0 for buffer in buffers)
    assert all(np.abs(buffer[:, :, 10:]).max() == 0 for buffer in buffers)


def test_the_cache_grows_and_keeps_its_content(engine, tokens, monkeypatch):
    embeds, positions = tokens
    expected = engine.forward(embeds, positions).copy()
    monkeypatch.setattr(module, "FIRST_CAPACITY", 16)
    small = module.OnnxRuntimeEngine(engine._bundle, threads=1)
    small.forward(embeds[:, :10], positions[..., :10])
    assert small._cache.capacity == 16
    small.forward(embeds[:, 10:59], positions[..., 10:59])
    assert small._cache.capacity == 64
    close(small.forward(embeds[:, 59:], positions[..., 59:]), expected)


def test_more_than_the_model_holds_is_an_error(engine, tokens):
    limit = engine._model.max_positions
    embeds = np.zeros((1, limit + 1, tokens[0].shape[2]), np.float32)
    with pytest.raises(EngineError, match=str(limit)):
        engine.forward(embeds, np.zeros((3, 1, limit + 1), np.int64))
    assert engine.length == 0


def test_towers(engine, bundle):
    width = bundle.manifest.model.hidden_size
    random = np.random.default_rng(0)
    assert engine.vision(random.random((512, 1176), np.float32)).shape == (128, width)
    chunks = random.random((2, bundle.features.n_mels, 200), np.float32)
    assert engine.audio(chunks, np.array([200, 60])).shape == (65, width)


def test_graphs_open_only_when_needed(engine, bundle):
    assert engine._graphs.names() == set()
    engine.audio(np.zeros((1, bundle.features.n_mels, 200), np.float32), np.array([200]))
    assert engine._graphs.names() == {"audio"}
    engine.warm(vision=False, audio=True)
    assert engine._graphs.names() == {"audio", "decoder"}
    engine.warm()
    assert all(engine._graphs.start(name).result(timeout=30) for name in engine._graphs.names())


def test_encoders_close_before_the_decoder_opens(bundle, tokens):
    embeds, positions = tokens
    small = engines.create("onnxruntime", bundle, threads=1, low_memory=True)
    chunks = np.zeros((1, bundle.features.n_mels, 200), np.float32)
    small.warm()
    assert small._graphs.names() == {"audio", "vision"}
    heard = small.audio(chunks, np.array([200]))
    said = small.forward(embeds, positions).copy()
    assert small._graphs.names() == {"decoder"}
    close(small.audio(chunks, np.array([200])), heard)
    kept = engines.create("onnxruntime", bundle, threads=1, low_memory=False)
    close(kept.forward(embeds, positions), said)
    assert small.length == 60


def test_encoders_close_where_memory_is_short(bundle, monkeypatch):
    for available, expected in ((10_000, True), (10**12, False), (None, False)):
        monkeypatch.setattr(module, "available_bytes", lambda available=available: available)
        assert engines.create("onnxruntime", bundle).low_memory == expected


def test_engines_of_another_library_do_not_count_as_memory(bundle, monkeypatch):
    """A package for a Jetson has graphs with data beside them; this engine opens none of it."""
    files = bundle.manifest.files
    graphs = [f"{name}{end}" for name in module.GRAPHS for end in (".onnx", ".onnx.data")]
    held = sum(files[name].size for name in graphs if name in files)
    monkeypatch.setattr(module, "available_bytes", lambda: int(held * module.PACKED) + 1)
    large = FileInfo(size=1 << 40, sha256="0" * 64)
    package = {f"engines/jetson-orin/{name}": large for name in ("decoder.onnx", "decoder.onnx.data")}
    changed = bundle.manifest.model_copy(update={"files": {**files, **package}})
    assert not engines.create("onnxruntime", Bundle(bundle.path, changed), threads=1).low_memory


def test_a_closed_engine_opens_again(engine, tokens):
    embeds, positions = tokens
    first = engine.forward(embeds, positions).copy()
    engine.close()
    assert engine.length == 0 and engine._graphs.names() == set()
    close(engine.forward(embeds, positions), first)


def test_mapped_weights_leave_memory(bundle, tmp_path):
    """A file that is mapped and was read: its pages go, its content stays."""
    import mmap
    import sys

    from crab_edge.memory import page_out, resident_bytes

    if not sys.platform.startswith("linux"):
        pytest.skip("a hint that only Linux knows")
    size = 64 << 20
    path = tmp_path / "weights.data"
    path.write_bytes(b"\7" * size)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapped:
        assert mapped[::4096].count(7) == size // 4096
        before = resident_bytes()
        page_out(tmp_path, ["other.data"])
        assert resident_bytes() > before - size // 4
        page_out(tmp_path, ["weights.data"])
        assert resident_bytes() < before - size // 2
        assert mapped[size - 1] == 7


def test_a_graph_that_cannot_be_opened(bundle, tmp_path):
    folder = shutil.copytree(bundle.path, tmp_path / "bundle")
    (folder / "decoder.onnx").write_bytes(b"no graph")
    engine = engines.create("onnxruntime", Bundle(folder, bundle.manifest))
    engine.warm(vision=False, audio=False)
    with pytest.raises(BundleError, match=r"decoder\.onnx: ONNX Runtime can't open it"):
        engine.forward(np.zeros((1, 1, 64), np.float32), np.zeros((3, 1, 1), np.int64))


def test_an_engine_whose_package_is_missing(bundle, monkeypatch):
    real = engines.importlib.util.find_spec
    monkeypatch.setattr(
        engines.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name)
    )
    with pytest.raises(DependencyError, match=r"pip install 'crab-edge\[cpu\]'"):
        load(bundle)
    assert "onnxruntime" not in engines.available() and "onnxruntime" in engines.names()


def test_a_whole_session_repeats_itself(bundle, tmp_path):
    clip = media.video(tmp_path / "clip.mp4", seconds=3, fps=4)
    model = Model(bundle, engines.create("auto", bundle, threads=1))
    session = model.open(clip)
    first = session.ask("Is there a dog?", max_new_tokens=12)
    session.ask(task="avcap", max_new_tokens=12)
    again = session.ask("Is there a dog?", max_new_tokens=12)
    assert again.raw == first.raw and again.timings.cached_tokens > 100
    fresh = load(bundle, threads=1).open(clip).ask("Is there a dog?", max_new_tokens=12)
    assert fresh.raw == first.raw and fresh.timings.cached_tokens == 0
