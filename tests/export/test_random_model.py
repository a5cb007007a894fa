"""Random models: the same for the same seed, sane in every layer, whole or absent."""

import json

import numpy as np
import pytest
import torch
from crab_edge_export import random_model
from crab_edge_export.random_model import main, resized, write_base
from safetensors.torch import load_file

from crab_edge.errors import InputError
from crab_edge.model import load_base, official_config, open_model_dir
from crab_edge.model.official_file import read_tensors
from crab_edge.prompt import PromptBuilder
from tests.official import make_official_adapter, make_official_dir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_official_dir(tmp_path_factory.mktemp("random") / "base")


def weights_of(folder):
    out = {}
    for file in sorted(folder.glob("model-0*.safetensors")):
        out |= load_file(file)
    return out


def test_form(base):
    index = json.loads((base / "model.safetensors.index.json").read_text())
    weights = weights_of(base)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for name, tensor in weights.items():
        assert name.startswith("thinker.") and tensor.dtype == torch.bfloat16
        assert name in load_file(base / index["weight_map"][name])
    contents = {tensor.view(torch.int16).numpy().tobytes() for tensor in weights.values()}
    assert len(contents) == len(weights), "two tensors have the same bytes"


def test_seeds(base, tmp_path):
    config = open_model_dir(base).config
    again, other = (
        weights_of(write_base(config, tmp_path / "a")),
        weights_of(write_base(config, tmp_path / "b", seed=1)),
    )
    first = weights_of(base)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    # Fewer layers are the same layers.
    cut = weights_of(write_base(resized(config, vision_depth=1), tmp_path / "c"))
    assert cut.keys() < first.keys() and all(torch.equal(cut[n], first[n]) for n in cut if ".norm1." in n)


def test_activations_stay_sane(tmp_path, base):
    config = resized(open_model_dir(base).config, layers=24)
    model = load_base(write_base(config, tmp_path / "deep"))
    seen = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(lambda module, args, out: seen.append(out[0].std().item()))
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        vision = model.model.visual(
            torch.randn(512, 1176), grid_thw=torch.tensor([[2, 16, 16]])
        ).pooler_output
        sound = model.model.audio_tower(
            torch.randn(32, 300), feature_lens=torch.tensor([300])
        ).last_hidden_state
    assert len(seen) == 24 and 0.5 < min(seen) and max(seen) < 3
    for out in (logits, vision, sound):
        assert torch.isfinite(out).all() and 0.3 < out.std() < 3


def test_adapter_matters_but_does_not_rule(base, tmp_path):
    from crab_edge.model import load_adapter
    from crab_edge.model.official import import_adapter

    file = make_official_adapter(base, tmp_path / "f.bin", towers=True)
    assert all(tensor.any() for tensor in read_tensors(file).values())
    import_adapter(file, tmp_path / "adapter", base=base, rank=8, alpha=16)
    layer = (
        load_adapter(load_base(base), tmp_path / "adapter").get_base_model().model.language_model.layers[0]
    )
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    linear = layer.mlp.up_proj
    share = ((linear(x) - linear.base_layer(x)).std() / linear.base_layer(x).std()).item()
    assert 0.01 < share < 0.5


def test_tokenizer_reads_and_writes_text(base):
    model = open_model_dir(base)
    prompt = PromptBuilder(model.tokenizer_file, model.features)
    text = "Is there a dog? Ä 犬 <event>dog, (2 7)</event>\n"
    assert prompt.decode(prompt.encode(text)) == text
    assert len(prompt.encode("This is a video and an audio:")) < 29
    assert prompt.decode(np.arange(300)) != ""


def test_the_official_ids_are_in_their_places():
    from crab_edge_export.official_form import synthetic_tokenizer

    for vocab in (None, 1024):
        config = resized(official_config("3b"), vocab=vocab)
        tokenizer = synthetic_tokenizer(config)
        shift = 0 if vocab is None else 1024 - 64 - 151643
        wanted = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|AUDIO|>": 151646, "<|VIDEO|>": 151656}
        assert {token: tokenizer.token_to_id(token) for token in wanted} == {
            t: i + shift for t, i in wanted.items()
        }
        assert tokenizer.get_vocab_size() <= config.text_config.vocab_size
        assert config.pad_token_id == 151643 + shift


def test_sizes():
    config = resized(official_config("7b"), layers=2, vision_depth=1, audio_layers=1)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (3584, 2)
    assert (config.vision_config.depth, config.vision_config.fullatt_block_indexes) == (1, [0])
    assert official_config("7b").text_config.num_hidden_layers == 28
    assert resized(official_config("7b"), vision_depth=9).vision_config.fullatt_block_indexes == [7]
    for options in ({"layers": 0}, {"vocab": 100}):
        with pytest.raises(InputError, match="expected"):
            resized(official_config("7b"), **options)


def test_shards_are_planned_by_size(monkeypatch):
    monkeypatch.setattr(random_model, "SHARD_BYTES", 260)
    shapes = {"a": (10, 10), "b": (5, 5), "c": (1000,), "d": (3,), "e": (128,)}
    # bytes: 200 50 | 2000 | 6 | 256; a tensor is never split
    assert list(random_model._shards(shapes)) == [["a", "b"], ["c"], ["d"], ["e"]]


def test_command_refuses_before_it_writes(tmp_path, capsys, monkeypatch):
    from types import SimpleNamespace

    out = tmp_path / "out"
    assert main(["--size", "7b", "--out", str(out), "--layers", "0"]) == 2
    assert "--layers" in capsys.readouterr().err
    monkeypatch.setattr("crab_edge.staging.shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert main(["--size", "7b", "--out", str(out)]) == 2
    assert "needs 17.9 GB" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
