"""Configurations, and model directories that must be right or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crab_edge.errors import ModelError
from crab_edge.model import (
    Card,
    add_adapter,
    build,
    load_base,
    load_card,
    load_config,
    nano_config,
    save_base,
    special_ids,
    with_tokenizer,
)

FEATURES = {"n_mels": 80}


@pytest.fixture
def saved(tiny, tokenizer_file, tmp_path):
    card = Card(name="tiny", labels=["dog"], notes={"seed": 3})
    return save_base(tiny, tmp_path / "base", tokenizer_file, FEATURES, card)


def test_nano_has_the_sizes_it_says():
    config = nano_config()
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (256, 6, 2048)
    assert (
        sum(text.rope_parameters["mrope_section"]) * 2 == text.hidden_size // text.num_attention_heads == 64
    )
    assert not config.tie_word_embeddings and not text.tie_word_embeddings
    assert (vision.hidden_size, vision.depth, list(vision.fullatt_block_indexes)) == (192, 5, [2, 4])
    assert (audio.d_model, audio.encoder_layers, audio.num_mel_bins) == (384, 4, 80)
    assert vision.out_hidden_size == audio.output_dim == text.hidden_size


def test_the_tokenizer_gives_ids_and_vocabulary(tiny_config, tokenizer_file):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    assert tiny_config.text_config.vocab_size == tokenizer.get_vocab_size()
    assert tiny_config.vision_start_token_id == tokenizer.token_to_id("<|vision_bos|>")
    assert tiny_config.audio_token_id == tokenizer.token_to_id("<|AUDIO|>")
    assert tiny_config.text_config.eos_token_id == tokenizer.token_to_id("<|im_end|>")
    assert tiny_config.text_config.pad_token_id == tokenizer.token_to_id("<|endoftext|>")


def test_special_ids_are_the_tokenizers(tiny_config, tokenizer_file):
    prompt = pytest.importorskip("crab_edge.prompt")
    ids = special_ids(tiny_config)
    assert isinstance(ids, prompt.SpecialIds)
    assert (ids.audio, ids.im_end, ids.pad) == (1, tiny_config.im_end_token_id, 0)
    with pytest.raises(ModelError, match="vision_start_token_id"):
        special_ids(nano_config())


def test_a_tokenizer_without_special_tokens_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"lacks special tokens .*<\|im_end\|>"):
        with_tokenizer(nano_config(), tmp_path / "tokenizer.json")
    with pytest.raises(ModelError, match="no tokenizer"):
        with_tokenizer(nano_config(), tmp_path / "other.json")


def test_build_is_deterministic_and_leaves_the_random_state(tiny_config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b, c = build(tiny_config, 1), build(tiny_config, 1), build(tiny_config, 2)
    assert torch.equal(before, torch.get_rng_state())
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert not a.training and a.dtype == torch.float32


def test_round_trip(tiny, saved, tokenizer_file):
    again = load_base(saved)
    for (name, x), (other, y) in zip(tiny.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(x, y), name
    for (name, x), (_, y) in zip(tiny.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(x, y), name
    assert load_config(saved).vision_start_token_id == tiny.config.vision_start_token_id
    assert load_config(saved).im_start_token_id == tiny.config.im_start_token_id
    assert load_card(saved).labels == ["dog"]
    assert json.loads((saved / "features.json").read_text()) == FEATURES
    assert (saved / "tokenizer.json").read_bytes() == tokenizer_file.read_bytes()


def test_loading_in_half_precision(saved):
    model = load_base(saved, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_model_with_an_adapter_is_not_a_base(tiny, tokenizer_file, tmp_path):
    add_adapter(tiny)
    with pytest.raises(ModelError, match="unload"):
        save_base(tiny, tmp_path, tokenizer_file, FEATURES)


@pytest.mark.parametrize("damage", ["missing", "unknown", "misshapen"])
def test_weights_that_do_not_fit_are_named(saved, damage):
    file, name = saved / "model.safetensors", "model.language_model.layers.1.mlp.up_proj.weight"
    weights = load_file(file)
    if damage == "missing":
        del weights[name]
    elif damage == "unknown":
        name = "extra_tower.weight"
        weights[name] = torch.zeros(2)
    else:
        weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, file)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_base(saved)


def test_directories_that_are_no_models(saved, tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        load_base(tmp_path / "nowhere")
    data = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ModelError, match="whole safetensors"):
        load_base(saved)
    (saved / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no model"):
        load_base(saved)
    (saved / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ModelError, match="qwen2_5_omni_thinker"):
        load_base(saved)
    (saved / "card.json").write_text('{"labels": []}')
    with pytest.raises(ModelError, match="name"):
        load_card(saved)
