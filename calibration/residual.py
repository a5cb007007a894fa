"""A weight as two low-bit planes, B ~ P1 + P2, where P2 holds what P1's rounding left."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from crab_edge.lowbit import QTensor, dequantize

from .rtn import quantize_rtn


def quantize_planes(weight: NDArray[np.float32], bits: int, block: int, planes: int = 2) -> list[QTensor]:
    """Quantise float [N, K] as a sum of `planes` tensors in the same layout.

    Two planes of 4 bits come close to one of 8: the product `[P1 | P2] [z ; z]` stays a single 4-bit
    product, so the planes can join another 4-bit weight along K.
    """
    rest = np.asarray(weight, np.float32)
    out = []
    for _ in range(planes):
        plane = quantize_rtn(rest, bits, block)
        rest = rest - dequantize(plane)
        out.append(plane)
    return out
