"""Launches of the Triton kernels on torch tensors: what the operators of `torch_ops` do on CUDA.

With TRITON_INTERPRET=1 set before Triton is imported they take CPU tensors, which is how tests run them.
Shapes are checked by the operators; here nothing depends on values, nothing waits for the device, and the
only allocation is the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..errors import CrabError
from . import triton_tiles
from .triton_kernels import experts_kernel, linear_kernel, route_kernel

# The interpreter has no inline assembly.
_ASM = not triton.knobs.runtime.interpret
# A tile may begin before the end and reach beyond it, masked: so much stays free.
_OFFSETS = (1 << 31) - (1 << 24)


def linear(
    x: Tensor,
    z: Tensor | None,
    q: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    planes: int,
    bias: Tensor | None,
    rows: Sequence[int] | None = None,
    beside: tuple[Tensor, Tensor, int, int] | None = None,
) -> Tensor:
    """`crab::lowbit_linear`, and with `beside` (codes, scales, bits, block) `crab::lowbit_linear_experts`."""
    x, m = _matrix(x)
    n, k1 = q.shape[0], x.shape[-1]
    splits = tuple(itertools.accumulate(rows))[:-1] if rows else ()
    z2, k2 = (None, 0) if z is None else (_matrix(z)[0], z.shape[-1] // (len(splits) + 1))
    q_e, s_e, bits_e, block_e = beside or (None, None, 0, 16)
    tile = triton_tiles.linear_tile(m, n, q.shape[1] * block, bits, block, splits, (bits_e, block_e))
    first, second = (*splits, 0, 0)[:2]
    y = x.new_empty((*x.shape[:-1], n))
    _check_sizes(m, max(n, _stride(x), _stride(z2)), q, q_e)
    if m:
        linear_kernel[_grid(m, tile.columns, n, tile.rows)](
            x, z2, q, _columns_first(scales), q_e, None if s_e is None else _columns_first(s_e), bias, m, y,
            N=n, K1=k1, K2=k2, XS=_stride(x), ZS=_stride(z2), PLANES=planes, SPLIT0=first, SPLIT1=second,
            BITS=bits, BLOCK=block, C=tile.chunk,
            BITS_E=bits_e, BLOCK_E=block_e, C_E=triton_tiles.chunk_bytes(bits_e or 8, block_e),
            **_common(tile, "BN"),
        )  # fmt: skip
    return y


def experts(y0: Tensor, z: Tensor, q: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """`crab::ilora_experts`."""
    z, m = _matrix(z)
    n = q.shape[0]
    tile = triton_tiles.linear_tile(m, n, q.shape[1] * block, bits, block)
    y0 = y0.contiguous()
    y = y0.new_empty(y0.shape)
    _check_sizes(m, max(n, _stride(z)), q)
    if m:
        experts_kernel[_grid(m, tile.columns, n, tile.rows)](
            y0, z, q, _columns_first(scales), m, y,
            N=n, K1=z.shape[-1], XS=_stride(z), BITS=bits, BLOCK=block, C=tile.chunk, **_common(tile, "BN"),
        )  # fmt: skip
    return y


def route(
    x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int, rank: int, experts: int, groups: int
) -> Tensor:
    """`crab::ilora_route`."""
    x, m = _matrix(x)
    k = x.shape[-1]
    tile = triton_tiles.route_tile(m, k, bits, block, rank, experts, groups)
    z = x.new_empty((*x.shape[:-1], groups * experts * rank))
    _check_sizes(m, max(_stride(x), z.shape[-1]), q)
    if m:
        route_kernel[(triton.cdiv(m, tile.columns), groups * triton.cdiv(rank, tile.down))](
            x, q, _columns_first(scales), m, z,
            K1=k, XS=_stride(x), RANK=rank, EXPERTS=experts, GROUPS=groups, BITS=bits, BLOCK=block,
            C=tile.chunk, BA=tile.down, **_common(tile, "BT"),
        )  # fmt: skip
    return z


def _common(tile: triton_tiles.Tile, rows: str) -> dict[str, int | bool]:
    return {
        rows: tile.rows,
        "BM": tile.columns,
        "KS": tile.chunks,
        "STAGES": tile.stages,
        "ASM": _ASM,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        # Triton up to 3.9 does so by itself, 3.10 no longer; kernels compiled ahead of time do too.
        "enable_fp_fusion": True,
    }


def _grid(m: int, columns: int, n: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(m, columns), triton.cdiv(n, rows)


def _matrix(x: Tensor) -> tuple[Tensor, int]:
    """x with its rows at one distance and its columns side by side, and how many rows it has."""
    if _ASM and x.dtype not in (torch.float16, torch.bfloat16):
        raise CrabError(f"activations on CUDA are {x.dtype}, expected float16 or bfloat16")
    rows = x.shape[:-1].numel()
    if x.dim() != 2 or x.stride(1) != 1:
        x = x.contiguous()
    return x, rows


def _stride(x: Tensor | None) -> int:
    if x is None:
        return 0
    # One row has no distance to the next: a constant keeps slices and whole tensors on one kernel.
    return x.shape[-1] if x.shape[:-1].numel() == 1 else x.stride(-2)


def _check_sizes(rows: int, width: int, *codes: Tensor | None) -> None:
    """CrabError where the kernels' 32-bit offsets wouldn't reach the end of an operand."""
    largest = max(rows * width, *(q.numel() for q in codes if q is not None))
    if largest >= _OFFSETS:
        raise CrabError(
            f"{rows} rows of {width} values beside codes of {[q.numel() for q in codes if q is not None]} "
            f"bytes: the kernels take less than {_OFFSETS} of either; pass fewer rows at a time"
        )


def _columns_first(scales: Tensor) -> Tensor:
    if not scales.t().is_contiguous():
        raise CrabError("scales lie row by row; make the weight with crab_edge.ilora.torch_ops.prepare")
    return scales
