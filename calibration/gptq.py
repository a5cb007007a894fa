"""Rounding with error feedback (GPTQ, Frantar et al. 2022): a column's rounding error moves the next ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crab_edge.lowbit import QTensor, pack, pad_columns

from .rtn import relative_energy, search_scales

_DAMPING = 0.01


def quantize_gptq(
    weight: NDArray[np.float32], bits: int, block: int, second_moment: NDArray[np.float32]
) -> QTensor:
    """Quantise float [N, K] so that the linear's output on its own inputs moves least.

    second_moment: float [K, K], the mean of x x^T over the calibration inputs. Columns are rounded from
    left to right; the error of one is spread over those that follow, as far as the inputs let them make up
    for it. Scales are searched as in `quantize_rtn`, on the weights as they stand when their block is
    reached. Layout, padding and range are those of `quantize_rtn` too. Raises ValueError on shapes that
    don't fit.
    """
    weight = np.asarray(weight, np.float32)
    n, k = weight.shape
    if second_moment.shape != (k, k):
        raise ValueError(f"expected a second moment [{k}, {k}], got {list(second_moment.shape)}")
    padded = pad_columns(weight, block)
    blocks = padded.shape[1]
    spread = _spread(second_moment, blocks * block)
    importance = relative_energy(np.diagonal(second_moment), blocks, block)

    zero = 1 << (bits - 1)
    rest = padded.reshape(n, -1).T.copy()  # [K, N]: what is walked along lies together
    codes = np.empty((blocks * block, n), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    for b in range(blocks):
        here, after = slice(b * block, (b + 1) * block), slice((b + 1) * block, None)
        columns, local = rest[here], spread[here, here]
        _, found = search_scales(columns.T[:, None], bits, importance[b : b + 1])
        scale = scales[:, b] = found[:, 0]
        errors = np.empty((block, n), np.float32)
        for j in range(block):
            rounded = np.clip(np.rint(columns[j] / scale), -zero, zero - 1)
            codes[b * block + j] = rounded + zero
            errors[j] = (columns[j] - rounded * scale) / local[j, j]
            columns[j + 1 :] -= local[j, j + 1 :, None] * errors[j]
        rest[after] -= spread[here, after].T @ errors
    codes = np.ascontiguousarray(codes.T)
    return pack(codes, scales, bits, block, k)


def _spread(second_moment: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """Upper Cholesky factor of the damped inverse, [width, width]; padding takes no part in it."""
    k = len(second_moment)
    full = np.eye(width)
    full[:k, :k] = second_moment
    mean = float(np.trace(full[:k, :k])) / k or 1.0
    full[np.arange(width), np.arange(width)] += _DAMPING * mean
    inverse = np.linalg.inv(full)
    return np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
