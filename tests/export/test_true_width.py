"""Crab+ 7B and 3B at their true widths: one layer of each tower and two of the decoder, official files in,
a bundle that answers out.

Everything but the number of layers and the vocabulary is the real model's; the weights are noise.
"""

import json

import pytest
from crab_edge_export import export_bundle
from crab_edge_export.random_model import resized, write_adapter, write_base

import crab_edge
from crab_edge.model import official_config
from crab_edge.model.official import import_adapter
from tests import media

SIZES = ("3b", "7b")


@pytest.fixture(scope="module", params=SIZES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    config = resized(official_config(request.param), layers=2, vision_depth=1, audio_layers=1, vocab=2048)
    base = write_base(config, folder / "base")
    write_adapter(config, folder / "finetune_weights.bin")
    report = import_adapter(folder / "finetune_weights.bin", folder / "adapter", base=base)
    assert list(report.linears.values()) == [2 * 7, 3, 3]  # a decoder layer has seven, an encoder's three
    assert len(report.idle_parts) == 2
    (folder / "finetune_weights.bin").unlink()
    return folder


def _parity(bundle):
    return json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))["parity"]


@pytest.mark.parametrize(("bits", "block"), [(32, 32), (4, 128)])
def test_the_graphs_compute_what_the_float_model_does(model, tmp_path, bits, block):
    clip = [media.picture(tmp_path / "still.png"), media.sound(tmp_path / "tone.wav", media.tone(1.5))]
    out = export_bundle(
        model / "base",
        model / "adapter",
        tmp_path / "bundle",
        bits=bits,
        block=block,
        method="rtn",
        compare="answers",
        calibration_media=[clip],
        kv_dtype="float32" if bits == 32 else "auto",
    )
    parity = _parity(out)
    if bits == 32:
        assert parity["logits_error"]["worst"] < 1e-3
        assert parity["vision_error"]["worst"] < 1e-3 and parity["audio_error"]["worst"] < 1e-3
        assert parity["greedy_agreement"] == 1.0
    else:
        # Round-to-nearest to four bits of Gaussian noise is off by a tenth of its size at every linear.
        assert 0.01 < parity["logits_error"]["mean"] < 0.35
        assert parity["greedy_agreement"] > 0.5
    session = crab_edge.load(out).open(clip)
    answer = session.ask(task="arig", max_new_tokens=3, grammar=False)
    again = session.ask(task="arig", max_new_tokens=3, grammar=False)
    assert answer.timings.tokens == 3 and answer.raw == again.raw
    # 64 tokens of the picture and 37 of the sound at least.
    assert again.timings.cached_tokens > 100
