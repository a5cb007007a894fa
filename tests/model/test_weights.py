"""Shards and their index: what is missing, cut short or doubled is said before anything is used."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from crab_edge.errors import ModelError
from crab_edge.model import load_base, save_base
from crab_edge.model.weights import WeightFiles, check_finite, check_weights
from tests.official import make_official_dir


@pytest.fixture
def official(tmp_path):
    return make_official_dir(tmp_path / "base")


def index_of(folder):
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_shards_make_one_model(official, tmp_path):
    files = WeightFiles(official)
    assert len({entry.file for entry in files.stored.values()}) > 3
    assert "language_model.layers.0.self_attn.q_proj.bias" in files
    assert not any("talker" in name or "token2wav" in name for name in files)
    model = load_base(official, torch.bfloat16)
    state = model.state_dict()
    assert len(state) == len(files) == len(list(files))
    for file in sorted(official.glob("model-0*.safetensors")):
        for name, tensor in load_file(file).items():
            name = name.removeprefix("thinker.")
            if name.startswith("model."):
                name = name.replace("model.", "model.language_model.", 1)
            elif not name.startswith("lm_head"):
                name = f"model.{name}"
            assert torch.equal(state.pop(name), tensor), name
    assert not state
    (tmp_path / "tokenizer.json").write_text("{}")
    save_base(model, tmp_path / "ours", tmp_path / "tokenizer.json", {})
    ours = WeightFiles(tmp_path / "ours")
    assert ours.shapes() == files.shapes()


def test_rows_are_rows_of_the_tensor(official):
    files = WeightFiles(official)
    name = "language_model.embed_tokens.weight"
    whole = files.tensor(name)
    assert whole.dtype == torch.bfloat16 and tuple(whole.shape) == files.shapes()[name]
    assert torch.equal(files.rows(name, 3, 9), whole[3:9])
    with pytest.raises(ModelError, match=r"no weight language_model\.rms"):
        files.tensor("language_model.rms")


def test_a_shard_that_is_not_there(official):
    gone = sorted(official.glob("model-0*"))[-1]
    gone.unlink()
    with pytest.raises(ModelError, match=r"places \d+ weights in .*isn't there \(first thinker\..*fetch"):
        WeightFiles(official)


def test_the_talkers_files_may_be_absent(official):
    (official / "model-talker.safetensors").unlink()
    assert len(WeightFiles(official)) > 50


@pytest.mark.parametrize("left", [0, 4, 100, -1])
def test_a_truncated_shard(official, left):
    file = sorted(official.glob("model-0*"))[1]
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    with pytest.raises(ModelError, match="not a whole safetensors file") as raised:
        load_base(official)
    assert file.name in str(raised.value) and "\n" not in str(raised.value)
    if left == -1:
        assert f"{len(whole) - 1:,} of {len(whole):,} bytes" in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"metadata": {}}', "\xff"])
def test_an_index_that_is_none(official, text):
    index_of(official)[0].write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=r"index\.json: not a readable index"):
        WeightFiles(official)


def test_an_index_that_leaves_its_directory(official):
    path, index = index_of(official)
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = f"../{official.name}/{index['weight_map'][name]}"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelError, match="outside"):
        WeightFiles(official)


def test_one_weight_under_two_names(official):
    index_of(official)[0].unlink()
    (official / "model-talker.safetensors").unlink()
    (official / "model-zz.safetensors").write_bytes(b"")
    save_file({"model.language_model.norm.weight": torch.ones(64)}, official / "model-zz.safetensors")
    with pytest.raises(ModelError, match=r"holds language_model\.norm\.weight twice"):
        WeightFiles(official)


def test_directories_of_something_else(tmp_path):
    with pytest.raises(ModelError, match="expected a directory of weights"):
        WeightFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match="convert them first"):
        WeightFiles(tmp_path)


def test_a_quantised_model(official):
    file = sorted(official.glob("model-0*"))[0]
    weights = load_file(file)
    name = next(iter(weights))
    weights[name] = weights[name].to(torch.int8)
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"is I8, expected BF16.*not a quantised one"):
        WeightFiles(official)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(official, value):
    name = "thinker.visual.blocks.1.mlp.down_proj.weight"
    file = official / index_of(official)[1]["weight_map"][name]
    weights = load_file(file)
    weights[name][1, 1] = value
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"NaN or infinity in 1 of") as raised:
        load_base(official)
    assert name.removeprefix("thinker.") in str(raised.value)


def test_check_finite_gives_the_greatest_magnitude():
    assert check_finite(torch.tensor([1.0, -3.0]), "w", "here") == 3.0
    assert check_finite(torch.zeros(2, 2, dtype=torch.bfloat16), "w", "here") == 0.0
    assert check_finite(torch.zeros(0), "w", "here") == 0.0


def test_differences_are_counted_and_some_are_named():
    expected = {f"w{i}": (2, 2) for i in range(20)}
    found = {f"w{i}": (2, 2) for i in range(7, 20)} | {"w9": (2, 3), "v": (1,)}
    with pytest.raises(ModelError) as raised:
        check_weights(found, expected, "here", "a reason")
    message = str(raised.value)
    assert "7 missing: w0 [2, 2], w1 [2, 2]" in message and "and 2 more" in message and "w6" not in message
    assert "1 misshapen: w9 is [2, 3], expected [2, 2]" in message
    assert "1 unknown: v [1]" in message and message.endswith("Most likely a reason")
    check_weights(expected, expected, "here")


def test_a_head_that_is_stored_is_used(official):
    """Whatever config.json says of tying; without a stored head it decides."""
    path = official / "config.json"
    config = json.loads(path.read_text())
    text = config["thinker_config"]["text_config"]
    text["tie_word_embeddings"] = True
    path.write_text(json.dumps(config))
    head = WeightFiles(official).tensor("lm_head.weight").float()
    assert torch.equal(load_base(official).lm_head.weight, head)

    index, places = index_of(official)
    file = official / places["weight_map"].pop("thinker.lm_head.weight")
    index.write_text(json.dumps(places))
    weights = load_file(file)
    del weights["thinker.lm_head.weight"]
    if weights:
        save_file(weights, file)
    else:
        file.unlink()
    model = load_base(official)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    text["tie_word_embeddings"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"1 missing: lm_head\.weight"):
        load_base(official)
