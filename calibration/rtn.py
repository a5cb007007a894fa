"""Round-to-nearest in blocks, each block's scale chosen by a small search for the least squared error."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from crab_edge.lowbit import QTensor, n_blocks, pack, pad_columns

# Fractions of the block's largest magnitude that the outermost code may stand for. At 4 bits clipping the
# extremes often pays; at 8 bits the grid is so fine that it hardly ever does.
_CLIPPING = {4: np.linspace(0.60, 1.0, 17), 8: np.linspace(0.98, 1.0, 3)}
_CHUNK_WEIGHTS = 1 << 20
_THREADS = 4


def quantize_rtn(
    weight: NDArray[np.float32], bits: int, block: int, energy: NDArray[np.float32] | None = None
) -> QTensor:
    """Quantise float [N, K] to symmetric codes of `bits` (4 or 8), one positive scale per `block` weights.

    K is filled up with zeros to whole blocks. For each block the scale s minimises
    sum_k e_k (w_k - s q_k)^2 over a grid, where e = `energy` [K] is the mean square of the linear's input
    (uniform if None). Codes lie in -2^(bits-1) .. 2^(bits-1)-1; scales stay positive, as TensorRT's
    dequantisation wants them.
    Raises ValueError on shapes that don't fit, or weights that aren't finite.
    """
    if bits not in _CLIPPING:
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    weight = np.asarray(weight, np.float32)
    if weight.ndim != 2 or (energy is not None and energy.shape != weight.shape[1:]):
        raise ValueError(f"expected weights [N, K] and energy [K], got {weight.shape} and {np.shape(energy)}")
    if not np.isfinite(weight).all():
        raise ValueError("the weights hold values that aren't finite")
    n, k = weight.shape
    blocks = n_blocks(k, block)
    importance = None if energy is None else relative_energy(energy, blocks, block)

    codes = np.empty((n, blocks, block), np.uint8)
    scales = np.empty((n, blocks), np.float32)
    rows = max(1, _CHUNK_WEIGHTS // (blocks * block))

    def quantise(start: int) -> None:
        part = slice(start, start + rows)
        padded = pad_columns(weight[part], block)
        codes[part], scales[part] = search_scales(padded, bits, importance)

    # Rows don't depend on each other, and numpy lets go of the interpreter while it computes.
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for _ in pool.map(quantise, range(0, n, rows)):
            pass
    return pack(codes, scales, bits, block, k)


def relative_energy(energy: NDArray[np.float32], blocks: int, block: int) -> NDArray[np.float32]:
    """float32 [blocks, block], mean 1. Dead channels keep a little weight: another input may wake them."""
    mean = float(energy.mean())
    relative = energy / mean if mean > 0 else np.ones_like(energy)
    out = np.ones(blocks * block, np.float32)
    out[: len(energy)] = relative + 1e-3
    return out.reshape(blocks, block)


def search_scales(
    weight: NDArray[np.float32], bits: int, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes uint8 (with zero point) and scales [n, blocks] for float32 [n, blocks, block]."""
    zero = 1 << (bits - 1)
    largest = np.abs(weight).max(axis=-1)
    positive = weight.max(axis=-1)
    # Codes reach one step further below zero than above, so the largest negative weight may take -2^(bits-1).
    outermost = np.where(positive >= largest, zero - 1, zero)
    full = np.where(largest > 0, largest / outermost, 1.0).astype(np.float32)

    best_error = np.full(full.shape, np.inf, np.float32)
    best_scale = full.copy()
    best_codes = np.zeros(weight.shape, np.float32)

    def consider(scale: NDArray[np.float32]) -> None:
        codes = np.clip(np.rint(weight / scale[..., None]), -zero, zero - 1)
        difference = (codes * scale[..., None] - weight) ** 2
        if importance is not None:
            difference *= importance
        error = difference.sum(axis=-1)
        better = error < best_error
        best_error[better] = error[better]
        best_scale[better] = scale[better]
        best_codes[better] = codes[better]

    for fraction in _CLIPPING[bits]:
        consider(full * np.float32(fraction))
    # The scale that fits the best codes in the least-squares sense may round to better codes still.
    weighted = best_codes if importance is None else best_codes * importance
    power = (weighted * best_codes).sum(axis=-1)
    fitted = (weighted * weight).sum(axis=-1) / np.where(power > 0, power, 1)
    consider(np.where(fitted > 0, fitted, best_scale))
    return (best_codes + zero).astype(np.uint8), best_scale


def quantize_rows(table: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise an embedding [V, H] to int8 with one scale per row: rows int8 [V, H], scales float32 [V]."""
    table = np.asarray(table, np.float32)
    largest = np.abs(table).max(axis=1)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    rows = np.clip(np.rint(table / scales[:, None]), -127, 127).astype(np.int8)
    return rows, scales
