"""Runs the Triton kernels in Triton's interpreter and prints, as JSON, how far each case is from float64.

A program of its own (`test_triton.py` runs it), because TRITON_INTERPRET counts when Triton is imported.
"""

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch

from crab_edge.errors import CrabError
from crab_edge.ilora import reference, torch_ops, triton_launch
from crab_edge.lowbit import QTensor, dequantize, n_blocks, pack

rng = np.random.default_rng(0)


def weight(n, k, bits, block):
    """A random quantised weight, and the float64 matrix that it is on the device (its scales in float16)."""
    shape = (n, n_blocks(k, block), block)
    codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
    scales = rng.uniform(0.5, 2.0, shape[:2]) / (1 << (bits - 1))
    stored = pack(codes, scales.astype(np.float16).astype(np.float32), bits, block, k)
    return torch_ops.prepare(stored, "cpu"), dequantize(stored).astype(np.float64)


def joined(n, k1, k2, planes, bits, block):
    """A weight of k1 columns, then planes x k2 with every plane but the last in whole blocks."""
    return weight(n, k1 + planes * k2, bits, block)


def draw(*shape, dtype=torch.float16):
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def error(y, truth):
    """Largest difference, as a share of the largest value."""
    truth = np.asarray(truth)
    assert tuple(y.shape) == truth.shape, (y.shape, truth.shape)
    return float(np.abs(y.double().numpy() - truth).max() / np.abs(truth).max())


def plain(m, n, k, bits, block, dtype=torch.float16, lead=()):
    operand, w = weight(n, k, bits, block)
    x = draw(*lead, m, k, dtype=dtype)
    bias = draw(n, dtype=dtype)
    y = triton_launch.linear(x, None, operand.q, operand.scales, bits, block, 0, bias)
    assert y.dtype == dtype
    return error(y, x.double().numpy() @ w.T + bias.double().numpy())


def folded(m, n, k1, k2, planes, bits, block):
    operand, w = joined(n, k1, k2, planes, bits, block)
    x, z = draw(m, k1), draw(m, k2 + 16)[:, 8 : k2 + 8]
    y = triton_launch.linear(x, z, operand.q, operand.scales, bits, block, planes, None)
    return error(y, np.concatenate([x.double(), *[z.double()] * planes], axis=1) @ w.T)


def grouped(m, rows, k1, k2, planes, bits, block):
    n = sum(rows)
    operand, w = joined(n, k1, k2, planes, bits, block)
    x, z = draw(m, k1), draw(m, len(rows) * k2)
    y = triton_launch.linear(x, z, operand.q, operand.scales, bits, block, planes, None, rows)
    parts, begin = [], 0
    for i, count in enumerate(rows):
        mine = z[:, i * k2 : (i + 1) * k2].double()
        parts.append(np.concatenate([x.double(), *[mine] * planes], axis=1) @ w[begin : begin + count].T)
        begin += count
    return error(y, np.concatenate(parts, axis=1))


def beside(m, n, k, k2, form, experts_form):
    base, w = weight(n, k, *form)
    up, b = weight(n, k2, *experts_form)
    x, z, bias = draw(m, k), draw(m, k2), draw(n)
    more = (up.q, up.scales, *experts_form)
    y = triton_launch.linear(x, z, base.q, base.scales, *form, 0, bias, None, more)
    y0 = x.double().numpy() @ w.T + bias.double().numpy()
    return error(y, reference.experts(y0, z.double(), [b], 1.0))


def experts(m, n, k2, bits, block):
    operand, b = weight(n, k2, bits, block)
    y0, z = draw(m, n), draw(m, k2)
    y = triton_launch.experts(y0, z, operand.q, operand.scales, bits, block)
    return error(y, reference.experts(y0.double(), z.double(), [b], 1.0))


def route(m, k, rank, count, groups, bits, block, dtype=torch.float16):
    operand, ar = weight(groups * (rank + count), k, bits, block)
    # The router's logits should differ without one of them taking all.
    x = draw(m, k, dtype=dtype) / k**0.5
    z = triton_launch.route(x, operand.q, operand.scales, bits, block, rank, count, groups)
    rows = ar.reshape(groups, rank + count, k)
    return error(z, reference.route(x.double(), list(rows[:, :rank]), list(rows[:, rank:])))


def wrong_code():
    """The error when one code a row is off by four: the bound must be below this."""
    operand, w = weight(40, 256, 4, 128)
    x = draw(1, 256)
    operand.q[:, 0, 0] ^= 4
    y = triton_launch.linear(x, None, operand.q, operand.scales, 4, 128, 0, None)
    return error(y, x.double().numpy() @ w.T)


def float32_scales():
    """Scales beyond float16 stay float32."""
    codes = rng.integers(0, 16, (24, 2, 128), dtype=np.uint8)
    stored: QTensor = pack(codes, np.full((24, 2), 1e-9, np.float32), 4, 128, 256)
    operand = torch_ops.prepare(stored, "cpu")
    assert operand.scales.dtype == torch.float32
    x = draw(2, 256, dtype=torch.float32)
    y = triton_launch.linear(x, None, operand.q, operand.scales, 4, 128, 0, None)
    return error(y, x.double().numpy() @ dequantize(stored).astype(np.float64).T)


def too_long():
    """1 when rows beyond the kernels' 32-bit offsets are refused before anything is launched."""
    operand, _ = weight(16, 128, 4, 128)
    x = torch.empty(1, 128, dtype=torch.float16).expand(1 << 31, 128)
    y0 = torch.empty(1, dtype=torch.float16)
    try:
        triton_launch.experts(y0, x, operand.q, operand.scales, 4, 128)
    except CrabError as error:
        return float("fewer rows" in str(error))
    return 0.0


CASES = {
    "one row": lambda: plain(1, 40, 256, 4, 128),
    "five rows": lambda: plain(5, 24, 384, 4, 128),
    "leading axes": lambda: plain(3, 24, 128, 4, 64, lead=(2,)),
    "no row": lambda: float(plain_empty()),
    "prefill": lambda: plain(70, 100, 128, 4, 64),
    "block 16": lambda: plain(2, 17, 80, 4, 16),
    "block 32": lambda: plain(1, 40, 96, 4, 32),
    "block 256": lambda: plain(9, 17, 512, 4, 256),
    "8 bits, block 16": lambda: plain(3, 17, 80, 8, 16),
    "8 bits, part of a block": lambda: plain(1, 40, 300, 8, 128),
    "8 bits, vision width": lambda: plain(2, 33, 3420, 8, 128),
    "bfloat16": lambda: plain(3, 24, 256, 4, 128, torch.bfloat16),
    "two planes": lambda: folded(1, 48, 256, 128, 2, 4, 128),
    "two planes, rows": lambda: folded(6, 40, 128, 384, 2, 4, 128),
    "last plane part of a block": lambda: folded(2, 40, 256, 96, 1, 4, 128),
    "planes of block 32": lambda: folded(1, 33, 64, 96, 2, 4, 32),
    "q, k, v": lambda: grouped(1, [64, 16, 16], 128, 64, 2, 4, 64),
    "gate, up": lambda: grouped(10, [64, 64], 64, 96, 2, 4, 32),
    "experts beside": lambda: beside(1, 40, 256, 96, (4, 128), (8, 128)),
    "experts beside, rows": lambda: beside(9, 24, 96, 384, (8, 32), (4, 128)),
    "experts": lambda: experts(3, 40, 96, 8, 128),
    "experts of 4 bits": lambda: experts(1, 40, 384, 4, 128),
    "route": lambda: route(1, 300, 20, 3, 2, 8, 128),
    "route of 4 bits": lambda: route(3, 256, 16, 3, 1, 4, 128),
    "route, q k v": lambda: route(1, 96, 32, 3, 3, 8, 32),
    "route, prefill": lambda: route(70, 128, 8, 5, 1, 8, 128),
    "route, bfloat16": lambda: route(2, 128, 24, 2, 1, 8, 64, torch.bfloat16),
    "float32 scales": float32_scales,
    "a wrong code": wrong_code,
    "too long": too_long,
}


def plain_empty():
    operand, _ = weight(8, 128, 4, 128)
    x = torch.empty(0, 128, dtype=torch.float16)
    return triton_launch.linear(x, None, operand.q, operand.scales, 4, 128, 0, None).numel()


if __name__ == "__main__":
    json.dump({name: case() for name, case in CASES.items()}, sys.stdout)
