"""Packed questions are separate samples: same loss, same gradients; and the loss starts where the
reference's does.
"""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from crab_edge.features import FeatureConfig
from crab_edge.model import build, nano_config, special_ids, with_tokenizer
from crab_edge.prompt import MediaItem, PromptBuilder
from crab_edge.training.language import LanguageModule, decode
from crab_edge.training.packing import IGNORE, attention_mask, collate, pack
from crab_edge.training.synthetic import LABELS
from crab_edge.training.tokenizer import number_ids, save_tokenizer, train_tokenizer

QUESTIONS = [
    ("Please answer this question: Is there a bell?", "<answer>yes</answer>"),
    (
        "Please recognize the object.",
        "The sounding object is bell. Its coordinates are <obj>(3,14)(159,224)</obj>.",
    ),
    ("Say 12.", "12"),
]
LEAD = "This is an image and an audio:"
ITEMS = [MediaItem("image", 64, (1, 16, 16)), MediaItem("audio", 25)]


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> PromptBuilder:
    texts = [t for q in QUESTIONS for t in q] * 3
    file = save_tokenizer(
        train_tokenizer(texts, LABELS, 640), tmp_path_factory.mktemp("tok") / "tokenizer.json"
    )
    return PromptBuilder(file, FeatureConfig(n_mels=80, system_prompt="Hear."))


@pytest.fixture(scope="module")
def module(builder, tmp_path_factory) -> LanguageModule:
    file = tmp_path_factory.mktemp("tok2") / "tokenizer.json"
    builder._tokenizer.save(str(file))
    config = nano_config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
    )
    config = with_tokenizer(config, file)
    config.vision_config.out_hidden_size = config.audio_config.output_dim = 32
    return LanguageModule(
        build(config, seed=3).double(), special_ids(config), number_ids(Tokenizer.from_file(str(file)))
    )


def test_loss_starts_just_after_assistant(builder):
    packed = pack(builder, LEAD, ITEMS, QUESTIONS[:1])
    asked = packed.targets != IGNORE
    # Each target is the id that follows; the first of them is the newline after "assistant".
    said = builder.encode(QUESTIONS[0][1])
    newline = builder.encode("\n")
    assert packed.targets[asked].tolist() == [*newline, *said, builder.special.im_end]
    first = int(np.flatnonzero(asked)[0])
    assert builder.decode(packed.ids[: first + 1]).endswith("assistant")
    assert packed.ids[first + 1] == newline[0]


def test_coordinates_are_marked_and_nothing_else(builder):
    packed = pack(builder, LEAD, ITEMS, QUESTIONS)
    marked = [builder.decode([t]) for t in packed.targets[packed.pixels]]
    assert marked == ["3", "14", "159", "224"]


def test_every_question_stands_where_it_would_stand_alone(builder):
    together = pack(builder, LEAD, ITEMS, QUESTIONS)
    for number, question in enumerate(QUESTIONS, start=1):
        alone = pack(builder, LEAD, ITEMS, [question])
        own = (together.segment == 0) | (together.segment == number)
        assert together.ids[own].tolist() == alone.ids.tolist()
        assert together.positions[:, own].tolist() == alone.positions.tolist()
        assert together.targets[own].tolist() == alone.targets.tolist()


def test_an_answer_may_have_its_loss_on_the_coordinates_alone(builder):
    packed = pack(builder, LEAD, ITEMS, QUESTIONS, [True] * len(QUESTIONS))
    whole = pack(builder, LEAD, ITEMS, QUESTIONS)
    assert [builder.decode([t]) for t in packed.targets[packed.targets != IGNORE]] == [
        "3",
        "14",
        "159",
        "224",
    ]
    assert (packed.targets != IGNORE).tolist() == whole.pixels.tolist() == packed.pixels.tolist()


def _loss(module, batch, embeds):
    text = module.thinker.model.language_model
    rotary = text.rotary_emb(embeds, batch["positions"])
    x, _ = decode(text, embeds, rotary, attention_mask(batch["segment"]))
    asked = batch["targets"] != IGNORE
    logits = module.thinker.lm_head(x[asked])
    return torch.nn.functional.cross_entropy(logits, batch["targets"][asked], reduction="sum")


def test_packed_loss_and_gradients_equal_separate_samples(builder, module):
    text = module.thinker.model.language_model

    def gradients(groups):
        module.zero_grad()
        total = 0.0
        for group in groups:
            batch = collate([pack(builder, LEAD, ITEMS, part) for part in group], builder.special.pad)
            loss = _loss(module, batch, text.embed_tokens(batch["ids"]))
            loss.backward()
            total += float(loss.detach())
        return total, {n: p.grad.clone() for n, p in text.named_parameters()}

    one, packed = gradients([[QUESTIONS]])
    # Two rows of different length: padding must not matter either.
    two, separate = gradients([[[QUESTIONS[0]], [QUESTIONS[1]]], [[QUESTIONS[2]]]])
    # The official RMSNorm computes in float32 whatever the dtype, hence not 1e-12.
    assert one == pytest.approx(two, rel=1e-6)
    for name in packed:
        torch.testing.assert_close(packed[name], separate[name], rtol=1e-3, atol=1e-6)


def test_the_decoder_equals_the_official_forward(builder, module):
    batch = collate([pack(builder, LEAD, ITEMS, QUESTIONS[:1])], builder.special.pad)
    text = module.thinker.model.language_model
    embeds = text.embed_tokens(batch["ids"])
    with torch.no_grad():
        rotary = text.rotary_emb(embeds, batch["positions"])
        ours, _ = decode(text, embeds, rotary, attention_mask(batch["segment"]))
        official = text(
            inputs_embeds=embeds, position_ids=batch["positions"], use_cache=False
        ).last_hidden_state
    torch.testing.assert_close(ours, official, rtol=1e-5, atol=1e-6)
