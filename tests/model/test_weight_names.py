"""Names of weights in the files of both generations."""

import pytest

from crab_edge.model import official_config
from crab_edge.model.base import on_meta, thinker_shapes
from crab_edge.weight_names import canonical, official, transformers_name


@pytest.mark.parametrize(
    ("in_files", "name"),
    [
        ("thinker.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        (
            "base_model.model.model.layers.3.mlp.up_proj.lora_B2.weight",
            "language_model.layers.3.mlp.up_proj.lora_B2.weight",
        ),
        ("model.language_model.norm.weight", "language_model.norm.weight"),
        ("thinker.model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("module.thinker.visual.merger.mlp.0.bias", "visual.merger.mlp.0.bias"),
        ("model.audio_tower.conv1.weight", "audio_tower.conv1.weight"),
        ("thinker.lm_head.weight", "lm_head.weight"),
    ],
)
def test_canonical(in_files, name):
    assert canonical(in_files) == canonical(name) == name


@pytest.mark.parametrize("size", ["7b", "3b"])
def test_every_name_goes_there_and_back(size):
    config = official_config(size)
    names = thinker_shapes(config)
    assert [transformers_name(n) for n in names] == list(on_meta(config).state_dict())
    for name in names:
        assert canonical(official(name)) == canonical(f"thinker.{official(name)}") == name
    assert "model.layers.0.self_attn.q_proj.bias" in {official(n) for n in names}
