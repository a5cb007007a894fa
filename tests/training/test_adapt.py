"""An adapter on the base in a directory: what learns, what is written, kills, quantised bases, bad input."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

pytest.importorskip("bitsandbytes")

from crab_edge.errors import InputError, ModelError
from crab_edge.model import ILoRAConfig, add_adapter, load_adapter, load_base, zero_linears
from crab_edge.model.quantised import is_quantised
from crab_edge.training import adapt, adapt_loop, checkpoint
from crab_edge.training.adapt_recipe import AdapterRecipe, open_recipe
from crab_edge.training.loop import Killed, Run
from crab_edge.training.records import RecordBatches
from tests.tiny_avuie import make_tiny_avuie
from tests.tiny_model import make_tiny_model_dir

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def one_precision_a_process():
    """accelerate keeps its first precision for good; these tests use two."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model_dir(tmp_path_factory.mktemp("base"), adapter=False)[0]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_tiny_avuie(tmp_path_factory.mktemp("data"), stills=4)


def recipe(base, data, **parts) -> AdapterRecipe:
    steps = {"batch": 1, "global_batch": 2, "epochs": 2, "lr": 1e-2, **parts.pop("steps", {})}
    return AdapterRecipe(
        kind="adapter",
        name="test",
        precision=parts.pop("precision", "fp32"),
        base={"path": str(base), **parts.pop("frozen", {})},
        data={"source": "avuie", "root": str(data), "workers": 0},
        adapter={"rank": 4, "alpha": 8.0, **parts.pop("adapter", {})},
        steps=steps,
    )


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    adapt.train_adapter(recipe(base, data, frozen={"quantise": 4}), out, say=lambda _: None)
    return out


def test_a_run_on_a_4_bit_base_leaves_an_adapter_for_the_float_base(base, whole):
    model = load_adapter(load_base(base), whole / "adapter")
    # Every linear of the reference's has learnt, the encoders' too.
    assert zero_linears(model) == []
    assert model.peft_config["default"].r == 4
    weights = load_file(whole / WEIGHTS)
    assert {t.dtype for t in weights.values()} == {torch.float32}
    parts = {part for part in ("visual", "audio_tower", "language_model") for n in weights if part in n}
    assert parts == {"visual", "audio_tower", "language_model"}
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["figures"]["steps"] == 4
    # 30 % of 4 steps, rounded up: the adapter after the second one.
    assert [p.name for p in (whole / "snapshots").iterdir()] == ["step-000002"]
    assert list((whole / "state").iterdir()) == []


@pytest.mark.parametrize("stop_after", [1, 3])
def test_killed_and_resumed_ends_in_the_same_adapter(base, data, whole, tmp_path, stop_after):
    own = recipe(base, data, frozen={"quantise": 4})
    for _ in range(5):
        try:
            adapt.train_adapter(own, tmp_path, say=lambda _: None, stop_after=stop_after)
            break
        except Killed:
            state = torch.load(tmp_path / "state" / checkpoint.STATE, weights_only=True)
            # The base is never copied into a checkpoint.
            assert all("lora_" in name for name in (*state["weights"], *state["optimizer"]))
            assert (tmp_path / "state" / checkpoint.STATE).stat().st_size < 1_000_000
    else:
        pytest.fail("the run never came to its end")
    first, second = load_file(whole / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def test_the_same_command_again_changes_nothing(base, data, whole):
    before = (whole / WEIGHTS).stat().st_mtime_ns
    adapt.train_adapter(recipe(base, data, frozen={"quantise": 4}), whole, say=lambda _: None)
    assert (whole / WEIGHTS).stat().st_mtime_ns == before


def parts(base, data, tmp_path, **changes):
    """(module, one batch) with an adapter whose experts aren't zero."""
    own = recipe(base, data, **changes)
    run = Run(tmp_path, accelerator=adapt.open_accelerator(own))
    module, model = adapt.build_module(own, run)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    from crab_edge.training.avuie import AvuieScenes, train_lists

    features = adapt._checked(own, base)
    records = AvuieScenes(train_lists(own.data))
    batch = RecordBatches(records, (str(base / "tokenizer.json"), features), batch=2, seed=0)(0)
    return module.train(), batch


def gradients(module, batch):
    module.zero_grad(set_to_none=True)
    loss = module(batch)["loss"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def test_non_reentrant_checkpointing_gives_tower_adapters_their_gradients(base, data, tmp_path):
    kept, batch = parts(base, data, tmp_path, adapter={"dropout": 0.0}, steps={"checkpointing": False})
    redone, _ = parts(base, data, tmp_path, adapter={"dropout": 0.0})
    (loss, truth), (again, found) = gradients(kept, batch), gradients(redone, batch)
    torch.testing.assert_close(again, loss)
    learning = {n for n, p in kept.named_parameters() if p.requires_grad}
    assert found.keys() == truth.keys() == learning
    assert any("visual." in n for n in learning) and any("audio_tower." in n for n in learning)
    for name in learning:
        assert found[name].abs().sum() > 0, name
        torch.testing.assert_close(found[name], truth[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_would_not(base, data, tmp_path):
    module, batch = parts(base, data, tmp_path, adapter={"dropout": 0.0})
    adapt.checkpoint_activations(module.thinker, reentrant=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        gradients(module, batch)
    # The reference's way out: the embeddings' output requires a gradient. The encoders' inputs don't.
    embed = module.thinker.model.language_model.embed_tokens
    embed.register_forward_hook(lambda _, __, out: out.requires_grad_())
    _, found = gradients(module, batch)
    learning = {n for n, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == {n for n in learning if "language_model" in n} < learning


def test_checkpointing_runs_blocks_again(base, data, tmp_path):
    counts = []
    for checkpointing in (False, True):
        module, batch = parts(base, data, tmp_path, steps={"checkpointing": checkpointing})
        model = module.thinker.model
        calls = []
        for norm in (
            model.visual.blocks[0].norm1,
            model.audio_tower.layers[0].final_layer_norm,
            model.language_model.layers[0].input_layernorm,
        ):
            norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gradients(module, batch)
        counts.append(len(calls))
    assert counts == [3, 6]


def test_a_4_bit_base_equals_its_dequantised_float(base, data, tmp_path):
    from crab_edge.model.quantised import dequantised

    low, batch = parts(base, data, tmp_path, frozen={"quantise": 4, "quantise_towers": True})
    high, _ = parts(base, data, tmp_path)
    quantised = {n: m for n, m in low.named_modules() if is_quantised(m)}
    assert sum("language_model" in n for n in quantised) == 14 and any("visual" in n for n in quantised)
    assert not any(n.endswith("lm_head") for n in quantised)
    for name, linear in quantised.items():
        high.get_submodule(name).weight.data.copy_(dequantised(linear))
    for module in (low, high):
        torch.manual_seed(0)
        module.result = gradients(module, batch)
    torch.testing.assert_close(low.result[0], high.result[0])
    assert low.result[1].keys() == high.result[1].keys()
    for name, gradient in low.result[1].items():
        torch.testing.assert_close(gradient, high.result[1][name], atol=1e-5, rtol=1e-3, msg=name)


def test_towers_asleep_stay_zero_and_are_saved(base, data, tmp_path):
    own = recipe(base, data, adapter={"train_towers": False}, steps={"max_steps": 2})
    adapt.train_adapter(own, tmp_path, say=lambda _: None)
    model = load_adapter(load_base(base), tmp_path / "adapter")
    zero = zero_linears(model)
    assert zero and all("visual" in n or "audio_tower" in n for n in zero)
    assert not any("language_model" in n for n in zero)


def test_bf16_runs_compute_low_and_learn_high(base, data, tmp_path):
    own = recipe(base, data, precision="bf16", frozen={"quantise": 4}, steps={"max_steps": 2})
    run = Run(tmp_path / "look", accelerator=adapt.open_accelerator(own))
    module, _ = adapt.build_module(own, run)
    learning = checkpoint.trainable(module)
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert module.thinker.lm_head.weight.dtype == torch.bfloat16
    adapt.train_adapter(own, tmp_path, say=lambda _: None)
    # bf16 products saw the weights rounded to bf16: that is what is worth keeping.
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}


def test_the_schedule_is_transformers_own():
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, 100)
    for step in range(100):
        assert adapt_loop.cosine(step, 100, 0.03) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_a_step_is_the_same_on_any_number_of_processes():
    steps = open_recipe("crab-plus-7b", base="x").steps
    assert (steps.epochs, steps.lr, steps.warmup_ratio, steps.weight_decay) == (5, 1e-4, 0.03, 0.0)
    one, two = adapt_loop.plan(steps, 1001, 1), adapt_loop.plan(steps, 1001, 2)
    assert (one.steps, two.steps, one.accumulation, two.accumulation) == (626, 626, 2, 1)
    assert one.snapshots == frozenset({188, 376, 564})
    with pytest.raises(InputError, match=r"8 isn't a multiple of 4 processes x steps.batch 4"):
        adapt_loop.plan(steps, 1001, 4)


def test_official_recipes():
    for name, width in (("crab-plus-7b", 3584), ("crab-plus-3b", 2048)):
        own = open_recipe(name, base="x", quantise=4)
        assert own.base.hidden_size == width and own.base.quantise == 4
        sizes = own.adapter
        assert (sizes.rank, sizes.alpha, sizes.experts, sizes.dropout) == (128, 256.0, 3, 0.1)
        assert sizes.towers and own.steps.checkpointing
        assert len(own.data.tasks) == len(set(own.data.tasks)) == 19


def test_what_does_not_fit_is_refused_before_anything_is_written(base, data, tmp_path):
    out = tmp_path / "out"

    def refused(kind, match, own):
        with pytest.raises(kind, match=match):
            adapt.train_adapter(own, out, say=lambda _: None)
        assert not out.exists()

    refused(InputError, "is for a base of width 3584", recipe(base, data, frozen={"hidden_size": 3584}))
    refused(ModelError, "config.json", recipe(tmp_path, data))
    refused(InputError, "train lists hold no records|no such list", recipe(base, tmp_path))
    refused(InputError, "isn't a multiple", recipe(base, data, steps={"batch": 4, "global_batch": 6}))
    with pytest.raises(InputError, match="needs a base"):
        open_recipe("crab-plus-7b")
    with pytest.raises(InputError, match=r"--base.*trains a base of its own"):
        open_recipe("crab-nano", base=base)
    with pytest.raises(InputError, match=r"base\.quantise"):
        open_recipe("crab-plus-7b", base=base, quantise=5)


def test_another_run_in_the_folder_is_refused_and_fresh_starts_over(base, data, tmp_path):
    own = recipe(base, data, steps={"max_steps": 1})
    adapt.train_adapter(own, tmp_path, say=lambda _: None)
    (tmp_path / "notes.txt").write_text("mine")
    other = recipe(base, data, steps={"max_steps": 1, "lr": 1e-3})
    with pytest.raises(InputError, match=r"another recipe, base or data.*steps"):
        adapt.train_adapter(other, tmp_path, say=lambda _: None)
    from crab_edge.training.recipe import load_recipe
    from crab_edge.training.run import _same_recipe

    with pytest.raises(InputError, match="another recipe"):
        _same_recipe(load_recipe("tiny"), tmp_path)
    adapt.train_adapter(other, tmp_path, say=lambda _: None, fresh=True)
    assert json.loads((tmp_path / "recipe.json").read_text())["steps"]["lr"] == 1e-3
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_broken_file_stops_the_run_and_a_whole_one_continues_it(base, tmp_path):
    data = make_tiny_avuie(tmp_path / "data", stills=4)
    wav = data / "s4/audio/2.wav"
    sound = wav.read_bytes()
    wav.write_bytes(b"no sound")
    own = recipe(base, data, steps={"checkpoint_steps": 1})
    with pytest.raises(InputError, match=r"2\.wav.*continues from the last checkpoint"):
        adapt.train_adapter(own, tmp_path / "out", say=lambda _: None)
    wav.write_bytes(sound)
    adapt.train_adapter(own, tmp_path / "out", say=lambda _: None)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_saving_an_adapter_leaves_a_live_model_alone(base, tmp_path):
    model = add_adapter(load_base(base), ILoRAConfig(r=2, lora_alpha=4, init_weights=False))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    from crab_edge.model import save_adapter

    given = {n: torch.zeros_like(p) for n, p in model.named_parameters() if "lora_" in n}
    save_adapter(model, tmp_path, given)
    assert not any(t.any() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
