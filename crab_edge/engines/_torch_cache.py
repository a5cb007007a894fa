"""The KV cache of the torch engine, and attention over it: over a chunk, or one step with fixed shapes.

A step's shapes depend on the cache's capacity only. Where the tokens end is a number on the device, so a step
can be captured in a CUDA graph and replayed for every token that the capacity has room for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from crab_edge.engines._torch_layers import rotate

if TYPE_CHECKING:
    from crab_edge.engines._torch_layers import Turn

FIRST_CAPACITY = 1024


class Cache:
    """Keys and values of every layer, [kv_heads, capacity, depth] each. It doesn't know how much is filled.

    limit: tokens that the model can hold at most.
    """

    def __init__(
        self, layers: int, kv_heads: int, depth: int, limit: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._shape = (layers, kv_heads, 0, depth)
        self._limit = limit
        self._how = {"device": device, "dtype": dtype}
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.capacity = 0

    def bytes_for(self, capacity: int) -> int:
        """What the buffers take at this capacity."""
        layers, heads, _, depth = self._shape
        return 2 * layers * heads * capacity * depth * self._how["dtype"].itemsize

    def grown(self, total: int) -> int:
        """The capacity that holds `total` tokens: this one, or it doubled up to the limit."""
        capacity = max(FIRST_CAPACITY, self.capacity)
        while capacity < total:
            capacity *= 2
        return max(total, min(capacity, self._limit))

    def reserve(self, total: int, used: int) -> bool:
        """Room for `total` tokens, the first `used` kept; whether the buffers are others now."""
        if total <= self.capacity:
            return False
        capacity = self.grown(total)
        layers, heads, _, depth = self._shape
        # A layer at a time, so that only one is there twice. Zeros: a masked NaN would still be a NaN.
        for buffers in (self.keys, self.values):
            for i in range(layers):
                new = torch.zeros(heads, capacity, depth, **self._how)
                if used:
                    new[:, :used] = buffers[i][:, :used]
                buffers[i : i + 1] = [new]
        self.capacity = capacity
        return True


def _turned(q: Tensor, k: Tensor, turned: Turn) -> tuple[Tensor, Tensor]:
    both = rotate(torch.cat([q, k], dim=1), turned).to(q.dtype)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


class Chunk:
    """Attention of `steps` tokens that follow the cache's first `begin`."""

    def __init__(self, cache: Cache, begin: int, steps: int) -> None:
        self._cache = cache
        self._begin, self._total = begin, begin + steps
        self._mask: Tensor | None = None
        if begin:
            places = torch.arange(self._total, device=cache.keys[0].device)
            self._mask = places[None] <= places[begin:, None]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turned: Turn, scale: float) -> Tensor:
        """q [S, heads, depth], k and v [S, kv_heads, depth], not turned -> [S, heads*depth]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        q, k = _turned(q, k, turned)
        keys[:, self._begin : self._total] = k.transpose(0, 1)
        values[:, self._begin : self._total] = v.transpose(0, 1)
        times = q.shape[1] // keys.shape[0]
        k, v = (
            part[:, : self._total].to(q.dtype).repeat_interleave(times, dim=0)[None]
            for part in (keys, values)
        )
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=self._mask, is_causal=self._mask is None, scale=scale
        )
        return out[0].transpose(0, 1).flatten(1)


class Step:
    """Attention of one token behind `past` tokens, an int64 [1] on the device: no shape depends on it."""

    def __init__(self, cache: Cache, past: Tensor) -> None:
        self._cache, self._past = cache, past
        self._mask = torch.arange(cache.capacity, device=past.device)[None] <= past

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turned: Turn, scale: float) -> Tensor:
        """As `Chunk`, for S = 1."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        q, k = _turned(q, k, turned)
        keys.index_copy_(1, self._past, k.transpose(0, 1).to(keys.dtype))
        values.index_copy_(1, self._past, v.transpose(0, 1).to(values.dtype))
        # Heads that share keys are the rows of one attention, so that nothing has to be repeated.
        rows = q.reshape(1, keys.shape[0], -1, q.shape[2])
        k, v = keys[None].to(q.dtype), values[None].to(q.dtype)
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=self._mask, scale=scale).reshape(1, -1)
