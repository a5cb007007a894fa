"""What training an adapter needs of one device's memory: computed from shapes, not measured.

The parts that lie there throughout (base, adapter, gradients, averages) are exact. Activations are those of
one forward of `batch` records of `tokens` tokens each, with every block recomputed in the backward pass; the
driver's own memory and the allocator's gaps come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from crab_edge.errors import InputError
from crab_edge.model import Thinker, load_config, target_linears
from crab_edge.training.adapt_recipe import AdapterRecipe

TOKENS, ANSWER = 1100, 128  # of a record: the longest prompts (two videos or sounds) and a reasoned answer
SLICES, SECONDS = 10, 20  # of a record: temporal slices of two videos, sound of a 60 s clip
_LOW, _HIGH, _AVERAGES = 2, 4, 8  # bytes: bf16, fp32, AdamW's two
_TABLES = 4 * (16 + 256 + 1)  # bytes a 4-bit linear: both code tables and the scales' offset


@dataclass(frozen=True)
class Need:
    """Bytes on one device, by what they are for."""

    base: int
    adapter: int
    gradients: int
    averages: int
    kept: int
    block: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


def four_bit_bytes(weights: int) -> int:
    """NF4 in blocks of 64 whose scales are stored in 8 bits, in blocks of 256: 0.516 bytes a weight."""
    blocks = -(-weights // 64)
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + _TABLES


def training_memory(
    recipe: AdapterRecipe, *, tokens: int = TOKENS, answer: int = ANSWER, slices: int = SLICES
) -> Need:
    """The need of one process under DDP. InputError when the recipe names no base."""
    if recipe.base.path is None:
        raise InputError(f"recipe {recipe.name} needs a base to compute its memory: give --base DIR")
    config = load_config(recipe.base.path)
    with torch.device("meta"):
        model = Thinker(config)
    low = _LOW if recipe.precision != "fp32" else _HIGH
    linears = target_linears(model, towers=recipe.adapter.towers)
    learn = {n: s for n, s in linears.items() if recipe.adapter.train_towers or not _in_tower(n)}
    learning = sum(_adapter(shape, recipe) for shape in learn.values())
    sleeping = sum(_adapter(shape, recipe) for name, shape in linears.items() if name not in learn)
    text, vision, audio = config.text_config, config.vision_config, config.audio_config
    rows = recipe.steps.batch * tokens
    patches = recipe.steps.batch * slices * 256
    states = recipe.steps.batch * SECONDS * 50
    kept = low * (
        text.num_hidden_layers * rows * text.hidden_size
        + (vision.depth * patches * vision.hidden_size + audio.encoder_layers * states * audio.d_model)
        * (recipe.adapter.towers and recipe.adapter.train_towers)
    )
    layer = {n: s for n, s in linears.items() if ".layers.0." in n and not _in_tower(n)}
    one = _block(rows, text.hidden_size, layer, recipe, low)
    if not recipe.steps.checkpointing:
        kept, one = text.num_hidden_layers * one, 0
    return Need(
        base=_base(model, recipe, low),
        adapter=_HIGH * (learning + sleeping),
        gradients=_HIGH * learning,
        averages=_AVERAGES * learning,
        kept=kept,
        block=one,
        # In the base's dtype, in fp32, their log-softmax and their gradient.
        logits=recipe.steps.batch * answer * text.vocab_size * (low + 3 * _HIGH),
    )


def memory_table(recipe: AdapterRecipe, need: Need) -> str:
    """The parts in GB, for people."""
    bits = f"{recipe.base.quantise}-bit linears" if recipe.base.quantise else "as it is"
    rows = [
        (f"frozen base, {bits}", need.base),
        ("adapter, fp32", need.adapter),
        ("its gradients, fp32", need.gradients),
        ("AdamW's averages, fp32", need.averages),
        ("activations kept between blocks", need.kept),
        ("activations inside one block", need.block),
        ("logits of the answers", need.logits),
        ("sum", need.total),
    ]
    lines = [f"{recipe.name}: memory of one device in GB, computed, not measured"]
    lines += [f"  {name:<34}{value / 1e9:8.2f}" for name, value in rows]
    lines.append("  the driver's memory and the allocator's gaps come on top: leave 10 %")
    return "\n".join(lines)


def _adapter(shape: tuple[int, int], recipe: AdapterRecipe) -> int:
    n_in, n_out = shape
    sizes = recipe.adapter
    return n_in * (sizes.experts + sizes.rank) + sizes.experts * n_out * sizes.rank


def _base(model: nn.Module, recipe: AdapterRecipe, low: int) -> int:
    head = model.get_output_embeddings()
    packed = {
        id(module.weight): module
        for name, module in model.named_modules()
        if recipe.base.quantise
        and isinstance(module, nn.Linear)
        and module is not head
        and (recipe.base.quantise_towers or not _in_tower(name))
    }
    total = 0
    for weight in model.parameters():
        count = weight.numel()
        if id(weight) not in packed:
            total += low * count
        elif recipe.base.quantise == 4:
            total += four_bit_bytes(count)
        else:
            total += count + 4 * len(weight)
    return total


def _block(
    rows: int, width: int, linears: dict[str, tuple[int, int]], recipe: AdapterRecipe, low: int
) -> int:
    """What one decoder layer keeps while its backward pass runs, and the largest weight unpacked."""
    experts = recipe.adapter.experts * recipe.adapter.rank
    # Two norms with their fp32 copies and results, queries and keys before and after rotation.
    total = rows * width * (2 * (2 * _HIGH + low) + 4 * low)
    for n_in, n_out in linears.values():
        # Base's and adapter's product and their sum, dropout's output and mask, h and z.
        total += rows * (3 * low * n_out + (low + 1) * n_in + low * (recipe.adapter.rank + experts))
        # [B_0|..] joined in fp32 and in the base's dtype.
        total += n_out * experts * (_HIGH + low)
    largest = max(n_in * n_out for n_in, n_out in linears.values())
    return total + (low * largest if recipe.base.quantise else 0)


def _in_tower(name: str) -> bool:
    return "audio_tower." in name or "visual." in name
