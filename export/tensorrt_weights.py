"""Low-bit weights as TensorRT wants them: the bundle's own codes and scales, K before N, two's complement.

Nothing is quantised here. A code c of the store stands for scale * (c - zero), TensorRT's for scale * c, so
codes are moved by the zero point; scales become float16, the type of the products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import BundleError
from crab_edge.lowbit import QTensor, unpack

from .graph import INT4, INT8, GraphBuilder

# TensorRT refuses scales that aren't positive; this is the smallest that float16 has.
_SMALLEST = np.float16(2.0**-24)


@dataclass(frozen=True)
class Operand:
    """A weight in a graph: names of codes [K, N] and scales [K/block, N]; K as stored, padding included."""

    codes: str
    scales: str
    k: int


def half_scales(scales: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Scales [N, blocks] as float16 [blocks, N]. BundleError for ones that float16 can't hold."""
    if not (np.isfinite(scales).all() and (scales > 0).all()):
        raise BundleError(
            f"{name}: TensorRT takes positive scales only, this weight has others; export the bundle again"
        )
    if scales.size and scales.max() > np.finfo(np.float16).max:
        raise BundleError(
            f"{name}: a scale of {scales.max():.3g} doesn't fit float16; export the bundle with a smaller "
            "--block"
        )
    return np.maximum(np.ascontiguousarray(scales.T).astype(np.float16), _SMALLEST)


def signed_codes(weight: QTensor) -> NDArray[np.int8]:
    """Codes int8 [K, N], K padded: -8..7 at 4 bits, -128..127 at 8."""
    codes = unpack(weight)
    rows = codes.shape[0]
    # uint8 arithmetic wraps to two's complement.
    moved = (codes.reshape(rows, -1) - np.uint8(weight.zero_point)).view(np.int8)
    return np.ascontiguousarray(moved.T)


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """-8..7 in any shape -> bytes, two numbers in each, the earlier one in the low half."""
    flat = codes.reshape(-1).view(np.uint8) & np.uint8(0x0F)
    if len(flat) % 2:
        flat = np.append(flat, np.uint8(0))
    return flat[0::2] | (flat[1::2] << np.uint8(4))


def write_operand(graph: GraphBuilder, name: str, weight: QTensor) -> Operand:
    """`name.weight` [K, N] as INT4 or INT8, and `name.scales` [K/block, N] as float16."""
    codes = signed_codes(weight)
    k, n = codes.shape
    graph.weight(f"{name}.scales", half_scales(weight.scales, name))
    if weight.bits == 4:
        graph.packed(f"{name}.weight", pack_int4(codes), INT4, (k, n))
    else:
        graph.packed(f"{name}.weight", codes.view(np.uint8), INT8, (k, n))
    return Operand(f"{name}.weight", f"{name}.scales", k)
