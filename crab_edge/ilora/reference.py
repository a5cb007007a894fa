"""I-LoRA in numpy and float64, written as the formula reads. Every other implementation is compared with
this one.

For x [..., K], A [r, K], R [N, K], B_i [out, r], s = alpha / r (Crab+ reference, `lora.py`; dropout is
training's):

    h = A x      g = softmax(R x)      y = W x + b + sum_i g_i (B_i h) s
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def softmax(x: ArrayLike) -> F64:
    """Softmax over the last axis."""
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def router(x: ArrayLike, R: ArrayLike) -> F64:
    """g = softmax(R x): [..., K] -> [..., N]."""
    return softmax(np.asarray(x, np.float64) @ np.asarray(R, np.float64).T)


def route(x: ArrayLike, A: Sequence[ArrayLike], R: Sequence[ArrayLike]) -> F64:
    """z of a group of linears that share x: [..., K] -> [..., groups*N*r].

    Expert-major inside a linear: z[(i*N + e)*r + j] = g_e h_j of linear i, which is what [B_0|..|B_{N-1}]
    multiplies.
    """
    x = np.asarray(x, np.float64)
    parts = []
    for a, r in zip(A, R, strict=True):
        h = x @ np.asarray(a, np.float64).T
        z = router(x, r)[..., :, None] * h[..., None, :]
        parts.append(z.reshape(*x.shape[:-1], -1))
    return np.concatenate(parts, axis=-1)


def experts(y0: ArrayLike, z: ArrayLike, B: Sequence[ArrayLike], scale: float) -> F64:
    """y0 + s [B_0|..|B_{N-1}] z: [..., out] and [..., N*r] -> [..., out]."""
    stacked = np.concatenate([np.asarray(b, np.float64) for b in B], axis=1)
    return np.asarray(y0, np.float64) + scale * (np.asarray(z, np.float64) @ stacked.T)


def ilora_linear(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    A: ArrayLike,
    R: ArrayLike,
    B: Sequence[ArrayLike],
    scale: float,
) -> F64:
    """The official formula, expert by expert in sequence: [..., K] -> [..., out]."""
    x = np.asarray(x, np.float64)
    y = x @ np.asarray(weight, np.float64).T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    h, g = x @ np.asarray(A, np.float64).T, router(x, R)
    for i, b in enumerate(B):
        y = y + g[..., i : i + 1] * (h @ np.asarray(b, np.float64).T) * scale
    return y
