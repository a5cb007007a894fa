"""How a narrow decoder starts, so that minutes of training are enough.

Three habits of large pretrained decoders are put in by hand: attention that averages what came before,
heads that tell a token where it stands, and heads that look for what resembles the asking token. A recipe
may hold the second of them still (`hold_clocks`); training is free to change the others.

The vision encoder has rotary positions only and can't say where in the frame a cell lies; the decoder's
multimodal rotary ids can, but only as attention weights between a cell and a token at a known place. A
"clock" head turns that weight into a value in the residual stream: it divides its attention between the
token that opens the media and a resting token, by the sine of their distance along one rotary axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crab_edge.prompt import SpecialIds
from crab_edge.training.heads import lifted_number_codes

#: Logit that lifts the opening and the resting token over hundreds of others.
_LIFT = 8.0
_CLOCK_GAIN = 0.25


@dataclass(frozen=True)
class Clock:
    """A head of one layer that measures the distance from `opening` along the rotary channel `channel`.

    Its phase (radians) at a distance d is `offset + turn * d`; distances first..last are told apart.
    """

    layer: int
    head: int
    channel: int
    opening: int
    first: float
    last: float
    turn: float
    offset: float = 0.0


def clocks(config: Any, special: SpecialIds) -> list[Clock]:
    """The clocks of a decoder configuration: column and row of a cell, second of a sound, frame of a video.

    A cell is 1..8 away from `<|vision_bos|>` in row and column; audio tokens 1..250 from `<|audio_bos|>`
    (10 s at 25 a second); video slices 50 ids apart, which turns the fast temporal channel by
    50 mod 2 pi = -0.265.
    """
    heads = config.num_attention_heads
    depth = config.hidden_size // heads
    rope = config.rope_parameters
    sections = rope.get("mrope_section")
    if heads < 4 or config.num_key_value_heads < 2 or not sections or len(sections) != 3:
        return []
    half = depth // 2
    frequency = [float(rope["rope_theta"]) ** (-i / half) for i in range(half)]
    rows = range(sections[0], sections[0] + sections[1])
    columns = range(sections[0] + sections[1], half)

    def nearest(channels: Sequence[int], wanted: float) -> int:
        return min(channels, key=lambda i: abs(math.log(frequency[i] / wanted)))

    column, row, time = nearest(columns, 0.12), nearest(rows, 0.13), nearest(columns, 0.006)
    turn = math.remainder(50 * frequency[0], 2 * math.pi)
    return [
        Clock(0, heads - 2, column, special.vision_bos, 1, 8, frequency[column]),
        Clock(0, heads - 1, row, special.vision_bos, 1, 8, frequency[row]),
        Clock(0, 1, time, special.audio_bos, 1, 250, frequency[time]),
        # Slice k of a video lies 1 + 50 k ids away: measured in slices.
        Clock(0, 0, 0, special.vision_bos, 0, 4, turn, offset=frequency[0]),
    ]


def initialise_decoder(text: nn.Module, special: SpecialIds | None = None, gain: float = 0.1) -> None:
    """A start that suits a narrow decoder trained for minutes, in place.

    Linears begin at 1/sqrt(fan in), since transformers' 0.02 leaves a gated MLP of this width next to dead.
    Attention begins as a faint average of everything before: queries and keys small, values a projection
    whose transpose the output applies. What the encoders say reaches the answer's tokens from the first step,
    and training has to sharpen the average instead of finding a way at all. With `special` the clocks are
    set too.
    """
    config = text.config
    depth = config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        text.embed_tokens.weight.normal_(0.0, config.hidden_size**-0.5, generator=generator)
        for layer in text.layers:
            mlp, attention = layer.mlp, layer.self_attn
            for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
                linear.weight.normal_(0.0, linear.in_features**-0.5, generator=generator)
            mlp.down_proj.weight.mul_(0.3 * (2 * len(text.layers)) ** -0.5)
            value = attention.v_proj.weight
            value.copy_(_orthonormal(value.shape[1], value.shape[0], generator).T)
            heads = value.reshape(-1, depth, value.shape[1]).repeat_interleave(shared, dim=0)
            attention.o_proj.weight.copy_(gain / shared * heads.reshape(-1, value.shape[1]).T)
        if special is not None:
            groups: dict[tuple[int, int], list[Clock]] = {}
            for clock in clocks(config, special):
                groups.setdefault((clock.layer, clock.head // shared), []).append(clock)
            for own in groups.values():
                _set_clocks(text, own, special.im_start, generator)
            for index in range(len(text.layers) // 2, len(text.layers) - 1):
                _set_lookup(text, index, config.num_attention_heads - 1, generator)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def _set_clocks(text: nn.Module, own: Sequence[Clock], resting: int, generator: torch.Generator) -> None:
    """Queries, keys and outputs of the clocks of one layer that share keys and values."""
    config, attention = text.config, text.layers[own[0].layer].self_attn
    depth, width = config.hidden_size // config.num_attention_heads, config.hidden_size
    half, slowest = depth // 2, depth // 2 - 1  # the slowest channel hardly turns: a constant
    group = own[0].head // (config.num_attention_heads // config.num_key_value_heads)
    key = attention.k_proj.weight[group * depth : (group + 1) * depth]
    lift = math.sqrt(_LIFT * depth**0.5)

    def named(token: int) -> Tensor:
        # Behind RMSNorm an embedding is sqrt(width) long: the product with this is 1.
        row = text.embed_tokens.weight[token]
        return row / row.norm() / width**0.5

    key.mul_(0.1)
    for token in dict.fromkeys([resting, *(clock.opening for clock in own)]):
        key[slowest] += lift * named(token)
    for clock in own:
        # Logit = swing * sin(turn * (distance - middle)) beside the lift, about -2.2..2.2 over the reach.
        reach = min(abs(clock.turn) * (clock.last - clock.first) / 2, math.pi / 2)
        size = math.sqrt(2.2 / math.sin(reach) * depth**0.5)
        phase = clock.offset + clock.turn * (clock.first + clock.last) / 2 + math.pi / 2
        key[clock.channel] += size * math.cos(phase) * named(clock.opening)
        key[clock.channel + half] += size * math.sin(phase) * named(clock.opening)
        rows = slice(clock.head * depth, (clock.head + 1) * depth)
        attention.q_proj.weight[rows] *= 0.1
        query = attention.q_proj.bias[rows]
        query.zero_()
        query[clock.channel], query[slowest] = size, lift
        attention.o_proj.weight[:, rows] = _CLOCK_GAIN * _orthonormal(width, depth, generator)


def _set_lookup(text: nn.Module, layer: int, head: int, generator: torch.Generator) -> None:
    """One projection for queries and keys, on the channels that hardly turn: like attends to like."""
    config, attention = text.config, text.layers[layer].self_attn
    depth = config.hidden_size // config.num_attention_heads
    half = depth // 2
    group = head // (config.num_attention_heads // config.num_key_value_heads)
    quiet = [c + side * half for side in (0, 1) for c in range(half // 2, half)]
    basis = _orthonormal(config.hidden_size, len(quiet), generator).T
    attention.q_proj.weight[[head * depth + c for c in quiet]] = basis
    attention.k_proj.weight[[group * depth + c for c in quiet]] = basis


def initialise_vocabulary(
    thinker: nn.Module, labels: Sequence[int], prototypes: Tensor, numbers: Sequence[int]
) -> None:
    """Start the rows of labels at the towers' prototypes and those of numbers at Fourier codes, both
    tables.
    """
    codes = lifted_number_codes(prototypes.shape[1])
    with torch.no_grad():
        for weight, scale in (
            (thinker.model.language_model.embed_tokens.weight, 1.0),
            (thinker.lm_head.weight, 0.6),
        ):
            weight[list(labels)] = scale * prototypes
            weight[list(numbers)] = scale * codes
