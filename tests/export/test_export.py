import json

import numpy as np
import pytest
from crab_edge_export import export_bundle
from crab_edge_export.precision import choose
from crab_edge_export.weights import WeightStore, canonical

from crab_edge.bundle import Bundle
from crab_edge.errors import InputError, ModelError
from tests.tiny_model import make_tiny_bundle, make_tiny_model_dir


def test_bundle_opens_and_runs(tiny_bundle):
    from crab_edge import engines

    bundle = Bundle.open(tiny_bundle, full=True)
    engine = engines.create("onnxruntime", bundle, threads=1)
    rows = engine.vision(np.zeros((512, 1176), np.float32))
    assert rows.shape == (128, 64)
    ids = bundle.prompt.suffix("Is there a dog?")
    positions = np.tile(np.arange(len(ids)), (3, 1, 1))
    logits = engine.forward(bundle.embedding.rows(ids)[None], positions)
    assert logits.shape == (bundle.manifest.model.vocab_size,) and np.isfinite(logits).all()


def test_manifest_says_what_it_is(tiny_bundle):
    manifest = Bundle.open(tiny_bundle).manifest
    model, recipe, parity = manifest.model, manifest.recipe, manifest.parity
    assert model.name == "crab-tiny" and model.labels == ["dog", "bus"]
    assert (model.adapter.rank, model.adapter.experts, model.adapter.adapted_linears) == (32, 3, 26)
    assert model.adapter.zero_linears == 0
    assert (recipe.name, recipe.experts, recipe.bits) == ("w4", "residual4x2", 4)
    assert parity["inputs"] in ("synthetic", "sample") and parity["positions"] > 2
    assert 0 < parity["logits_error"]["mean"] < 0.3
    assert 0 < parity["vision_error"]["mean"] < 0.02
    assert parity["greedy_agreement"] > 0.5
    assert parity["weights"]["4-bit"]["mean_error"] < 0.1
    assert not any("/" in name for name in parity["examples"])


def test_float_bundle_is_the_float_model(tmp_path):
    path = make_tiny_bundle(tmp_path, bits=32)
    parity = json.loads((path / "bundle.json").read_text())["parity"]
    assert parity["greedy_agreement"] == 1.0
    assert max(parity[f"{kind}_error"]["worst"] for kind in ("vision", "audio", "logits")) < 1e-4


def test_zero_experts_are_counted_and_left_out(tiny_bundle, tmp_path):
    base, adapter = make_tiny_model_dir(tmp_path / "zero", towers=False)
    smaller = export_bundle(base, adapter, tmp_path / "smaller", bits=8)
    manifest = Bundle.open(smaller).manifest
    assert manifest.recipe.experts == "unfolded8"
    assert (manifest.model.adapter.adapted_linears, manifest.model.adapter.zero_linears) == (26, 12)
    assert (smaller / "vision.onnx").stat().st_size < (tiny_bundle / "vision.onnx").stat().st_size


def test_bare_model_without_adapter(tmp_path):
    base, adapter = make_tiny_model_dir(tmp_path / "source", adapter=False)
    assert adapter is None
    manifest = Bundle.open(export_bundle(base, None, tmp_path / "out")).manifest
    assert manifest.model.adapter is None


def test_real_clips_weight_the_search(tmp_path, samples_dir):
    clip = next((samples_dir / "ave").glob("*.mp4"))
    base, adapter = make_tiny_model_dir(tmp_path / "source")
    still = [samples_dir / "arig" / "1.jpg", samples_dir / "arig" / "audio.wav"]
    path = export_bundle(base, adapter, tmp_path / "out", calibration_media=[clip, still])
    parity = Bundle.open(path).manifest.parity
    assert parity["inputs"] == "media" and parity["held_out"]
    assert {name.split(":")[0] for name in parity["examples"]} == {"1.jpg+audio.wav"}
    assert parity["calibrated_on"] >= 2
    assert parity["weights"]["4-bit"]["methods"] == {"gptq": 14}
    assert "rtn weighted by input energy" in parity["weights"]["8-bit"]["methods"]


def test_failure_leaves_nothing(tmp_path):
    base, adapter = make_tiny_model_dir(tmp_path / "source")
    other, _ = make_tiny_model_dir(tmp_path / "other", adapter=False)
    with pytest.raises(ModelError):
        export_bundle(adapter, None, tmp_path / "out")
    (other / "model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ModelError, match="safetensors"):
        export_bundle(other, adapter, tmp_path / "out")
    with pytest.raises(InputError, match="overwrite"):
        export_bundle(base, adapter, base)
    assert not (tmp_path / "out").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_interrupted_export_keeps_the_old_bundle(tiny_bundle, tmp_path):
    import shutil

    out = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, out)
    base, adapter = make_tiny_model_dir(tmp_path / "source")

    def stop(what, share):
        if what.startswith("comparing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(base, adapter, out, overwrite=True, progress=stop)
    assert Bundle.open(out, full=True).manifest == Bundle.open(tiny_bundle).manifest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits"),
        ({"bits": 4, "block": 48}, "block"),
        ({"bits": 8, "experts": "plane4"}, "doesn't go with"),
        ({"bits": 4, "accuracy_level": 3}, "accuracy-level"),
        ({"bits": 4, "experts": "residual4x2", "block": 64}, "multiples of the block"),
    ],
)
def test_options_that_do_not_fit(options, message):
    bits = options.pop("bits")
    with pytest.raises(InputError, match=message):
        choose(bits, [64, 96], **options)


def test_auto_falls_back_to_experts_beside_the_base_where_blocks_do_not_fit():
    assert choose(4, [64, 96]).experts == "residual4x2"
    assert choose(4, [64, 100]).experts == "unfolded8"
    assert choose(8, [64, 96]).experts == "unfolded8"


def test_both_generations_of_names():
    layer = "layers.3.mlp.up_proj.weight"
    for name in (
        f"model.language_model.{layer}",
        f"thinker.model.{layer}",
        f"base_model.model.model.{layer}",
    ):
        assert canonical(name) == f"language_model.{layer}"
    assert canonical("thinker.visual.merger.ln_q.weight") == "visual.merger.ln_q.weight"
    assert canonical("base_model.model.audio_tower.conv1.bias") == "audio_tower.conv1.bias"
    assert canonical("thinker.lm_head.weight") == "lm_head.weight"


def test_adapter_of_another_kind_is_refused(tiny, tmp_path):
    import shutil

    other = tmp_path / "adapter"
    shutil.copytree(tiny.adapter, other)
    config = json.loads((other / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (other / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="I-LoRA"):
        WeightStore(tiny.base, other)


def test_several_clips_hold_some_out_for_comparing():
    from crab_edge_export.examples import Example, ExampleSet

    examples = tuple(Example(clip, f"{clip}:{task}", None, "") for clip in "abcde" for task in ("x", "y"))
    kept, rest, held_out = ExampleSet("media", examples).split()
    assert held_out and {e.clip for e in rest.examples} == {"e"}
    assert len(kept.examples) + len(rest.examples) == len(examples)
    one = ExampleSet("media", examples[:2])
    assert one.split() == (one, one, False)


def test_command(tiny, tmp_path, capsys):
    from crab_edge_apps.cli import run

    common = [
        "export",
        "--model",
        str(tiny.base),
        "--adapter",
        str(tiny.adapter),
        "--out",
        str(tmp_path / "b"),
    ]
    assert run([*common, "--bits", "8", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["recipe"]["name"] == "w8" and record["parity"]["positions"] > 0
    assert run(common) == 2
    error = capsys.readouterr().err
    assert "--overwrite" in error and error.count("\n") == 1
    assert run([*common, "--overwrite", "--method", "best"]) == 2
