"""Known models, and the arithmetic's figures for them."""

import json
from dataclasses import replace

import pytest

from crab_edge.bundle import Bundle, default_bundle
from crab_edge.errors import InputError, ModelError
from crab_edge.shape import KNOWN, AdapterShape, from_config, read_shape
from crab_edge.sizes import eight_bit_block, of_manifest, parts, recipe_for, tower_parameters


def total(shape, recipe):
    return sum(size for kinds in parts(shape, recipe).values() for size in kinds.values())


def test_parameters_of_the_official_models():
    seven, three = KNOWN["7b"], KNOWN["3b"]
    assert seven.layers * seven.layer_adapter_parameters == 682_350_592
    assert three.layers * three.layer_adapter_parameters == 506_225_664
    towers = sum(tower_parameters(seven).values())
    assert 8.90e9 < seven.decoder_parameters + towers < 8.96e9


@pytest.mark.parametrize(("block", "floor", "limit", "more"), [(32, 6.80, 7.0, 0.55), (128, 6.50, 6.7, 0.16)])
def test_sizes_of_the_7b_bundle(block, floor, limit, more):
    """In GB: above what the codes alone allow, below what was promised, for 16-bit and for 32-bit scales."""
    shape = KNOWN["7b"]
    recipe = recipe_for(shape, 4, block)
    half = total(shape, replace(recipe, scale_bytes=2)) / 1e9
    whole = total(shape, recipe) / 1e9
    assert floor < half < limit
    assert 0 < whole - half <= more and whole < limit + {32: 0.4, 128: 0.1}[block]
    towers = replace(shape, adapter=AdapterShape(128, 3, True))
    extra = parts(towers, recipe)["tower adapters"]
    assert 0.18e9 < sum(extra.values()) < 0.21e9


def test_the_packaged_bundle_is_of_a_known_size():
    manifest = Bundle.open(default_bundle()).manifest
    shape, recipe = of_manifest(manifest)
    assert (shape.intermediate, shape.vision["depth"]) == (768, 5)
    predicted = total(shape, recipe)
    held = sum(
        manifest.files[name].size for name in ("decoder.onnx", "vision.onnx", "audio.onnx", "embedding.bin")
    )
    assert predicted < held < predicted + 2_000_000


def test_a_whole_omni_config_counts_by_its_thinker():
    text = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 400}
    thinker = {"text_config": text, "vision_config": {}, "audio_config": {}}
    shape = from_config({"model_type": "qwen2_5_omni", "thinker_config": thinker}, "x")
    assert shape == from_config(thinker, "x") and shape.head_dim == 32 and shape.layers == 28
    with pytest.raises(ModelError, match="thinker"):
        from_config({"text_config": {}}, "x")


def test_defaults_are_those_of_the_configuration_classes():
    configs = pytest.importorskip("transformers").Qwen2_5OmniThinkerConfig()
    shape = from_config({"text_config": {}, "vision_config": {}, "audio_config": {}}, "x")
    text, vision, audio = configs.text_config, configs.vision_config, configs.audio_config
    assert (shape.hidden, shape.intermediate, shape.layers) == (
        text.hidden_size,
        text.intermediate_size,
        text.num_hidden_layers,
    )
    assert (shape.heads, shape.kv_heads, shape.vocab, shape.max_positions) == (
        text.num_attention_heads,
        text.num_key_value_heads,
        text.vocab_size,
        text.max_position_embeddings,
    )
    assert dict(shape.vision) == {name: getattr(vision, name) for name in shape.vision}
    assert dict(shape.audio) == {name: getattr(audio, name) for name in shape.audio}


def test_what_can_not_be_read(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {}, "vision_config": {}, "audio_config": {}})
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="num_experts"):
        read_shape(tmp_path, tmp_path)
    with pytest.raises(InputError, match="--bits"):
        recipe_for(KNOWN["nano"], 3)
    with pytest.raises(InputError, match="--block"):
        recipe_for(KNOWN["nano"], 4, 48)
    for bits, block, experts in ((4, 32, "foo"), (8, 32, "plane4"), (32, 32, "plane4"), (4, 256, "plane4")):
        with pytest.raises(InputError, match="--experts"):
            recipe_for(KNOWN["nano"], bits, block, experts)


def test_a_wide_block_for_eight_bits_only_where_nothing_is_padded():
    assert eight_bit_block(4, 32, [3584, 1280]) == 128
    assert eight_bit_block(4, 256, [3584, 1280]) == 256
    assert eight_bit_block(4, 32, [256, 192]) == 32
    assert eight_bit_block(8, 32, [3584, 1280]) == 32
