"""Router traces on the ONNX Runtime engine, over a tiny real bundle and the packaged one."""

import numpy as np
import pytest

from crab_edge import engines
from crab_edge.bundle import Bundle, default_bundle, sample_clip
from crab_edge.engines import _onnxruntime_trace as module
from crab_edge.errors import BundleError, EngineError, InputError
from crab_edge.session import load

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle():
    pytest.importorskip("torch")
    from tests.shared_bundle import shared_tiny_bundle

    return Bundle.open(shared_tiny_bundle())


@pytest.fixture
def engine(bundle):
    return engines.create("onnxruntime", bundle, threads=1)


@pytest.fixture(scope="module")
def tokens(bundle):
    """Embeddings float32 [60, H] and positions int64 [3, 60] of a made-up prompt."""
    ids = np.random.default_rng(0).integers(0, bundle.manifest.model.vocab_size, 60)
    positions = np.stack([np.arange(60), np.arange(60) // 2, np.arange(60) % 7])
    return bundle.embedding.rows(ids), positions.astype(np.int64)


def test_chunks_and_single_tokens_give_the_same(engine, tokens, monkeypatch):
    tracer = engine.tracer()
    whole = tracer(*tokens)
    assert whole.shape == (len(tracer.layers), 60, 3) and whole.dtype == np.float32
    np.testing.assert_allclose(whole.sum(axis=-1), 1, atol=1e-6)
    for size in (59, 7, 1):
        monkeypatch.setattr(module, "CHUNK", size)
        np.testing.assert_allclose(engine.tracer()(*tokens), whole, atol=2e-5)


def test_a_later_token_changes_no_earlier_weight(engine, tokens):
    tracer = engine.tracer()
    embeds, positions = tokens
    np.testing.assert_allclose(
        tracer(embeds[:30], positions[:, :30]), tracer(embeds, positions)[:, :30], atol=2e-5
    )


def test_a_common_beginning_is_run_once(engine, tokens, monkeypatch):
    """Exactly the weights of a fresh tracer, whatever came before; chunks end at the same places."""
    monkeypatch.setattr(module, "CHUNK", 16)
    embeds, positions = tokens
    changed, moved = embeds.copy(), positions.copy()
    changed[40] += 1
    moved[1, 20] += 1
    passes = [(embeds[:50], positions[:, :50]), (embeds, positions), (changed, positions)]
    passes += [(changed[:33], moved[:, :33]), (changed[:33], moved[:, :33]), (changed[:5], moved[:, :5])]
    tracer, starts = engine.tracer(), []
    run = module._TracedCache.run

    def counted(self, chunk, position_ids, total):
        starts.append(total - chunk.shape[1])
        return run(self, chunk, position_ids, total)

    for one in passes:
        expected = engine.tracer()(*one)
        with monkeypatch.context() as patch:
            patch.setattr(module._TracedCache, "run", counted)
            np.testing.assert_array_equal(tracer(*one), expected)
    assert starts == [0, 16, 32, 48, 48, 32, 48, 16, 32, 32, 0]


def test_the_engine_goes_on_as_if_nothing_happened(bundle, engine, tokens):
    embeds, positions = tokens[0][None], tokens[1][:, None]
    engine.forward(embeds[:, :40], positions[..., :40])
    engine.tracer()(*tokens)
    assert engine.length == 40
    other = engines.create("onnxruntime", bundle, threads=1)
    other.forward(embeds[:, :40], positions[..., :40])
    expected = other.forward(embeds[:, 40:], positions[..., 40:])
    np.testing.assert_array_equal(engine.forward(embeds[:, 40:], positions[..., 40:]), expected)


def test_closing_frees_the_session(engine, tokens):
    tracer = engine.tracer()
    assert tracer._cache is None, "nothing is opened before the first pass"
    tracer(*tokens)
    tracer.close()
    tracer.close()
    assert tracer._cache is None and tracer._model is None
    with pytest.raises(EngineError, match="closed"):
        tracer(*tokens)


def test_too_little_memory_is_refused_at_once(engine, monkeypatch):
    monkeypatch.setattr(module, "available_bytes", lambda: 10)
    with pytest.raises(EngineError, match="opens the decoder a second time"):
        engine.tracer()
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    engine.tracer()


def test_a_damaged_graph(engine, bundle, tmp_path, monkeypatch):
    for content, words in ((b"\x80", "not a decoder graph"), (b"", "no linear of the decoder has a router")):
        (tmp_path / "decoder.onnx").write_bytes(content)
        monkeypatch.setattr(type(bundle), "graph", lambda *_: tmp_path / "decoder.onnx")
        with pytest.raises(InputError, match=words):
            engine.tracer()
    (tmp_path / "decoder.onnx").unlink()
    with pytest.raises(BundleError, match="can't be read"):
        engine.tracer()


def test_the_packaged_bundle_as_it_is():
    """The answer is the same with and without a trace, and the text of the trace is the answer."""
    model = load(default_bundle(), threads=1)
    session = model.open(sample_clip())
    plain = session.ask(task="ave")
    traced = session.ask(task="ave", router=True)
    again = session.ask(task="ave")
    assert plain.raw == traced.raw == again.raw and plain.router is None and again.router is None
    trace = traced.router
    adapter = model.bundle.manifest.model.adapter
    assert trace.weights.shape == (42, traced.timings.prompt_tokens + traced.timings.tokens, adapter.experts)
    spoken = [text for text, name in zip(trace.tokens, trace.modality, strict=True) if name == "answer"]
    assert "".join(spoken) == traced.raw and len(spoken) == traced.timings.tokens
    assert trace.modality.count("video") == 320 and trace.modality.count("audio") == 250
    assert traced.timings.trace_s > 0 == plain.timings.trace_s
