import numpy as np
import onnx
import pytest
from crab_edge_export.precision import choose

from crab_edge.features import FeatureConfig, audio_chunks
from tests.export.graphs import low_bit_weights, open_session, relative, write_tower
from tests.tiny_model import MELS, make_tiny_model_dir

FLOAT = choose(32, []).tower()
EXACT8 = choose(4, [], experts="unfolded8", accuracy_level=0).tower()


def run(path, **inputs):
    (out,) = open_session(path).run(["embeddings"], inputs)
    return out


def patches(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count * 256, 1176)).astype(np.float32)


def sound(frames, seed=0):
    mel = np.random.default_rng(seed).standard_normal((MELS, frames)).astype(np.float32)
    return audio_chunks(mel, FeatureConfig(n_mels=MELS))


@pytest.fixture(scope="module")
def towers(tiny, tmp_path_factory):
    """Float graphs of both encoders with their adapters."""
    folder = tmp_path_factory.mktemp("towers")
    for name in ("vision", "audio"):
        write_tower(tiny, name, FLOAT, folder / f"{name}.onnx", tiny.adapter)
    return folder


@pytest.mark.parametrize("count", [1, 3, 5])
def test_vision_equals_the_official_forward(tiny, towers, count):
    pixels = patches(count)
    out = run(towers / "vision.onnx", pixel_values=pixels)
    assert out.shape == (count * 64, 64)
    assert relative(out, tiny.torch.vision(pixels)) < 1e-5


@pytest.mark.parametrize("frames", [4, 37, 100, 199, 200, 201, 401, 402, 603])
def test_audio_equals_the_official_forward(tiny, towers, frames):
    chunks, lengths = sound(frames)
    out = run(towers / "audio.onnx", mel=chunks, lengths=lengths)
    wanted = tiny.torch.audio(chunks, lengths)
    assert out.shape == wanted.shape
    assert relative(out, wanted) < 1e-5


def test_what_lies_behind_a_chunk_length_is_ignored(towers):
    chunks, lengths = sound(150)
    noisy = chunks.copy()
    noisy[0, :, 151:] = 9.0  # frame 150 is seen by the convolution of frame 149
    same = [run(towers / "audio.onnx", mel=mel, lengths=lengths) for mel in (chunks, noisy)]
    assert np.array_equal(*same)


@pytest.mark.parametrize("name", ["vision", "audio"])
def test_low_bit_towers_use_their_stored_weights(tiny, tmp_path, name):
    """Torch with the graph's dequantised base weights and no adapter agrees: K need not be whole blocks."""
    import torch

    from crab_edge.engines.torch import TorchEngine

    path = tmp_path / "tower.onnx"
    write_tower(tiny, name, EXACT8, path, None)
    stored = low_bit_weights(path)
    assert any(weight.shape[1] % 32 for weight in stored.values())
    engine = TorchEngine.load(tiny.base)
    with torch.no_grad():
        for linear, weight in stored.items():
            target = engine._inner.get_submodule(linear).weight
            target.copy_(torch.from_numpy(weight).reshape(target.shape))
    if name == "vision":
        pixels = patches(2)
        actual, wanted = run(path, pixel_values=pixels), engine.vision(pixels)
    else:
        chunks, lengths = sound(301)
        actual, wanted = run(path, mel=chunks, lengths=lengths), engine.audio(chunks, lengths)
    assert relative(actual, wanted) < 1e-5


ROOTS = {"vision": "visual.", "audio": "audio_tower."}


@pytest.mark.parametrize(("name", "adapted"), [("vision", 6), ("audio", 6)])
def test_adapters_are_left_out_only_when_all_zero(tiny, tmp_path, name, adapted):
    _, zero = make_tiny_model_dir(tmp_path / "zero", towers=False)
    routes = {}
    for folder in (tiny.adapter, zero):
        path = tmp_path / f"{folder.parent.name}.onnx"
        weights = write_tower(tiny, name, EXACT8, path, folder)
        model = onnx.load(str(path))
        routes[folder] = sum(n.op_type == "ILoRARoute" for n in model.graph.node)
        left_out = [path for path in weights.zero_linears if path.startswith(ROOTS[name])]
        assert len(left_out) == (adapted if folder == zero else 0)
        assert bool(model.functions) == (folder != zero)
    assert routes[tiny.adapter] > 0 and routes[zero] == 0


def test_windows_of_another_size_are_refused(tiny, tmp_path):
    from types import SimpleNamespace

    from crab_edge_export.vision import Grid

    from crab_edge.errors import ModelError

    config = SimpleNamespace(patch_size=14, spatial_merge_size=2, window_size=96)
    with pytest.raises(ModelError, match="window"):
        Grid(config)
