"""Blockwise low-bit weights in the layout of ONNX Runtime's MatMulNBits: the project's one store of
weights.

A weight W [N, K] is cut along K into blocks of `block` columns; every block of a row has one float32 scale
and W = scale * (code - 2^(bits-1)), codes in 0 .. 2^bits - 1. K is padded to whole blocks. With 4 bits a
byte holds two neighbours in K, the earlier one in its low half. How codes and scales are chosen is
calibration's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import CrabError

BITS = (4, 8)
BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class QTensor:
    """A quantised matrix: `q` uint8 [N, K/block, block*bits/8], `scales` float32 [N, K/block] (K padded)."""

    q: NDArray[np.uint8]
    scales: NDArray[np.float32]
    bits: int
    block: int
    shape: tuple[int, int]
    """(N, K) of the matrix itself, without padding."""

    def __post_init__(self) -> None:
        _check(self.bits, self.block)
        rows, blocks = self.shape[0], n_blocks(self.shape[1], self.block)
        expected = (rows, blocks, self.block * self.bits // 8)
        if self.q.dtype != np.uint8 or self.q.shape != expected:
            raise CrabError(f"quantised weight is {self.q.dtype} {self.q.shape}, expected uint8 {expected}")
        if self.scales.dtype != np.float32 or self.scales.shape != (rows, blocks):
            raise CrabError(
                f"scales are {self.scales.dtype} {self.scales.shape}, expected float32 {(rows, blocks)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.q.nbytes + self.scales.nbytes

    @property
    def zero_point(self) -> int:
        """The code that stands for 0."""
        return 1 << (self.bits - 1)


def n_blocks(K: int, block: int) -> int:
    """Blocks along K, the last one padded."""
    return -(-K // block)


def pad_columns(w: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """[N, K] -> [N, blocks, block] with zeros behind column K."""
    rows, columns = w.shape
    blocks = n_blocks(columns, block)
    out = np.zeros((rows, blocks * block), w.dtype)
    out[:, :columns] = w
    return out.reshape(rows, blocks, block)


def pack(codes: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, block: int, K: int) -> QTensor:
    """Codes uint8 [N, blocks, block] (or [N, blocks*block]) and scales [N, blocks] -> a QTensor of N x K.

    The codes behind column K become the zero point, whatever they were: padding is exactly zero.
    """
    _check(bits, block)
    if codes.dtype != np.uint8 or (bits < 8 and codes.size and codes.max() >= 1 << bits):
        raise CrabError(
            f"codes for {bits} bits must be uint8 below {1 << bits}, got {codes.dtype} up to {codes.max()}"
        )
    rows, blocks = codes.shape[0], n_blocks(K, block)
    if codes.size != rows * blocks * block:
        raise CrabError(
            f"codes have shape {codes.shape}, expected {(rows, blocks, block)} for K={K}, block={block}"
        )
    flat = codes.reshape(rows, blocks * block).copy()
    flat[:, K:] = 1 << (bits - 1)
    q = flat if bits == 8 else flat[:, 0::2] | (flat[:, 1::2] << 4)
    return QTensor(
        np.ascontiguousarray(q.reshape(rows, blocks, block * bits // 8)),
        np.ascontiguousarray(scales, dtype=np.float32).reshape(rows, blocks),
        bits,
        block,
        (rows, K),
    )


def unpack(t: QTensor) -> NDArray[np.uint8]:
    """The codes, uint8 [N, blocks, block], padding included."""
    rows, blocks = t.scales.shape
    if t.bits == 8:
        return t.q.reshape(rows, blocks, t.block)
    out = np.empty((rows, blocks, t.block), np.uint8)
    out[..., 0::2] = t.q & 0x0F
    out[..., 1::2] = t.q >> 4
    return out


def dequantize(t: QTensor) -> NDArray[np.float32]:
    """The matrix, float32 [N, K]."""
    values = (unpack(t).astype(np.float32) - np.float32(t.zero_point)) * t.scales[..., None]
    return np.ascontiguousarray(values.reshape(t.shape[0], -1)[:, : t.shape[1]])


def _check(bits: int, block: int) -> None:
    if bits not in BITS or block not in BLOCKS:
        raise CrabError(
            f"weights of {bits} bits in blocks of {block} aren't supported: expected {BITS}, {BLOCKS}"
        )
