"""The losses that teach answers to fetch boxes: which places, which cells, and that following them works."""

import numpy as np
import pytest
import torch

from crab_edge.features import FeatureConfig
from crab_edge.model import build, nano_config, special_ids, with_tokenizer
from crab_edge.prompt import MediaItem, PromptBuilder
from crab_edge.training.heads import cell_targets, class_prototypes
from crab_edge.training.language import LanguageModule
from crab_edge.training.packing import attention_mask, collate, pack
from crab_edge.training.pointing import inside, said_boxes
from crab_edge.training.tokenizer import label_ids, number_ids, save_tokenizer, train_tokenizer

LEAD = "This is an image:"
SAID = "The sounding object is {}. Its coordinates are <obj>({},{})({},{})</obj>."
BOXES = {"dog": (10, 20, 110, 130), "cat": (140, 60, 220, 200)}


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [LEAD, "Which object sounds?", "Where is it? left right", SAID.format("dog", 1, 2, 3, 4)]
    save_tokenizer(train_tokenizer(texts, ["dog", "cat"], 640), path)
    config = with_tokenizer(nano_config(hidden_size=64, intermediate_size=64, num_hidden_layers=2), path)
    config.vision_config.out_hidden_size = config.audio_config.output_dim = 64
    config.text_config.rope_parameters["mrope_section"] = [2, 3, 3]
    builder = PromptBuilder(path, FeatureConfig(n_mels=80, system_prompt="You see."))
    from tokenizers import Tokenizer

    numbers = number_ids(Tokenizer.from_file(str(path)))
    labels = label_ids(Tokenizer.from_file(str(path)), ["dog", "cat"])
    made = LanguageModule(
        build(config, seed=1),
        special_ids(config),
        numbers,
        prototypes=class_prototypes(2, 64),
        labels=labels,
        auxiliary_layer=1,
        pointing=1.0,
        soft_pixels=3.0,
    )
    return made, builder


def _batch(builder):
    item = MediaItem.visual("image", (1, 16, 16), builder.cfg)
    asked = [("Which object sounds?", SAID.format(k, *box)) for k, box in BOXES.items()]
    asked += [("Where is it?", "left"), ("Which object sounds?", "<obj>(1,2)</obj>")]
    batch = collate([pack(builder, LEAD, [item], asked)], builder.special.pad)
    generator = torch.Generator().manual_seed(0)
    batch["patches"] = torch.randn(256, 1176, generator=generator)
    batch["chunks"], batch["lengths"] = torch.zeros(0, 80, 200), torch.zeros(0, dtype=torch.int64)
    batch["activity"] = torch.zeros(0, 2, dtype=torch.uint8)
    truth = cell_targets(np.array(list(BOXES.values()), np.float32), np.array([0, 1]))
    batch["cell_label"] = torch.from_numpy(truth[0])[None]
    return batch


def test_the_places_that_say_a_box_are_found_with_their_boxes(module):
    made, builder = module
    batch = _batch(builder)
    said = said_boxes(batch, made.numbers)
    assert said.box.tolist() == [list(map(float, b)) for b in BOXES.values()]  # two numbers are no box
    following = batch["ids"][said.row, said.column + 1]
    assert [[int(builder.decode([t])) for t in row] for row in following.tolist()] == said.box.tolist()


def test_inside_marks_the_cells_of_the_inner_box():
    marked = inside(torch.tensor([[0.0, 0.0, 112.0, 224.0], [100.0, 100.0, 104.0, 104.0]]))
    first = marked[0].reshape(8, 8)
    assert first[1:7, 1:3].all() and not first[:, 4:].any() and not first[0].any()
    assert int(marked[1].sum()) == 1 and marked[1].reshape(8, 8)[3, 3]


def test_its_attention_is_the_layers_own(module):
    made, builder = module
    batch = _batch(builder)
    text = made.thinker.model.language_model
    layer = text.layers[made.pointing.layer].self_attn
    with torch.no_grad():
        found = made.hidden(batch)
        said = said_boxes(batch, made.numbers)
        row, column = said.row.flatten(), said.column.flatten()
        first, last = (
            made.pointing._attention(text.layers[made.pointing.layer], found, row, column, key)
            for key in (0, -1)
        )
        normed = text.layers[made.pointing.layer].input_layernorm(found.states[made.pointing.layer])
        layer.config._attn_implementation = "eager"
        bias = torch.zeros(found.mask.shape).masked_fill(~attention_mask(batch["segment"]), -1e9)
        weights = layer(normed, attention_mask=bias, position_embeddings=found.rotary)[1]
        layer.config._attn_implementation = "sdpa"
    shared = layer.num_key_value_groups
    by_place = weights[0].transpose(0, 1)[column]
    np.testing.assert_allclose(first, by_place[:, :shared], atol=1e-5)
    np.testing.assert_allclose(last, by_place[:, -shared:], atol=1e-5)


def test_following_the_losses_makes_the_answer_say_the_boxes(module):
    made, builder = module
    batch = _batch(builder)
    optimizer = torch.optim.AdamW(made.base_groups(), lr=3e-3, weight_decay=0.0)
    seen = []
    for _ in range(60):
        losses = made(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append({k: float(v.detach()) for k, v in losses.items()})
    assert seen[-1]["point"] < 0.2 * seen[0]["point"]
    assert seen[-1]["fetch"] < 0.3 * seen[0]["fetch"]
    assert seen[-1]["named"] < 0.3 * seen[0]["named"]
    assert seen[-1]["look"] < 0.5 * seen[0]["look"]
    assert seen[-1]["present"] < 0.2
    assert seen[-1]["answer_box"] < seen[0]["answer_box"] - 1.0


def test_a_batch_without_boxes_has_no_pointing_loss(module):
    made, builder = module
    item = MediaItem.visual("image", (1, 16, 16), builder.cfg)
    batch = collate([pack(builder, LEAD, [item], [("Where is it?", "left")])], builder.special.pad)
    batch |= {
        k: v
        for k, v in _batch(builder).items()
        if k in ("patches", "chunks", "lengths", "activity", "cell_label")
    }
    losses = made(batch)
    assert "point" not in losses and torch.isfinite(losses["loss"])
