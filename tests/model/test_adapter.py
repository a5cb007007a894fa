"""Which linears an adapter takes, and adapter directories that must fit the model."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from crab_edge.errors import ModelError
from crab_edge.model import (
    ILoRAConfig,
    adapted_layers,
    add_adapter,
    build,
    load_adapter,
    nano_config,
    save_adapter,
    target_linears,
    trace_routes,
    zero_linears,
)


def adapter_parameters(linears, rank, experts=3):
    return sum(n_in * (rank + experts) + experts * rank * n_out for n_in, n_out in linears.values())


def logits(model, config):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(10, config.text_config.vocab_size, (1, 9), generator=g)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_nano_counts():
    """Seven in each decoder layer, q k v in each audio layer, three in each vision block."""
    config = nano_config()
    model = build(config)
    linears = target_linears(model)
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    assert len(linears) == 7 * text.num_hidden_layers + 3 * audio.encoder_layers + 3 * vision.depth == 69
    h, kv = text.hidden_size, text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert linears["model.language_model.layers.0.self_attn.k_proj"] == (h, kv)
    assert linears["model.visual.blocks.4.mlp.down_proj"] == (vision.intermediate_size, vision.hidden_size)
    assert not any("visual" in n and "attn" in n for n in linears)
    assert not any(n.endswith("out_proj") for n in linears)

    peft = add_adapter(model)
    assert list(adapted_layers(peft)) == list(linears)
    trainable = sum(p.numel() for p in peft.parameters() if p.requires_grad)
    assert trainable == adapter_parameters(linears, 32)


@pytest.mark.parametrize(
    ("text", "count", "parameters"),
    [
        ({}, 388, 870_480_512),
        (
            {
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
            },
            444,
            694_355_584,
        ),
    ],
    ids=["7B", "3B"],
)
def test_official_counts(text, count, parameters):
    """The sizes of the official adapters, from the configurations alone (no memory for weights)."""
    config = Qwen2_5OmniThinkerConfig(text_config=text, vision_config={"hidden_size": 1280})
    with torch.device("meta"):
        linears = target_linears(Qwen2_5OmniThinkerForConditionalGeneration(config))
    assert len(linears) == count
    assert adapter_parameters(linears, 128) == parameters


def test_a_fresh_adapter_is_the_identity(tiny, tiny_config):
    before = logits(tiny, tiny_config)
    peft = add_adapter(tiny)
    assert isinstance(peft, PeftModel)
    assert torch.equal(logits(peft, tiny_config), before)
    assert zero_linears(peft) == list(adapted_layers(peft))


def test_towers_can_stay_as_they_are(tiny):
    linears = target_linears(tiny, towers=False)
    peft = add_adapter(tiny, towers=False)
    assert list(adapted_layers(peft)) == list(linears)
    assert all("language_model" in name for name in linears)


def test_round_trip(tiny, tiny_config, drawn, tmp_path):
    peft = add_adapter(tiny, drawn, seed=4)
    expected = logits(peft, tiny_config)
    save_adapter(peft, tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    stem = "base_model.model.model.language_model.layers.0.self_attn.q_proj"
    assert {f"{stem}.{n}.weight" for n in ("lora_route", "lora_A", "lora_B0", "lora_B1", "lora_B2")} <= set(
        keys
    )

    base = build(tiny_config, seed=3)
    assert not torch.equal(logits(base, tiny_config), expected)
    again = load_adapter(base, tmp_path / "a")
    assert torch.equal(logits(again, tiny_config), expected)
    assert not any(p.requires_grad for p in again.parameters())
    assert zero_linears(again) == []
    more = load_adapter(build(tiny_config, seed=3), tmp_path / "a", trainable=True)
    assert sum(p.requires_grad for p in more.parameters()) == 5 * len(adapted_layers(more))


def test_half_precision_adapters_follow_the_base(tiny, tiny_config, drawn, tmp_path):
    save_adapter(add_adapter(tiny, drawn), tmp_path)
    peft = load_adapter(build(tiny_config, seed=3).to(torch.bfloat16), tmp_path)
    assert {p.dtype for p in peft.parameters()} == {torch.bfloat16}
    assert logits(peft, tiny_config).dtype == torch.bfloat16


@pytest.mark.parametrize("damage", ["missing", "misshapen", "unknown"])
def test_adapters_that_do_not_fit_are_named(tiny, tiny_config, drawn, tmp_path, damage):
    save_adapter(add_adapter(tiny, drawn), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_B2.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "misshapen":
        weights[name] = weights[name][:-1].contiguous()
    else:
        name = name.replace("up_proj", "side_proj")
        weights[name] = torch.zeros(2, 2)
    save_file(weights, file)
    base = build(tiny_config)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_adapter(base, tmp_path)
    assert not adapted_layers(base)


def test_directories_that_are_no_adapters(tiny, tmp_path):
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        load_adapter(tiny, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8}))
    with pytest.raises(ModelError, match="'LORA'"):
        load_adapter(tiny, tmp_path)
    add_adapter(tiny)
    with pytest.raises(ModelError, match="already carries"):
        add_adapter(tiny)


def test_the_trace_shows_every_adapted_linear(tiny, tiny_config, drawn):
    peft = add_adapter(tiny, drawn)
    with trace_routes(peft) as routes:
        logits(peft, tiny_config)
    asked = {name: calls for name, calls in routes.items() if calls}
    assert set(asked) == set(target_linears(peft, towers=False))
    for (weights,) in asked.values():
        assert weights.shape == (1, 9, 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 9))
    assert all(layer.on_route is None for layer in adapted_layers(peft).values())


def test_config_defaults_are_nanos():
    config = ILoRAConfig()
    assert (config.r, config.lora_alpha, config.num_experts, config.lora_dropout) == (32, 64, 3, 0.1)
