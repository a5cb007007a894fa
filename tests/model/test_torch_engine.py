"""The reference engine: its cache, its towers and what it refuses."""

import numpy as np
import pytest
import torch

from crab_edge.engines.torch import TorchEngine
from crab_edge.errors import EngineError, InputError
from crab_edge.model import add_adapter, save_adapter, save_base

S, H = 20, 64


@pytest.fixture
def engine(tiny, drawn):
    return TorchEngine(add_adapter(tiny, drawn))


@pytest.fixture
def prompt():
    rng = np.random.default_rng(0)
    positions = np.stack([np.arange(S), np.arange(S) // 3, np.arange(S) % 5])[:, None].astype(np.int64)
    return rng.standard_normal((1, S, H)).astype(np.float32), positions


def test_cached_steps_equal_one_pass(engine, prompt, tiny_config):
    x, p = prompt
    whole = engine.forward(x, p)
    assert whole.shape == (tiny_config.text_config.vocab_size,) and whole.dtype == np.float32
    assert engine.length == S
    engine.rewind(0)
    engine.forward(x[:, :11], p[..., :11])
    for i in range(11, S):
        last = engine.forward(x[:, i : i + 1], p[..., i : i + 1])
    np.testing.assert_allclose(last, whole, atol=1e-5)


def test_rewinding_to_a_prefix(engine, prompt):
    x, p = prompt
    whole = engine.forward(x, p)
    noise = np.random.default_rng(1).standard_normal((1, 5, H)).astype(np.float32)
    engine.rewind(12)
    engine.forward(noise, p[..., :5])
    engine.rewind(12)
    assert engine.length == 12
    np.testing.assert_allclose(engine.forward(x[:, 12:], p[..., 12:]), whole, atol=1e-5)
    with pytest.raises(EngineError, match="rewind to 21"):
        engine.rewind(S + 1)


def test_equal_to_the_models_own_forward(engine, tiny_config):
    ids = np.random.default_rng(0).integers(10, tiny_config.text_config.vocab_size, S)
    positions = np.tile(np.arange(S), (3, 1, 1))
    ours = engine.forward(engine.embed(ids)[None], positions)
    with torch.no_grad():
        tensor = torch.from_numpy(ids)[None]
        theirs = engine.model(input_ids=tensor, position_ids=torch.from_numpy(positions)).logits[0, -1]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_vision_takes_whole_grids(engine):
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((512, 1176)).astype(np.float32)
    both = engine.vision(patches)
    assert both.shape == (128, H) and both.dtype == np.float32
    # Frames don't see each other in the tower.
    np.testing.assert_allclose(both[64:], engine.vision(patches[256:]), atol=1e-5)
    with pytest.raises(EngineError, match="256"):
        engine.vision(patches[:100])


@pytest.mark.parametrize("frames", [200, 37, 401, 599, 1000])
def test_audio_chunks_are_the_official_towers(engine, frames):
    mel = np.random.default_rng(frames).standard_normal((80, frames)).astype(np.float32)
    count = -(-frames // 200)
    chunks = np.zeros((count, 80, 200), np.float32)
    lengths = np.array([min(200, frames - 200 * i) for i in range(count)])
    for i, n in enumerate(lengths):
        chunks[i, :, :n] = mel[:, 200 * i : 200 * i + n]
    tower = engine.model.get_base_model().model.audio_tower
    with torch.no_grad():
        official = tower(torch.from_numpy(mel), feature_lens=torch.tensor([frames])).last_hidden_state
    ours = engine.audio(chunks, lengths)
    assert ours.shape == (((frames - 1) // 2 + 1 - 2) // 2 + 1, H)
    np.testing.assert_allclose(ours, official, atol=1e-5)


def test_two_recordings_in_one_call(engine):
    chunks = np.random.default_rng(0).standard_normal((3, 80, 200)).astype(np.float32)
    together = engine.audio(chunks, np.array([199, 200, 37]))
    apart = [engine.audio(chunks[:1], np.array([199])), engine.audio(chunks[1:], np.array([200, 37]))]
    np.testing.assert_allclose(together, np.concatenate(apart), atol=1e-5)
    with pytest.raises(EngineError, match="lengths"):
        engine.audio(chunks, np.array([200, 200]))


def test_load_gives_the_same_engine(engine, tiny_config, tokenizer_file, prompt, tmp_path):
    from crab_edge.model import build

    save_adapter(engine.model, tmp_path / "adapter")
    save_base(build(tiny_config, seed=3), tmp_path / "base", tokenizer_file, {})
    again = TorchEngine.load(tmp_path / "base", tmp_path / "adapter")
    np.testing.assert_array_equal(again.forward(*prompt), engine.forward(*prompt))
    bare = TorchEngine.load(tmp_path / "base", dtype=torch.bfloat16)
    assert bare.describe()["dtype"] == "bfloat16"
    assert np.abs(bare.forward(*prompt) - engine.forward(*prompt)).max() > 0


def test_refusals(engine, prompt):
    x, p = prompt
    with pytest.raises(EngineError, match="expected"):
        engine.forward(x, p[:, 0])
    engine.length = engine._config.text_config.max_position_embeddings
    with pytest.raises(EngineError, match="positions"):
        engine.forward(x, p)


def test_router_weights_are_those_of_the_steps(engine, prompt):
    """One traced pass against the layers' own reports, step by step, and without touching the cache."""
    from crab_edge.ilora.torch_tuner import trace_routes

    x, p = prompt
    tracer = engine.tracer()
    weights = tracer(x[0], p[:, 0])
    assert weights.shape == (len(tracer.layers), S, 3) and engine.length == 0
    with trace_routes(engine._inner.language_model) as routes:
        for i in range(S):
            engine.forward(x[:, i : i + 1], p[..., i : i + 1])
    stepped = np.stack([torch.cat(routes[name], dim=1)[0].numpy() for name in tracer.layers])
    np.testing.assert_allclose(weights, stepped, atol=1e-5)


def test_a_model_without_routers_cannot_be_traced(tiny):
    with pytest.raises(InputError, match="no linear of the decoder has a router"):
        TorchEngine(tiny).tracer()
