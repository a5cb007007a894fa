"""Features against transformers' own processors, on the same pixels and samples."""

import numpy as np
import pytest

from crab_edge.errors import BundleError, InputError
from crab_edge.features import (
    FeatureConfig,
    audio_chunks,
    audio_token_count,
    log_mel,
    patches,
    vision_token_count,
)

CFG = FeatureConfig()


def noise(n: int, seed: int = 0) -> np.ndarray:
    t = np.arange(n) / 16000
    tone = np.sin(2 * np.pi * 440 * t) * (t % 0.5 < 0.25)
    return (0.3 * tone + 0.01 * np.random.default_rng(seed).standard_normal(n)).astype(np.float32)


def frames(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 224, 224, 3), dtype=np.uint8)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("samples", [1, 150, 200, 201, 400, 16000, 16001, 80555, 160123])
def test_log_mel_is_whispers(n_mels, samples):
    """`padding="max_length"`, then the attention mask's frames."""
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=n_mels)
    wave = noise(samples)
    official = extractor(wave, sampling_rate=16000, return_attention_mask=True, return_tensors="np")
    expected = official["input_features"][0][:, official["attention_mask"][0].astype(bool)]
    ours = log_mel(wave, FeatureConfig(n_mels=n_mels))
    assert ours.dtype == np.float32 and ours.shape == expected.shape == (n_mels, -(-samples // 160))
    # The official float32 path (torch) rounds near the floor; its float64 one (numpy) agrees to a rounding.
    np.testing.assert_allclose(ours, expected, atol=2e-3)
    padded = np.zeros((1, 480000), np.float32)
    padded[0, :samples] = wave
    exact = extractor._np_extract_fbank_features(padded, "cpu")[0][:, : expected.shape[1]]
    np.testing.assert_allclose(ours, exact, atol=2e-7)


def test_log_mel_floor_hangs_from_a_click_at_the_very_end():
    """The loudest frame may lie behind the last valid one, where the signal's end meets the padding."""
    extractor = pytest.importorskip("transformers").WhisperFeatureExtractor(feature_size=80)
    wave = noise(16000) * 1e-3
    wave[-1] = 1.0
    padded = np.zeros((1, 480000), np.float32)
    padded[0, :16000] = wave
    exact = extractor._np_extract_fbank_features(padded, "cpu")[0]
    assert exact[:, 100].max() > exact[:, :100].max()
    np.testing.assert_allclose(log_mel(wave, FeatureConfig(n_mels=80)), exact[:, :100], atol=2e-7)


def test_log_mel_of_silence_is_the_floor():
    assert np.unique(log_mel(np.zeros(16000, np.float32), CFG)).tolist() == [-1.5]


@pytest.mark.parametrize("wave", [np.zeros(0, np.float32), np.zeros((2, 100), np.float32)])
def test_log_mel_refuses_what_is_no_signal(wave):
    with pytest.raises(InputError, match="mono signal"):
        log_mel(wave, CFG)


def test_patches_of_a_still_are_the_image_processors():
    """Bit for bit; a still counts as two equal frames."""
    processor = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    still = frames(1)
    official = processor.Qwen2VLImageProcessorPil()(still[0], return_tensors="np")
    values, grid = patches(still, CFG)
    assert grid == tuple(official["image_grid_thw"][0]) == (1, 16, 16)
    assert values.dtype == np.float32 and values.shape == (256, 1176)
    np.testing.assert_array_equal(values, official["pixel_values"])


def test_patches_of_a_video_hold_both_frames_of_each_pair():
    """The image processor on each frame alone gives each half of a temporal patch."""
    processor = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    video = frames(4)
    values, grid = patches(video, CFG)
    assert grid == (2, 16, 16)
    alone = [
        processor.Qwen2VLImageProcessorPil()(f, return_tensors="np")["pixel_values"].reshape(256, 3, 2, 196)
        for f in video
    ]
    values = values.reshape(2, 256, 3, 2, 196)
    for i in range(4):
        np.testing.assert_array_equal(values[i // 2, :, :, i % 2], alone[i][:, :, 0])


def test_patches_repeat_the_last_frame_of_an_odd_number():
    video = frames(3)
    np.testing.assert_array_equal(patches(video, CFG)[0], patches(video[[0, 1, 2, 2]], CFG)[0])


@pytest.mark.parametrize(
    "bad", [frames(0), np.zeros((2, 112, 224, 3), np.uint8), np.zeros((2, 224, 224, 3), np.float32)]
)
def test_patches_refuse_other_shapes_and_types(bad):
    with pytest.raises(InputError, match="expected uint8 frames"):
        patches(bad, CFG)


@pytest.mark.parametrize(
    ("length", "expected"), [(1, [1]), (199, [199]), (200, [200]), (201, [200, 1]), (1000, [200] * 5)]
)
def test_audio_chunks(length, expected):
    mel = np.random.default_rng(0).standard_normal((128, length)).astype(np.float32)
    chunks, lengths = audio_chunks(mel, CFG)
    assert lengths.tolist() == expected and lengths.dtype == np.int64
    assert chunks.shape == (len(expected), 128, 200) and chunks.flags.c_contiguous
    np.testing.assert_array_equal(np.concatenate(list(chunks), axis=1)[:, :length], mel)
    assert not chunks[-1, :, expected[-1] :].any()


def test_token_counts_are_the_references():
    """Crab+ reference, section 4: 10 s, 20 s, 4 s, 5.02 s and 1 s of sound; 10 frames, 4 frames, a still."""
    assert [audio_token_count(f) for f in (1000, 2000, 400, 502, 100)] == [250, 500, 100, 125, 25]
    assert [vision_token_count((t, 16, 16), CFG) for t in (5, 2, 1)] == [320, 128, 64]


@pytest.mark.parametrize("length", [*range(1, 12), 199, 200, 201, 202, 203, 399, 1001])
def test_audio_token_count_is_transformers(length):
    module = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")
    assert audio_token_count(length) == max(0, module._get_feat_extract_output_lengths(length))


def test_config_survives_its_file(tmp_path):
    cfg = FeatureConfig(n_mels=80, system_prompt="Sei kurz: 🎻")
    cfg.save(tmp_path / "features.json")
    assert FeatureConfig.load(tmp_path / "features.json") == cfg


@pytest.mark.parametrize("text", ["", "[]", '{"n_mels": 0}', '{"colour": 1}'])
def test_config_names_the_bad_file(tmp_path, text):
    (tmp_path / "features.json").write_text(text)
    with pytest.raises(BundleError, match=r"features\.json"):
        FeatureConfig.load(tmp_path / "features.json")


def test_config_names_the_missing_file(tmp_path):
    with pytest.raises(BundleError, match="export the model again"):
        FeatureConfig.load(tmp_path / "features.json")
