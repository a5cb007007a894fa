"""Instructions of whole warps: shuffles, products on tensor cores, matrices to and from shared memory.

All take and give registers as [warps, 32] of uint32. Lane l of a warp holds of an 8x8 matrix of 16-bit
elements row l/4, columns 2(l%4) and the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.arithmetic import bits, view
from tests.ptx.parse import PtxError

Array = NDArray[Any]
_LANE = np.arange(32)
_ROW, _PAIR = _LANE // 4, _LANE % 4


def shuffle(mode: str, value: Array, by: Array, clamp: Array) -> Array:
    """shfl.sync.MODE.b32 of all 32 lanes."""
    if (clamp >> 8).any():
        raise PtxError("shuffles within parts of a warp aren't known")
    if mode == "bfly":
        source = _LANE ^ by
    elif mode == "idx":
        source = (by & 31) + 0 * _LANE
    elif mode == "down":
        source = _LANE + by
    elif mode == "up":
        source = _LANE - by
    else:
        raise PtxError(f"shfl.{mode} isn't known")
    outside = source < 0 if mode == "up" else source > (clamp & 31)
    source = np.where(outside, _LANE + 0 * source, source)
    return np.take_along_axis(value, source.astype(np.int64), 1)


def product(kind: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """mma.m16n8k16.row.col with sums in float32: a 4, b 2, c 4 registers -> 4.

    Exact products, summed in float64 and rounded once: a GPU rounds more, within what parity allows.
    """
    halves = [view(one, f"{kind}x2").astype(np.float64) for one in a]
    warps = len(a[0])
    left, right = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for i, register in enumerate(halves):
        for half in (0, 1):
            left[:, _ROW + 8 * (i % 2), 2 * _PAIR + half + 8 * (i // 2)] = register[..., half]
    for i, register in enumerate(view(one, f"{kind}x2").astype(np.float64) for one in b):
        for half in (0, 1):
            right[:, 2 * _PAIR + half + 8 * i, _ROW] = register[..., half]
    whole = left @ right
    return [
        bits(whole[:, _ROW + 8 * (i // 2), 2 * _PAIR + i % 2] + view(c[i], "f32"), "f32") for i in range(4)
    ]


def matrices_from(rows: Array, transposed: bool) -> list[Array]:
    """ldmatrix: bytes [warps, matrices, 8 rows, 16] -> a register of every lane for each matrix."""
    elements = np.ascontiguousarray(rows).view("<u2").astype(np.uint32)
    if transposed:
        elements = elements.swapaxes(2, 3)
    first, second = (elements[:, :, _ROW, 2 * _PAIR + half] for half in (0, 1))
    return [first[:, i] | second[:, i] << np.uint32(16) for i in range(rows.shape[1])]


def matrices_to(registers: list[Array], transposed: bool) -> Array:
    """stmatrix: the inverse of `matrices_from`, bytes [warps, matrices, 8 rows, 16]."""
    elements = np.zeros((len(registers[0]), len(registers), 8, 8), "<u2")
    for i, register in enumerate(registers):
        for half in (0, 1):
            elements[:, i, _ROW, 2 * _PAIR + half] = register >> np.uint32(16 * half) & 0xFFFF
    if transposed:
        elements = elements.swapaxes(2, 3)
    return np.ascontiguousarray(elements).view(np.uint8)
