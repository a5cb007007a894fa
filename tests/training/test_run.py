"""The whole tiny recipe: base and adapter come out; a run killed in any stage ends in the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file

from crab_edge.errors import InputError
from crab_edge.model import load_adapter, load_base, load_card
from crab_edge.training.loop import Killed, Run, choose_precision, lr_factor
from crab_edge.training.recipe import Recipe, load_recipe
from crab_edge.training.run import Trainer, start_over


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny")


def _train(recipe, out, stop_after=None):
    run = Run(out, precision=recipe.precision, workers=0, seed=recipe.seed, stop_after=stop_after)
    return Trainer(recipe, out, say=lambda _: None, run=run).train()


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    return _train(recipe, tmp_path_factory.mktemp("whole"))


def test_a_run_leaves_base_adapter_log_and_plot(whole):
    base = load_base(whole / "base")
    card = load_card(whole / "base")
    assert card.name == "tiny" and "bell" in card.labels
    model = load_adapter(base, whole / "adapter")
    weights = load_file(whole / "adapter" / "adapter_model.safetensors")
    towers = [n for n in weights if "lora_B" in n and ("visual" in n or "audio_tower" in n)]
    decoder = [n for n in weights if "lora_B" in n and "language_model" in n]
    # As in the official file: tower experts exist and are exactly zero; the decoder's have learnt.
    assert towers and not any(weights[n].any() for n in towers)
    assert decoder and all(weights[n].any() for n in decoder)
    assert model.peft_config["default"].num_experts == 3
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert {r["stage"] for r in rows} == {"audio", "vision", "base", "adapter"}
    assert set(json.loads((whole / "metrics.json").read_text())) == {"audio", "vision", "base", "adapter"}
    assert (whole / "losses.png").stat().st_size > 1000


def test_killed_and_resumed_ends_in_the_same_weights(recipe, whole, tmp_path):
    out = tmp_path / "killed"
    for _ in range(20):
        try:
            _train(recipe, out, stop_after=2)
            break
        except Killed:
            continue
    else:
        pytest.fail("the run never came to its end")
    for name in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        first, second = load_file(whole / name), load_file(out / name)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(second[key], first[key], rtol=0, atol=0)


def test_the_adapter_stage_leaves_the_base_alone(whole):
    base = load_file(whole / "base" / "model.safetensors")
    done = torch.load(whole / "state" / "base.done.pt", weights_only=True)["thinker"]
    assert all(torch.equal(base[n], done[n]) for n in base)


def test_another_recipe_is_refused_and_fresh_forgets(recipe, whole, tmp_path):
    out = tmp_path / "other"
    out.mkdir()
    (out / "recipe.json").write_text((whole / "recipe.json").read_text())
    (out / "notes.txt").write_text("mine")
    other = recipe.model_copy(update={"seed": 8})
    with pytest.raises(InputError, match=r"another recipe.*seed"):
        _train(other, out)
    start_over(out)
    assert [p.name for p in out.iterdir()] == ["notes.txt"]


def test_learning_rate_warms_up_and_ends_at_its_floor():
    assert lr_factor(0.01, 0.1, 0.0) == pytest.approx(0.1)
    assert lr_factor(0.1, 0.1, 0.0) == pytest.approx(1.0)
    assert lr_factor(0.55, 0.1, 0.0) == pytest.approx(0.5)
    assert lr_factor(1.0, 0.1, 0.2) == pytest.approx(0.2)


def test_precision_names():
    assert choose_precision("fp32") == "no"
    assert choose_precision("bf16") == "bf16"
    assert choose_precision("auto") in ("no", "bf16")


def test_recipes_say_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match=r"no recipe named 'nano'.*crab-nano"):
        load_recipe("nano")
    broken = tmp_path / "a.toml"
    broken.write_text("name = ")
    with pytest.raises(InputError, match="not a TOML file"):
        load_recipe(broken)
    broken.write_text('name = "x"\nspeed = 3\n')
    with pytest.raises(InputError, match=r"speed|base"):
        load_recipe(broken)
    shipped = load_recipe("crab-nano", minutes_scale=0.5)
    assert shipped.base.max_minutes == load_recipe("crab-nano").base.max_minutes / 2
    stages = (shipped.audio, shipped.vision, shipped.base, shipped.adapter)
    assert sum(2 * s.max_minutes for s in stages) <= 85
