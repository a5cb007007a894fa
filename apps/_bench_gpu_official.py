"""The released code's I-LoRA in torch, for `bench --gpu`, and the float32 reference of every contender.

Source: Crab+ reference (`peft_hyper/tuners/lora.py`): y = W x + b, then y += (g_i * B_i h) * s for i = 0, 1,
2, with the softmax of the router in float32 and everything else in the weights' dtype.
"""

from __future__ import annotations

import torch
from crab_edge_apps._bench_gpu_weights import SCALE, GroupWeights, RandomModel, Stored
from torch import Tensor, nn
from torch.nn import functional as F


class OfficialLinear(nn.Module):
    """One adapted linear: W [N, K], bias [N] or None, A [rank, K], R [experts, K], every B_i [N, rank]."""

    def __init__(
        self, W: Tensor, bias: Tensor | None, A: Tensor | None, R: Tensor | None, B: tuple[Tensor, ...]
    ) -> None:
        super().__init__()
        self.register_buffer("W", W)
        self.register_buffer("bias", bias)
        self.register_buffer("A", A)
        self.register_buffer("R", R)
        self.experts = len(B)
        for i, up in enumerate(B):
            self.register_buffer(f"B{i}", up)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype."""
        y = F.linear(x, self.W, self.bias)
        if self.experts:
            gate = F.softmax(F.linear(x, self.R), dim=-1, dtype=torch.float32).to(y.dtype)
            down = F.linear(x, self.A)
            for i in range(self.experts):
                y = y + gate[..., i : i + 1] * F.linear(down, getattr(self, f"B{i}")) * SCALE
        return y


class OfficialGroup(nn.Module):
    """Linears of one input, each with a router of its own, as the released code has them."""

    def __init__(
        self, model: RandomModel, weights: GroupWeights, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        """Float weights: dequantised from the store, rounded once to `dtype`."""
        super().__init__()
        rank, experts = model.rank, model.n_experts
        downs: list[Tensor | None] = [None] * (2 * len(weights.linears))
        if weights.route is not None:
            parts = weights.route.floats(dtype).split([rank, experts] * len(weights.linears))
            downs = [part.contiguous() for part in parts]
        made = []
        for linear, A, R in zip(weights.linears, downs[::2], downs[1::2], strict=True):
            ups: tuple[Tensor, ...] = ()
            if A is not None:
                # The store has s in B, the released code beside it; a power of two loses nothing.
                ups = tuple(up.contiguous() for up in (linear.up() / SCALE).to(dtype).split(rank, dim=1))
            bias = None if linear.bias is None else linear.bias.to(dtype)
            made.append(OfficialLinear(linear.base.floats(dtype), bias, A, R, ups))
        self.linears = nn.ModuleList(made)

    def forward(self, x: Tensor) -> list[Tensor]:
        """[..., K] -> one [..., N] for each linear."""
        return [linear(x) for linear in self.linears]


class FloatHead(nn.Module):
    """The head in float weights: [..., hidden] -> [..., vocab]."""

    def __init__(self, stored: Stored, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.register_buffer("W", stored.floats(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W)


class ReferenceGroup(nn.Module):
    """What a group has to compute, in float32 and without memory of its own: weights are drawn, dequantised
    and dropped at every call.
    """

    def __init__(self, model: RandomModel, layer: int, group: str) -> None:
        super().__init__()
        self.model, self.layer, self.group = model, layer, group

    def forward(self, x: Tensor) -> list[Tensor]:
        """float32 [..., K] -> one [..., N] for each linear."""
        return reference(self.model, self.model.group(self.layer, self.group), x)


class ReferenceHead(nn.Module):
    """The head in float32, drawn at every call."""

    def __init__(self, model: RandomModel, rows: int | None) -> None:
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.model.head(self.rows).floats())


def reference(model: RandomModel, weights: GroupWeights, x: Tensor) -> list[Tensor]:
    """y = W x + b + sB z of every linear, in float32."""
    zs = None
    if weights.route is not None:
        zs = list(reference_route(model, weights, x).chunk(len(weights.linears), dim=-1))
    return reference_products(weights, x, zs)


def reference_products(weights: GroupWeights, x: Tensor, zs: list[Tensor] | None) -> list[Tensor]:
    """W x + b + sB z of every linear, in float32, z given; without adapters `zs` is None."""
    out = []
    for i, linear in enumerate(weights.linears):
        y = F.linear(x.float(), linear.base.floats(), None if linear.bias is None else linear.bias.float())
        out.append(y if zs is None else y + F.linear(zs[i].float(), linear.up()))
    return out


def reference_route(model: RandomModel, weights: GroupWeights, x: Tensor) -> Tensor:
    """z float32 [..., groups*experts*rank]: for every linear, softmax(R x) outer A x."""
    assert weights.route is not None
    rank, experts = model.rank, model.n_experts
    products = F.linear(x.float(), weights.route.floats())
    zs = []
    for part in products.split(rank + experts, dim=-1):
        h, logits = part.split([rank, experts], dim=-1)
        zs.append((logits.softmax(-1)[..., :, None] * h[..., None, :]).flatten(-2))
    return torch.cat(zs, dim=-1)


def official_bytes(model: RandomModel, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of the whole decoder with its head in float weights, before anything is made."""
    shape = model.shape
    layer = shape.layer_parameters + (shape.layer_adapter_parameters if model.experts is not None else 0)
    return dtype.itemsize * (shape.layers * layer + shape.hidden + shape.vocab * shape.hidden)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected|| in float64; NaN or infinity anywhere gives infinity."""
    difference = float((found.double() - expected.double()).norm() / expected.double().norm())
    return difference if difference < float("inf") else float("inf")
