"""The memory that training needs, against the tensors that a tiny run holds."""

import pytest
import torch

from crab_edge.errors import InputError
from crab_edge.model import load_base
from crab_edge.training.adapt_recipe import AdapterRecipe
from crab_edge.training.memory import four_bit_bytes, memory_table, training_memory
from tests.tiny_model import make_tiny_model_dir


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_tiny_model_dir(tmp_path_factory.mktemp("base"), adapter=False)[0]


def recipe(base, **parts):
    frozen = {"path": str(base) if base else None, **parts.pop("frozen", {})}
    adapter = {"rank": 4, "alpha": 8.0, **parts.pop("adapter", {})}
    return AdapterRecipe(kind="adapter", name="t", base=frozen, adapter=adapter, **parts)


@pytest.mark.parametrize("towers", [True, False])
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_the_base_is_counted_to_the_byte(base, bits, towers):
    pytest.importorskip("bitsandbytes")
    from crab_edge.model.quantised import is_quantised, quantise_base

    model = load_base(base, dtype=torch.bfloat16)
    if bits:
        quantise_base(model, bits, towers=towers)
    held = 0
    for weight in model.parameters():
        held += weight.numel() * weight.element_size()
    for module in model.modules():
        if not is_quantised(module):
            continue
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            held += module.weight.SCB.nbytes
        else:
            tensors = (state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
            held += sum(t.nbytes for t in tensors)
    need = training_memory(recipe(base, frozen={"quantise": bits, "quantise_towers": towers}))
    assert need.base == held


def test_a_learning_parameter_takes_16_bytes_and_a_sleeping_one_4(base, tmp_path):
    from crab_edge.training import adapt, checkpoint
    from crab_edge.training.loop import Run

    for train_towers in (True, False):
        own = recipe(base, precision="fp32", adapter={"train_towers": train_towers})
        run = Run(tmp_path, accelerator=adapt.open_accelerator(own))
        module, _ = adapt.build_module(own, run)
        learning = sum(p.numel() for p in checkpoint.trainable(module).values())
        every = sum(p.numel() for n, p in module.named_parameters() if "lora_" in n)
        need = training_memory(own)
        assert need.gradients + need.averages == 12 * learning
        assert need.adapter == 4 * every
        assert (learning == every) == train_towers


def test_four_bits_take_little_more_than_half_a_byte():
    assert four_bit_bytes(3584 * 18944) / (3584 * 18944) == pytest.approx(0.5159, abs=1e-4)


def test_what_helps_is_seen(base):
    plain = training_memory(recipe(base))
    low = training_memory(recipe(base, frozen={"quantise": 4}))
    wide = training_memory(recipe(base, steps={"checkpointing": False}))
    short = training_memory(recipe(base), tokens=100)
    assert low.base < plain.base and low.averages == plain.averages
    assert wide.kept > plain.kept + plain.block
    assert short.kept < plain.kept
    table = memory_table(recipe(base), plain)
    assert "computed, not measured" in table and f"{plain.total / 1e9:.2f}" in table
    with pytest.raises(InputError, match="--base DIR"):
        training_memory(recipe(None))
