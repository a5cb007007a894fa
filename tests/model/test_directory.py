"""Model directories as Hugging Face has them: what they become, and what is refused."""

import json

import pytest
import torch

from crab_edge.errors import ModelError
from crab_edge.features import FeatureConfig
from crab_edge.model import load_base, load_config, official_config, open_model_dir, special_ids
from crab_edge.model.base import thinker_shapes
from crab_edge.prompt import PromptBuilder
from tests.official import make_official_dir
from tests.tiny_model import MELS, make_tiny_model_dir


@pytest.fixture
def official(tmp_path):
    return make_official_dir(tmp_path / "base")


@pytest.fixture
def change(official):
    """change(file, **values) edits a JSON file of the directory; dotted keys go inside."""

    def edit(name, **values):
        path = official / name
        content = json.loads(path.read_text())
        for key, value in values.items():
            *parents, last = key.split("__")
            place = content
            for parent in parents:
                place = place[parent]
            if value is None:
                del place[last]
            else:
                place[last] = value
        path.write_text(json.dumps(content))

    return edit


def test_what_a_hugging_face_directory_becomes(official):
    model = open_model_dir(official)
    assert model.features == FeatureConfig(n_mels=MELS)
    assert (model.card.name, model.card.tasks, model.card.labels) == ("base", None, None)
    assert model.config.text_config.rope_parameters["mrope_section"] == [4, 6, 6]
    assert model.tokenizer_file.is_file()
    assert special_ids(model.config) == PromptBuilder(model.tokenizer_file, model.features).special
    assert "lm_head.weight" in model.weights()


def test_our_own_directories_still_open(tmp_path):
    base, _ = make_tiny_model_dir(tmp_path, adapter=False)
    model = open_model_dir(base)
    assert model.card.name == "crab-tiny" and model.features.system_prompt == "You see and hear."


def test_transformers_reads_the_same_model_from_it(official):
    """The official form is not our idea of it: transformers' own loader gives the same weights and config."""
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    index = official / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    del places["weight_map"]["token2wav.dit.weight"]  # in a file that only we don't ask for
    index.write_text(json.dumps(places))
    theirs = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(official, dtype=torch.bfloat16)
    ours = load_base(official, torch.bfloat16)
    state = ours.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    for part in ("text_config", "vision_config", "audio_config"):
        a, b = (getattr(model.config, part).to_dict() for model in (ours, theirs))
        assert {k: v for k, v in a.items() if k != "dtype"} == {k: v for k, v in b.items() if k != "dtype"}


@pytest.mark.parametrize(
    ("size", "weights", "parameters"), [("7b", 1346, 8_931_813_888), ("3b", 1442, 4_703_464_448)]
)
def test_released_configurations(size, weights, parameters, tmp_path):
    """config.json in the release's form gives the packaged configuration; sizes are the released ones."""
    from crab_edge_export.official_form import official_json

    config = official_config(size)
    shapes = thinker_shapes(config)
    assert len(shapes) == weights
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    (tmp_path / "config.json").write_text(json.dumps(official_json(config)))
    again = load_config(tmp_path)
    assert thinker_shapes(again) == shapes
    assert again.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    assert again.text_config.rope_parameters["rope_theta"] == 1e6
    assert set(again.text_config.layer_types) == {"full_attention"}
    assert (again.pad_token_id, again.vision_start_token_id) == (151643, 151652)


def test_processors_in_the_newer_form(official):
    path = official / "preprocessor_config.json"
    flat = json.loads(path.read_text())
    image = {k: flat.pop(k) for k in ("image_processor_type", "image_mean", "image_std")}
    image["image_processor_type"] += "Fast"
    image["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}
    nested = {"feature_extractor": flat, "image_processor": image}
    (official / "processor_config.json").write_text(json.dumps(nested))
    path.unlink()
    assert open_model_dir(official).features == FeatureConfig(n_mels=MELS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"feature_size": 80}, "80 mel bands.* take 32"),
        ({"feature_size": None}, "80 mel bands"),
        ({"patch_size": 16}, "16 pixels a patch.* take 14"),
        ({"merge_size": 4}, "patches a merge"),
        ({"feature_extractor_type": "SeamlessM4TFeatureExtractor"}, "WhisperFeatureExtractor"),
        ({"image_processor_type": "CLIPImageProcessor"}, "Qwen2VLImageProcessor"),
        ({"do_normalize": False}, "do_normalize is False"),
        ({"rescale_factor": 1.0}, "1/255"),
        ({"dither": 0.1}, "dither"),
        ({"image_mean": [0.5, 0.5]}, "not the features"),
        ({"max_pixels": 10000}, "3136 to 10000 pixels"),
    ],
)
def test_processors_that_do_not_fit(official, change, values, words):
    change("preprocessor_config.json", **values)
    with pytest.raises(ModelError, match=words):
        open_model_dir(official)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"thinker_config": None}, "without thinker_config"),
        ({"model_type": "qwen2_vl"}, "'qwen2_vl', expected 'qwen2_5_omni'"),
        ({"thinker_config__text_config__hidden_size": "wide"}, "not a thinker's configuration"),
        ({"thinker_config__text_config__hidden_size": 128}, "gives width 64, but its decoder takes 128"),
        ({"thinker_config__audio_token_index": 7}, r"<\|AUDIO\|> has id \d+, but .*audio_token_index is 7"),
        ({"thinker_config__text_config__vocab_size": 300}, "the model has rows for 300"),
        ({"thinker_config__audio_config__n_window": 50}, None),
    ],
)
def test_configurations_that_do_not_fit(official, change, values, words):
    change("config.json", **values)
    if words is None:  # the features follow the encoder's chunk
        assert open_model_dir(official).features.audio_chunk == 100
        return
    with pytest.raises(ModelError, match=words):
        open_model_dir(official)


def test_files_that_are_missing(official):
    tokenizer = official / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("<|AUDIO|>", "<|SOUND|>"))
    with pytest.raises(ModelError, match=r"lacks the token <\|AUDIO\|>"):
        open_model_dir(official)
    tokenizer.write_text("{")
    with pytest.raises(ModelError, match=r"readable tokenizer\.json"):
        open_model_dir(official)
    tokenizer.unlink()
    with pytest.raises(ModelError, match="AutoTokenizer"):
        open_model_dir(official)
    (official / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"features\.json nor preprocessor_config\.json"):
        open_model_dir(official)
