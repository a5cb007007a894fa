"""The benchmark's bookkeeping on a decoder of a few kilobytes; nothing here looks at how long it took."""

import numpy as np
import onnx
import pytest
from crab_edge_apps import _bench_ask
from crab_edge_apps._bench_decoder import (
    DecoderShape,
    RandomLinears,
    RandomWeights,
    weight_bytes,
    write_decoder,
)

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
        # One scale for 64 or 128 values: A and R take the widest block that divides their width.
        down = sum((32 + 3) * k * (8 + 32 / k) for k, _ in widths) / 8
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


def test_adapter_nodes_take_the_widest_block_that_divides_their_width(tmp_path):
    path = tmp_path / "decoder.onnx"
    write_decoder(SMALL, path, adapters=True, experts="unfolded8", block=32, accuracy_level=4)
    found = {}
    for node in onnx.load(str(path), load_external_data=False).graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.domain == "crab":
            found.setdefault((node.op_type, attributes["K"]), set()).add(attributes["block"])
    # N*r = 96 has no wider one: it would have to be padded.
    assert found == {("ILoRARoute", 64): {64}, ("ILoRARoute", 128): {128}, ("ILoRAExperts", 96): {32}}
