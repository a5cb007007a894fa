"""What `bench --gpu` times of a decoder (groups of linears, products, routes, layers, the whole), and what
each of them must compute.

A part is timed over all layers in turn and divided by their number: every layer has its own bytes, so nothing
is read from the cache that a real step would read from memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from crab_edge_apps._bench_gpu_decoder import SMALL_HEAD, Decoder
from crab_edge_apps._bench_gpu_official import (
    ReferenceGroup,
    ReferenceHead,
    reference,
    reference_products,
    reference_route,
)
from crab_edge_apps._bench_gpu_weights import GROUPS, RandomModel
from torch import Tensor

Outputs = list[Tensor]
#: ||y - reference|| / ||reference|| that is taken for rounding: of one linear, and of a whole decoder. A bias
#: or a second plane that is left out would be 0.02 and more.
LINEAR_TOLERANCE, DECODER_TOLERANCE = 0.015, 0.05


@dataclass(frozen=True)
class Part:
    """Something to time on one decoder: `run` launches it `per` times and gives every output.

    bytes: read by one of the `per`.
    """

    name: str
    run: Callable[[], Outputs]
    expected: Callable[[], Outputs]
    bytes: int
    per: int = 1
    tolerance: float = LINEAR_TOLERANCE


class Inputs:
    """Activations that all contenders of a shape are given, and the reference's answers to them.

    dtype: of the contenders' activations; context: tokens in the cache before a decode step; prefill: tokens
    of a prompt. Answers are computed when they are first asked for and kept on the device.
    """

    def __init__(self, model: RandomModel, dtype: torch.dtype, context: int, prefill: int) -> None:
        self.model, self.dtype, self.context, self.prefill = model, dtype, context, prefill
        self._answers: dict[tuple[str | None, str], Outputs] = {}

    @property
    def slots(self) -> int:
        """Tokens that a decoder's cache has to hold."""
        return max(self.context + 1, self.prefill)

    def x(self, group: str) -> Tensor:
        """One token's input of a group of linears, [1, K]."""
        return self.model.hidden(1, group, self.model.widths[GROUPS[group][0]][1]).to(self.dtype)

    def embeds(self, tokens: int) -> Tensor:
        """A decoder's input [tokens, hidden]."""
        return self.model.hidden(tokens, f"{tokens}").to(self.dtype)

    def z(self, model: RandomModel, layer: int, group: str) -> Tensor | None:
        """All linears' z for `x(group)`, [1, linears*experts*rank]; None without adapters."""
        if model.experts is None:
            return None
        return reference_route(model, model.group(layer, group), self.x(group)).to(self.dtype)

    def answers(self, model: RandomModel, name: str, compute: Callable[[], Outputs]) -> Outputs:
        """`compute()`, once for each form and part."""
        key = (model.experts, name)
        if key not in self._answers:
            self._answers[key] = compute()
        return self._answers[key]

    def forget(self) -> None:
        """Frees the answers."""
        self._answers.clear()


def group_parts(decoder: Any, model: RandomModel, inputs: Inputs, *, compiled: bool) -> Iterator[Part]:
    """The groups of linears for one token, routers included."""
    layers = range(model.shape.layers)
    for name in GROUPS:
        groups, x = decoder.groups(name), inputs.x(name)

        def expected(name: str = name, x: Tensor = x) -> Outputs:
            return [y for i in layers for y in reference(model, model.group(i, name), x)]

        yield Part(
            name,
            lambda groups=groups, x=x: [y for group in groups for y in decoder.apply(group, x, compiled)],
            expected,
            sum(map(decoder.bytes, groups)) // len(groups),
            len(groups),
        )


def kernel_parts(decoder: Any, model: RandomModel, inputs: Inputs) -> Iterator[Part]:
    """The engine's products and routes by themselves; the official formula can't be taken apart like this."""
    layers = range(model.shape.layers)
    for name in GROUPS:
        groups, x = decoder.groups(name), inputs.x(name)
        zs = [inputs.z(model, i, name) for i in layers]
        routes = [decoder.route_bytes(group) for group in groups]

        def products(name: str = name, x: Tensor = x, zs: list[Tensor | None] = zs) -> Outputs:
            found = []
            for i, z in zip(layers, zs, strict=True):
                parts = None if z is None else list(z.chunk(len(GROUPS[name]), dim=-1))
                found += reference_products(model.group(i, name), x, parts)
            return found

        def routed(name: str = name, x: Tensor = x) -> Outputs:
            return [reference_route(model, model.group(i, name), x) for i in layers]

        yield Part(
            f"{name} product",
            lambda groups=groups, x=x, zs=zs: [
                y for group, z in zip(groups, zs, strict=True) for y in decoder.products(group, x, z)
            ],
            products,
            (sum(map(decoder.bytes, groups)) - sum(routes)) // len(groups),
            len(groups),
        )
        if model.experts is not None:
            yield Part(
                f"{name} route",
                lambda groups=groups, x=x: [group.route(x) for group in groups],
                routed,
                sum(routes) // len(groups),
                len(groups),
            )


def decoder_parts(decoder: Any, model: RandomModel, inputs: Inputs, *, compiled: bool) -> Iterator[Part]:
    """One layer and the whole decoder: one token behind `context`, a prompt into an empty cache."""
    layers = model.shape.layers
    weights = sum(decoder.bytes(group) for name in GROUPS for group in decoder.groups(name))
    token = 2 * layers * model.shape.kv_heads * model.shape.head_dim * inputs.dtype.itemsize
    for name, tokens, past in (("decode", 1, inputs.context), ("prefill", inputs.prefill, 0)):
        x = inputs.embeds(tokens)
        held = weights + token * (past + tokens)
        for rows, part, size, per in (
            (SMALL_HEAD, f"layer {name}", held // layers, layers),
            (None, name, held + decoder.head_bytes(), 1),
        ):
            run = decoder.runner(x, past, rows, compiled)

            def expected(x: Tensor = x, past: int = past, rows: int | None = rows) -> Outputs:
                return [_reference_decoder(model, inputs.slots)(x.float(), past, rows)]

            yield Part(part, lambda run=run: [run()], expected, size, per, DECODER_TOLERANCE)


def _reference_decoder(model: RandomModel, slots: int) -> Decoder:
    """The decoder in float32; it holds no weights, only a cache."""
    return Decoder(
        model,
        lambda layer, group: ReferenceGroup(model, layer, group),
        lambda rows: ReferenceHead(model, rows),
        torch.float32,
        slots,
    )
