"""The benchmark's bookkeeping on a decoder of a few kilobytes; nothing here looks at how long it took."""

import numpy as np
import pytest
from crab_edge_apps import _bench_ask, _bench_batch, _bench_clips
from crab_edge_apps._bench_decoder import (
    DecoderShape,
    RandomLinears,
    RandomWeights,
    weight_bytes,
    write_decoder,
)

from crab_edge.clip import Clip
from tests import media
from tests.shared_bundle import shared_tiny_bundle

SMALL = DecoderShape("small", 64, 128, 2, 2, 1, 32, 96, 32)


def test_byte_ratio_counts_what_the_adapters_add(tmp_path):
    options = {"block": 32, "accuracy_level": 4}
    write_decoder(SMALL, tmp_path / "base.onnx", adapters=False, experts="residual4x2", **options)
    write_decoder(SMALL, tmp_path / "one.onnx", adapters=True, experts="plane4", **options)
    write_decoder(SMALL, tmp_path / "two.onnx", adapters=True, experts="residual4x2", **options)
    base, one, two = (weight_bytes(tmp_path / f"{name}.onnx") for name in ("base", "one", "two"))

    def bytes_per_layer(planes: int) -> float:
        widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
        up = sum(n * 3 * 32 for _, n in widths) * planes * (4 + 32 / 32) / 8
        down = sum((32 + 3) * k for k, _ in widths) * (8 + 32 / 32) / 8
        return up + down

    assert one - base == pytest.approx(2 * bytes_per_layer(1), rel=0.02)
    assert two - base == pytest.approx(2 * bytes_per_layer(2), rel=0.02)


def test_every_layer_has_its_own_bytes():
    weights = RandomWeights(SMALL, adapters=False)
    assert weights.linear("language_model.layers.0.mlp.up_proj").weight.shape == (128, 64)
    make = RandomLinears._quantise
    writer = type("Writer", (), {"precision": type("P", (), {"block": 32})})()
    first, second = (make(writer, f"layers.{i}.mlp.up_proj", np.empty((128, 64)), 4, None) for i in (0, 1))
    assert not np.array_equal(first.q, second.q)


def test_ask_is_timed_in_its_own_process(tmp_path):
    clip = media.video(tmp_path / "clip.mp4", seconds=2, fps=4)
    result = _bench_ask.measure([clip], "avcap", shared_tiny_bundle(), 1, 1)
    assert result["rounds"] == 1 and result["min_s"] == result["max_s"] == result["median_s"]
    assert result["timings"]["total_s"] < result["median_s"]
    assert result["peak_bytes"] > 10e6


def test_a_batch_is_compared_with_a_loop_that_shares_nothing(monkeypatch):
    """Every figure of the table is there and the answers are the same; ratios depend on the machine."""
    monkeypatch.setattr(_bench_clips, "SECONDS", 1.5)
    monkeypatch.setattr(_bench_batch, "MAX_NEW_TOKENS", 24)
    result = _bench_batch.measure(2, shared_tiny_bundle(), 1)
    assert [one["tasks"] for one in result["shared"]] == [list(_bench_batch.TWO), list(_bench_batch.FIVE)]
    for one in result["shared"]:
        assert one["answers_equal"] and one["ratio"] == one["naive_s"] / one["batch_s"]
        assert one["prefixes_filled"] == 2, "one prefix a clip"
        assert 1 < one["bound"] < len(one["tasks"]) and one["bound"] < one["bound_decoding_free"]
    assert result["restart"]["passed"] and result["restart"]["rows"] == 10
    assert 0 < result["restart"]["rows_when_killed"] <= 10
    assert result["memory"]["one_clip_bytes"] > 10e6
    slow = result["shared"][0] | {"passed": False}
    missed = _bench_batch.problems(
        result | {"shared": [slow], "memory": result["memory"] | {"passed": False}}
    )
    assert len(missed) == 2 and "2 tasks" in missed[0] and "memory" in missed[1]


def test_clips_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(_bench_clips, "SECONDS", 1.0)
    paths = _bench_clips.write_clips(tmp_path, 3)
    contents = []
    for path in paths:
        with Clip.open([path]) as clip:
            assert clip.duration_s == pytest.approx(1.0, abs=0.15) and clip.audios
            contents.append((clip.videos[0].frames(4).tobytes(), clip.audios[0].waveform().tobytes()))
    assert len({pictures for pictures, _ in contents}) == len({sound for _, sound in contents}) == 3
