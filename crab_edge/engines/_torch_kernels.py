"""Triton kernels for what lies between a decoder's products: in a step of one token launches are what costs.

The same functions in plain torch are in `_torch_layers` and `_torch_cache.Step`; a decoder on CUDA takes
these. All launches have shapes that depend on the cache's capacity only, so a CUDA graph can hold them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from crab_edge.engines._torch_cache import Cache
    from crab_edge.engines._torch_layers import Norm, Turn

_LOG2E = 1.4426950408889634
# Cached tokens of one round; a program takes one or more rounds, so that few enough parts have to be joined.
_BLOCK, _PARTS = 64, 64
# The least that a tensor core takes at a time: heads that share keys are padded to it.
_ROWS = 16
_ELEMENTS = 1024
# Triton up to 3.9 fuses by itself, and warns that 3.10 won't.
_FUSED: Any = {"enable_fp_fusion": True}


@triton.jit
def _add_norm(residual, x, weight, total_out, out, width, epsilon, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    total = tl.load(residual + row + at, mask=inside, other=0.0)
    if ADDS:
        total += tl.load(x + row + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(total_out + row + at, total, mask=inside)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=0) / width + epsilon)
    normed = total * scale * tl.load(weight + at, mask=inside, other=0.0)
    tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    # Rounded in between, as torch does it.
    x = (x / (1.0 + tl.exp(-x))).to(out.dtype.element_ty).to(tl.float32)
    x = x * tl.load(up + row * up_stride + at, mask=inside, other=0.0)
    tl.store(out + row * width + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _turn_and_store(
    q, k, v, cos, sin, past, keys, values, out, capacity, heads, kv_heads, HALF: tl.constexpr
):
    """A program a head: q turned into `out`, k turned and v as it is into the cache."""
    head = tl.program_id(0)
    at = tl.arange(0, HALF)
    c = tl.load(cos + at)
    # The first half of `sin` has the sign turned.
    s = tl.load(sin + HALF + at)
    if head < heads:
        first = tl.load(q + head * 2 * HALF + at).to(tl.float32)
        second = tl.load(q + head * 2 * HALF + HALF + at).to(tl.float32)
        target = out + head * 2 * HALF + at
        tl.store(target, (first * c - second * s).to(out.dtype.element_ty))
        tl.store(target + HALF, (second * c + first * s).to(out.dtype.element_ty))
    else:
        row = tl.load(past)
        if head < heads + kv_heads:
            mine = head - heads
            first = tl.load(k + mine * 2 * HALF + at).to(tl.float32)
            second = tl.load(k + mine * 2 * HALF + HALF + at).to(tl.float32)
            target = keys + (mine.to(tl.int64) * capacity + row) * 2 * HALF + at
            tl.store(target, (first * c - second * s).to(keys.dtype.element_ty))
            tl.store(target + HALF, (second * c + first * s).to(keys.dtype.element_ty))
        else:
            mine = head - heads - kv_heads
            target = values + (mine.to(tl.int64) * capacity + row) * 2 * HALF + at
            tl.store(target, tl.load(v + mine * 2 * HALF + at).to(values.dtype.element_ty))
            tl.store(target + HALF, tl.load(v + mine * 2 * HALF + HALF + at).to(values.dtype.element_ty))


@triton.jit
def _attend_part(
    q,
    keys,
    values,
    past,
    tops,
    sums,
    parts,
    capacity,
    scale,
    group,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The heads of one key head over one part of the cache, softmax not yet divided: top, sum and mixture."""
    head, part, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    real = rows < group
    x = tl.load(q + (head * group + rows)[:, None] * DEPTH + columns[None, :], mask=real[:, None], other=0.0)
    begin = part * PART
    end = tl.minimum(begin + PART, (tl.load(past) + 1).to(tl.int32))
    base = head.to(tl.int64) * capacity * DEPTH
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DEPTH], tl.float32)
    for start in range(begin, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        seen = places < end
        k = tl.load(keys + base + places[None, :] * DEPTH + columns[:, None], mask=seen[None, :], other=0.0)
        scores = tl.where(seen[None, :], tl.dot(x, k) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        norm = norm * fade + tl.sum(p, axis=1)
        v = tl.load(values + base + places[:, None] * DEPTH + columns[None, :], mask=seen[:, None], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(p.to(v.dtype), v)
        top = higher
    place = (head * group + rows) * count + part
    tl.store(tops + place, top, mask=real)
    tl.store(sums + place, norm, mask=real)
    tl.store(parts + place[:, None] * DEPTH + columns[None, :], mixed, mask=real[:, None])


@triton.jit
def _join_parts(tops, sums, parts, out, count, WIDE: tl.constexpr, DEPTH: tl.constexpr):
    head = tl.program_id(0)
    at, columns = tl.arange(0, WIDE), tl.arange(0, DEPTH)
    inside = at < count
    top = tl.load(tops + head * count + at, mask=inside, other=float("-inf"))
    weight = tl.exp2(top - tl.max(top, axis=0))
    total = tl.sum(weight * tl.load(sums + head * count + at, mask=inside, other=0.0), axis=0)
    each = tl.load(
        parts + (head * count + at)[:, None] * DEPTH + columns[None, :], mask=inside[:, None], other=0.0
    )
    mixed = tl.sum(each * weight[:, None], axis=0) / total
    tl.store(out + head * DEPTH + columns, mixed.to(out.dtype.element_ty))


def add_norm(norm: Norm, residual: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `_torch_layers.add_norm`."""
    rows, width = residual.shape
    out = torch.empty(rows, width, dtype=norm.dtype, device=residual.device)
    total = residual if x is None else torch.empty_like(residual)
    block = triton.next_power_of_2(width)
    _add_norm[(rows,)](
        residual,
        residual if x is None else x,
        norm.weight,
        total,
        out,
        width,
        norm.epsilon,
        ADDS=x is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
        **_FUSED,
    )
    return total, out


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `_torch_layers.silu_mul`; both may be columns of wider matrices."""
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    grid = (rows, triton.cdiv(width, _ELEMENTS))
    _silu_mul[grid](gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=_ELEMENTS, **_FUSED)
    return out


class FastStep:
    """`_torch_cache.Step` in three launches: turn and store, attend to parts of the cache, join the parts.

    It reads the tokens that are there, not the whole capacity. Depths are powers of two from 16 on.
    """

    def __init__(self, cache: Cache, past: Tensor) -> None:
        self._cache, self._past = cache, past

    @staticmethod
    def takes(depth: int) -> bool:
        """Whether heads of this depth can be run."""
        return depth >= _ROWS and depth & (depth - 1) == 0

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, turned: Turn, scale: float) -> Tensor:
        """q [1, heads, depth], k and v [1, kv_heads, depth], not turned -> [1, heads*depth]."""
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        heads, depth = q.shape[1:]
        kv_heads, capacity, _ = keys.shape
        turned_q = torch.empty_like(q)
        _turn_and_store[(heads + 2 * kv_heads,)](
            q,
            k,
            v,
            *turned,
            self._past,
            keys,
            values,
            turned_q,
            capacity,
            heads,
            kv_heads,
            HALF=depth // 2,
            num_warps=1,
            **_FUSED,
        )
        part = max(_BLOCK, triton.next_power_of_2(triton.cdiv(capacity, _PARTS)))
        count = triton.cdiv(capacity, part)
        tops, sums = torch.empty(2, heads, count, dtype=torch.float32, device=q.device)
        parts = torch.empty(heads, count, depth, dtype=torch.float32, device=q.device)
        group = heads // kv_heads
        _attend_part[(kv_heads, count)](
            turned_q,
            keys,
            values,
            self._past,
            tops,
            sums,
            parts,
            capacity,
            scale * _LOG2E,
            group,
            PART=part,
            ROWS=max(_ROWS, triton.next_power_of_2(group)),
            DEPTH=depth,
            BLOCK=_BLOCK,
            num_stages=2,
            **_FUSED,
        )
        out = torch.empty(1, heads * depth, dtype=q.dtype, device=q.device)
        wide = triton.next_power_of_2(count)
        _join_parts[(heads,)](tops, sums, parts, out, count, WIDE=wide, DEPTH=depth, **_FUSED)
        return out
