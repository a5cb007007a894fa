"""Random decoder weights for `bench --gpu`: drawn on the device from a seed, every layer with its own bytes.

All contenders of one form compute the same function: the official formula's bf16 weights are the low-bit
ones, dequantised. The layout is that of `crab_edge.lowbit`, with torch tensors on the device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from crab_edge.errors import InputError
from crab_edge.shape import ModelShape
from crab_edge.sizes import PLANES, WeightRecipe, recipe_for

#: Linears that share an input, in the decoder's order.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("q", "k", "v"),
    "o": ("o",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}
#: Crab+'s alpha / r; the store has it in B.
SCALE = 2.0
# Weights that are dequantised at a time.
_PART = 1 << 24


@dataclass(frozen=True)
class Stored:
    """A quantised matrix on a device: q uint8 [N, blocks, block*bits/8], scales float32 [N, blocks]."""

    q: Tensor
    scales: Tensor
    bits: int
    block: int
    shape: tuple[int, int]

    def floats(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix [N, K], dequantised in float32, then cast."""
        n, k = self.shape
        out = torch.empty(n, k, dtype=dtype, device=self.q.device)
        # In parts: the whole of a head, with its codes spread out, would be gigabytes.
        rows = max(1, _PART // k)
        for begin in range(0, n, rows):
            codes = self.q[begin : begin + rows]
            if self.bits == 4:
                codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(2)
            scales = self.scales[begin : begin + rows, :, None].float()
            values = (codes.float() - (1 << (self.bits - 1))) * scales
            out[begin : begin + rows] = values.flatten(1)[:, :k]
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.q.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class LinearWeights:
    """One linear: base W [N, K], bias [N] float32 or None, and the experts' sB [N, experts*rank].

    `planes` are sB's residual 4-bit planes (folded forms) or one 8-bit matrix (unfolded8); empty without an
    adapter.
    """

    base: Stored
    bias: Tensor | None
    planes: tuple[Stored, ...]

    def up(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """sB [N, experts*rank]: the sum of its planes."""
        total = self.planes[0].floats()
        for plane in self.planes[1:]:
            total += plane.floats()
        return total.to(dtype)


@dataclass(frozen=True)
class GroupWeights:
    """Linears of one input: `route` is AR [groups*(rank+experts), K] (A_0, R_0, A_1, ...), None without
    adapters.
    """

    route: Stored | None
    linears: tuple[LinearWeights, ...]


@dataclass(frozen=True)
class RandomModel:
    """Where a decoder's random weights come from: each call draws the same ones again.

    experts: a form of `FORMS`, or None for a decoder without adapters (whose base weights are the same).
    """

    shape: ModelShape
    recipe: WeightRecipe
    experts: str | None
    device: torch.device
    seed: int = 0

    @property
    def rank(self) -> int:
        return self.shape.adapter.rank if self.shape.adapter else 0

    @property
    def n_experts(self) -> int:
        return self.shape.adapter.experts if self.shape.adapter else 0

    @cached_property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(N, K) of a layer's linears by name."""
        return {name: (n, k) for name, n, k in self.shape.decoder_linears}

    def group(self, layer: int, group: str) -> GroupWeights:
        """The weights of one group of linears of one layer."""
        names, low = GROUPS[group], self.recipe
        k = self.widths[names[0]][1]
        route = None
        if self.experts is not None:
            rows = len(names) * (self.rank + self.n_experts)
            bits = low.adapter_bits
            route = self._draw(f"{layer}.{group}.route", rows, k, bits, low.block_of(bits))
        return GroupWeights(route, tuple(self._linear(f"{layer}.{name}", name) for name in names))

    def head(self, rows: int | None = None) -> Stored:
        """The head [vocab, hidden] at the recipe's bits for it, or one of `rows` rows."""
        bits, rows = self.recipe.head_bits, rows or self.shape.vocab
        return self._draw(f"head.{rows}", rows, self.shape.hidden, bits, self.recipe.block_of(bits))

    def cache(self, slots: int) -> Iterator[Tensor]:
        """Keys and values of every layer, float32 [2, kv_heads, slots, head_dim]."""
        size = (2, self.shape.kv_heads, slots, self.shape.head_dim)
        for layer in range(self.shape.layers):
            yield torch.randn(size, device=self.device, generator=self._generator(f"cache.{layer}"))

    def hidden(self, tokens: int, name: str = "x", width: int | None = None) -> Tensor:
        """Activations float32 [tokens, width or hidden], about standard normal."""
        size = (tokens, width or self.shape.hidden)
        return torch.randn(size, generator=self._generator(name), device=self.device)

    def _linear(self, path: str, name: str) -> LinearWeights:
        n, k = self.widths[name]
        low = self.recipe
        bias = None
        if name in ("q", "k", "v"):
            bias = 0.02 * torch.randn(n, generator=self._generator(f"{path}.bias"), device=self.device)
        planes: tuple[Stored, ...] = ()
        if self.experts is not None:
            inner, bits = self.rank * self.n_experts, low.bits
            if self.experts not in PLANES:
                bits = low.adapter_bits
            planes = tuple(
                # A second plane holds what the first one rounded off.
                self._draw(
                    f"{path}.{self.experts}.{i}", n, inner, bits, low.block_of(bits), 2.0 ** (-bits * i)
                )
                for i in range(PLANES.get(self.experts, 1))
            )
        return LinearWeights(self._draw(path, n, k, low.bits, low.block), bias, planes)

    def _draw(self, name: str, n: int, k: int, bits: int, block: int, size: float = 1.0) -> Stored:
        generator = self._generator(name)
        blocks = -(-k // block)
        q = torch.randint(
            0,
            256,
            (n, blocks, block * bits // 8),
            dtype=torch.uint8,
            device=self.device,
            generator=generator,
        )
        # Codes are uniform with a deviation of 2^bits / sqrt(12): outputs stay near 1.
        scale = size * math.sqrt(12.0 / k) / 2**bits
        scales = (
            torch.rand(n, blocks, device=self.device, generator=generator).mul_(0.2).add_(0.9).mul_(scale)
        )
        if k % block:
            _clear_padding(q, k, bits, block)
        return Stored(q, scales, bits, block, (n, k))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}.{name}".encode()).digest()
        return torch.Generator(self.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def random_model(
    shape: ModelShape,
    experts: str | None,
    device: torch.device,
    *,
    block: int | None = None,
    seed: int = 0,
) -> RandomModel:
    """A model of `shape` at 4 bits; block None: 128 where the widths allow it, else 32.

    InputError for a form that the shape's widths don't allow.
    """
    if shape.adapter is None:
        raise InputError(f"{shape.name}: has no adapter to measure")
    inner = shape.adapter.rank * shape.adapter.experts
    widths = (shape.hidden, shape.heads * shape.head_dim, shape.intermediate, inner)
    block = block or (128 if not any(width % 128 for width in widths) else 32)
    uneven = sorted({width for width in widths if width % block})
    if experts in PLANES and uneven:
        raise InputError(
            f"--experts {experts} needs widths that are multiples of the block {block}, but {shape.name} has "
            f"{', '.join(map(str, uneven))}; choose --experts unfolded8 or another --block"
        )
    recipe = recipe_for(shape, 4, block, experts or "auto")
    return RandomModel(shape, recipe, experts, device, seed)


def _clear_padding(q: Tensor, k: int, bits: int, block: int) -> None:
    """Sets the codes behind column k to the code of 0, as the store has them."""
    rest = k % block
    last = q[:, -1]
    if bits == 8:
        last[:, rest:] = 128
        return
    if rest % 2:
        last[:, rest // 2] = (last[:, rest // 2] & 15) | 0x80
    last[:, (rest + 1) // 2 :] = 0x88
