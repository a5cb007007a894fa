"""The exporter's reader on official files, and everything that a base and an adapter can get wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from crab_edge_export.weights import WeightStore
from safetensors.torch import load_file, save_file

from crab_edge.errors import ModelError
from crab_edge.model.official import import_adapter
from tests.official import ALPHA, RANK, make_official_adapter, make_official_dir

LAYER = "language_model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A Hugging Face directory and the adapter imported from its finetune_weights.bin."""
    folder = tmp_path_factory.mktemp("official")
    base = make_official_dir(folder / "base")
    file = make_official_adapter(base, folder / "finetune_weights.bin")
    import_adapter(file, folder / "adapter", base=base, rank=RANK, alpha=ALPHA)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    shutil.copytree(made / "base", tmp_path / "base")
    shutil.copytree(made / "adapter", tmp_path / "adapter")
    return tmp_path


def change_adapter(folder, **values):
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit(file, change):
    weights = load_file(file)
    change(weights)
    save_file(weights, file)


def test_a_linear_with_its_adapter(made):
    official = torch.load(made / "finetune_weights.bin", weights_only=True)
    parts = {n.split(".")[-2]: t.float().numpy() for n, t in official.items() if "model.layers.1.mlp.up" in n}
    with WeightStore(made / "base", made / "adapter") as weights:
        linear = weights.linear(LAYER)
        assert len(weights.adapted()) == 26 and len(weights.files()) > 4
        assert weights.shape(f"{LAYER}.weight") == linear.weight.shape == (96, 64)
        whole = weights.array(f"{LAYER}.weight")
        np.testing.assert_array_equal(weights.rows(f"{LAYER}.weight", 5, 9), whole[5:9])
        assert weights.n_parameters() == sum(
            int(np.prod(s))
            for shapes in (weights.shapes(), weights.adapter_shapes())
            for s in shapes.values()
        )
    assert linear.weight.dtype == np.float32 and linear.bias is None
    np.testing.assert_array_equal(linear.adapter.down, parts["lora_A"])
    np.testing.assert_array_equal(linear.adapter.route, parts["lora_route"])
    up = np.concatenate([parts[f"lora_B{i}"] for i in range(3)], axis=1) * np.float32(ALPHA / RANK)
    np.testing.assert_array_equal(linear.adapter.up, up)


def test_zero_towers_are_known_from_the_start_and_left_out(made):
    with WeightStore(made / "base", made / "adapter") as weights:
        assert len(weights.zero_linears) == 12
        assert not any(path.startswith("language_model") for path in weights.zero_linears)
        assert weights.linear("visual.blocks.0.mlp.up_proj").adapter is None
        assert weights.linear("audio_tower.layers.0.self_attn.k_proj").adapter is None


def test_one_value_is_not_zero(copied):
    name = "base_model.model.model.visual.blocks.1.mlp.up_proj.lora_B2.weight"

    def touch(weights):
        weights[name][3, 4] = 1e-30

    edit(copied / "adapter" / "adapter_model.safetensors", touch)
    with WeightStore(copied / "base", copied / "adapter") as weights:
        assert len(weights.zero_linears) == 11
        assert weights.linear("visual.blocks.1.mlp.up_proj").adapter is not None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"r": 4}, "104 misshapen"),
        ({"num_experts": 2}, r"26 misshapen.*26 unknown"),
        ({"num_experts": 4}, r"26 missing.*lora_B3"),
        ({"target_modules": ["q_proj"]}, "unknown"),
        ({"target_modules": ["q_proj", "conv9"], "peft_type": "LORA"}, "I-LoRA"),
    ],
)
def test_an_adapter_other_than_its_configuration_says(copied, values, words):
    change_adapter(copied, **values)
    with pytest.raises(ModelError, match=words) as raised:
        WeightStore(copied / "base", copied / "adapter")
    assert "\n" not in str(raised.value) and str(copied / "adapter") in str(raised.value)


def test_an_adapter_that_lacks_a_layer(copied):
    def cut(weights):
        for name in [n for n in weights if "language_model.layers.1." in n]:
            del weights[name]

    edit(copied / "adapter" / "adapter_model.safetensors", cut)
    with pytest.raises(ModelError, match="adapter for 1 decoder layers of width 64, but the base has 2"):
        WeightStore(copied / "base", copied / "adapter")


def test_an_adapter_of_another_base(made, tmp_path):
    from crab_edge_export.random_model import resized, write_adapter, write_base

    from crab_edge.model import open_model_dir

    config = resized(open_model_dir(made / "base").config, layers=3)
    write_base(config, tmp_path / "deeper")
    with pytest.raises(ModelError, match=r"2 decoder layers of width 64, but the base has 3 .* of width 64"):
        WeightStore(tmp_path / "deeper", made / "adapter")
    file = write_adapter(config, tmp_path / "deeper.bin", rank=RANK)
    with pytest.raises(ModelError, match="3 decoder layers of width 64, but the base has 2"):
        import_adapter(file, tmp_path / "out", base=made / "base", rank=RANK)


def test_not_a_number_in_the_base(copied):
    index = json.loads((copied / "base" / "model.safetensors.index.json").read_text())
    name = "thinker.model.layers.1.mlp.up_proj.weight"

    def spoil(weights):
        weights[name][7, 7] = float("nan")

    edit(copied / "base" / index["weight_map"][name], spoil)
    with WeightStore(copied / "base", copied / "adapter") as weights:
        with pytest.raises(ModelError, match=rf"{LAYER}\.weight holds NaN or infinity in 1 of 6,144 values"):
            weights.linear(LAYER)
        with pytest.raises(ModelError, match="NaN"):
            weights.rows(f"{LAYER}.weight", 6, 8)


def test_not_a_number_in_the_adapter(copied):
    name = f"base_model.model.model.{LAYER}.lora_A.weight"

    def spoil(weights):
        weights[name][0, 0] = float("inf")

    edit(copied / "adapter" / "adapter_model.safetensors", spoil)
    with (
        WeightStore(copied / "base", copied / "adapter") as weights,
        pytest.raises(ModelError, match="lora_A"),
    ):
        weights.linear(LAYER)


@pytest.mark.parametrize("damage", ["truncated", "absent", "stray"])
def test_a_damaged_base_stops_the_export_before_it_writes(copied, damage):
    from crab_edge_export import export_bundle

    shard = sorted((copied / "base").glob("model-0*"))[2]
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-7])
    elif damage == "absent":
        shard.unlink()
    else:
        edit(
            shard,
            lambda weights: weights.update({"thinker.model.layers.9.mlp.up_proj.weight": torch.ones(2)}),
        )
    words = {"truncated": "of .* bytes", "absent": "isn't there", "stray": r"1 unknown: .*layers\.9"}[damage]
    before = sorted(copied.rglob("*"))
    with pytest.raises(ModelError, match=words):
        export_bundle(copied / "base", copied / "adapter", copied / "bundle")
    assert sorted(copied.rglob("*")) == before


def test_reading_leaves_nothing_mapped(made):
    with WeightStore(made / "base", made / "adapter") as weights:
        kept = [weights.array(name) for name in weights.shapes()]
        maps = Path("/proc/self/maps")
        if not maps.exists():
            pytest.skip("this system doesn't list a process's mappings")
        assert str(made / "base") not in maps.read_text()
    assert kept


def test_official_files_become_a_bundle_that_runs(made, tmp_path):
    """A float bundle whose graphs equal the torch model, without the towers' idle adapters."""
    from crab_edge_export import export_bundle

    from crab_edge.bundle import Bundle

    out = export_bundle(made / "base", made / "adapter", tmp_path / "bundle", bits=32)
    manifest = Bundle.open(out, full=True).manifest
    assert (manifest.model.adapter.adapted_linears, manifest.model.adapter.zero_linears) == (26, 12)
    assert manifest.model.adapter.alpha / manifest.model.adapter.rank == ALPHA / RANK
    parity = manifest.parity
    assert parity["greedy_agreement"] == 1.0
    assert max(parity[f"{kind}_error"]["worst"] for kind in ("vision", "audio", "logits")) < 1e-3
    import onnx

    nodes = {
        n: [x.op_type for x in onnx.load(str(out / f"{n}.onnx")).graph.node]
        for n in ("decoder", "vision", "audio")
    }
    assert "ILoRARoute" in nodes["decoder"]
    assert "ILoRARoute" not in nodes["vision"] + nodes["audio"]
