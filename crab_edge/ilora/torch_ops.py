"""Low-bit products and I-LoRA as torch operators: exact in torch on CPU, Triton kernels on CUDA.

    crab::ilora_route             z = flatten(softmax(R x) outer (A x)) of a group of linears
    crab::lowbit_linear           y = [W | planes of sB] [x ; z ; ..] + b, nothing concatenated
    crab::ilora_experts           y = y0 + sB z
    crab::lowbit_linear_experts   y = W x + sB z + b, two weights of their own bits in one launch

All take weights as `prepare` returns them, activations float16 or bfloat16 (float32 on CPU too) with any
leading axes as rows M, and give the activations' dtype. They have fake kernels and fixed launches, so that
torch.compile and CUDA graphs can hold them. Inference only: no gradients.

The layout that `prepare` makes of a `crab_edge.lowbit.QTensor` (`gpu_layout` is the same in numpy):
- q uint8 [N, K/block, block*bits/8], K padded to whole blocks. 4 bits: byte j of a block
  holds column j in its low half and column j + block/2 in its high half, so that both halves meet
  neighbouring activations. 8 bits: as stored.
- scales [N, K/block], in memory column by column (strides 1, N): the rows of a tile lie side by side.
  float16, or float32 where float16 would lose more than half a unit of the row's largest scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import CrabError, DependencyError
from ..lowbit import QTensor, n_blocks

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Layout(NamedTuple):
    """A weight as the kernels read it; see the module."""

    q: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.float32]


@dataclass(frozen=True)
class GpuWeight:
    """Operands of one low-bit weight on a device; `shape` is (N, K) without padding."""

    q: Tensor
    scales: Tensor
    bits: int
    block: int
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: what a product has to read."""
        return self.q.nbytes + self.scales.nbytes


def gpu_layout(t: QTensor) -> Layout:
    """Codes [N, K/block, block*bits/8] and scales [K/block, N] (transposed, contiguous) for the kernels."""
    q = split_halves(_tensor(t.q), t.block).numpy() if t.bits == 4 else t.q
    return Layout(np.ascontiguousarray(q), np.ascontiguousarray(_scales(t).T))


def prepare(t: QTensor, device: torch.device | str) -> GpuWeight:
    """The weight as `gpu_layout` has it, on `device`, where the codes are put in order: a GPU does so at the
    speed of its memory, one core at a hundredth of it.
    """
    q = _tensor(t.q).to(device)
    q = split_halves(q, t.block) if t.bits == 4 else q
    scales = torch.from_numpy(np.ascontiguousarray(_scales(t).T)).to(device).t()
    return GpuWeight(q.contiguous(), scales, t.bits, t.block, t.shape)


def split_halves(q: Tensor, block: int) -> Tensor:
    """4-bit codes [N, K/block, block/2]: bytes of two neighbours -> bytes of one code from each half of the
    block, the earlier half's in the low bits.
    """
    codes = torch.stack((q & 15, q >> 4), dim=-1).flatten(2)
    return codes[..., : block // 2] | (codes[..., block // 2 :] << 4)


def _scales(t: QTensor) -> NDArray[np.floating]:
    """[N, K/block]: float16, or float32 where a row would lose more than 2^-11 of its largest scale."""
    with np.errstate(over="ignore"):
        half = t.scales.astype(np.float16)
    lost = np.abs(half.astype(np.float32) - t.scales).max(axis=1, initial=0)
    fits = (lost <= t.scales.max(axis=1, initial=0) * 2.0**-11).all()
    return half if fits else t.scales


def _tensor(array: NDArray[Any]) -> Tensor:
    """The array as a tensor; mapped files are read-only, and torch would warn of that."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def dequantize(q: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """The matrix that a prepared weight stands for, float32 [N, K/block * block]."""
    codes = torch.cat([q & 15, q >> 4], dim=-1) if bits == 4 else q
    values = (codes.float() - (1 << (bits - 1))) * scales.float().unsqueeze(-1)
    return values.flatten(1)


@torch.library.custom_op("crab::ilora_route", mutates_args=(), device_types="cpu")
def ilora_route(
    x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int, rank: int, experts: int, groups: int
) -> Tensor:
    """x [.., K], AR [groups*(rank+experts), K] -> z [.., groups*experts*rank], softmax in float32."""
    _check_route(x, q, scales, bits, block, rank, experts, groups)
    products = _product(x, dequantize(q, scales, bits, block)).unflatten(-1, (groups, rank + experts))
    h, logits = products.split([rank, experts], dim=-1)
    weights = torch.softmax(logits, dim=-1)
    return (weights.unsqueeze(-1) * h.unsqueeze(-2)).flatten(-3).to(x.dtype)


@torch.library.custom_op("crab::lowbit_linear", mutates_args=(), device_types="cpu")
def lowbit_linear(
    x: Tensor,
    z: Tensor | None,
    q: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    planes: int,
    bias: Tensor | None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    """`[W | planes of sB] [x ; z ..] + b`: x [.., K1], z [.., K2] or None (planes 0) -> y [.., N].

    With z, K1 is whole blocks; with two planes K2 is too, with one its last block may be padded.

    rows: how many rows of the weight belong to each of two or three linears of one input that were stacked
    (q, k and v; gate and up) into one launch; z [.., linears*K2] then has theirs side by side, and each
    linear must begin at a multiple of 16.
    """
    linears = len(rows or (0,))
    _check_folded(x, z, q, scales, bits, block, planes, linears)
    _check_rows(rows, q, z)
    _check_bias(bias, q)
    weight = dequantize(q, scales, bits, block)
    if z is None:
        y = _product(x, weight)
    else:
        parts = zip(z.chunk(linears, dim=-1), weight.split(list(rows or weight.shape[:1])), strict=True)
        y = torch.cat([_product(torch.cat([x] + [one] * planes, dim=-1), w) for one, w in parts], dim=-1)
    return (y if bias is None else y + bias.float()).to(x.dtype)


@torch.library.custom_op("crab::ilora_experts", mutates_args=(), device_types="cpu")
def ilora_experts(y0: Tensor, z: Tensor, q: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    """y0 [.., N] + sB z, z [.., K2] -> y [.., N]."""
    _check_experts(y0, z, q, scales, bits, block)
    return (y0.float() + _product(z, dequantize(q, scales, bits, block))).to(y0.dtype)


@torch.library.custom_op("crab::lowbit_linear_experts", mutates_args=(), device_types="cpu")
def lowbit_linear_experts(
    x: Tensor,
    z: Tensor,
    q: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    q_experts: Tensor,
    scales_experts: Tensor,
    bits_experts: int,
    block_experts: int,
    bias: Tensor | None,
) -> Tensor:
    """`W x + sB z + b` with W and sB of their own bits and blocks: x [.., K1], z [.., K2] -> y [.., N]."""
    _check(x, q, scales, bits, block, "x")
    _check_bias(bias, q)
    _check_beside(x, z, q, q_experts, scales_experts, bits_experts, block_experts)
    y = _product(x, dequantize(q, scales, bits, block))
    y = y + _product(z, dequantize(q_experts, scales_experts, bits_experts, block_experts))
    return (y if bias is None else y + bias.float()).to(x.dtype)


@ilora_route.register_fake
def _(x, q, scales, bits, block, rank, experts, groups):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], groups * experts * rank))


@lowbit_linear.register_fake
def _(x, z, q, scales, bits, block, planes, bias, rows=None):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@ilora_experts.register_fake
def _(y0, z, q, scales, bits, block):  # type: ignore[no-untyped-def]
    return torch.empty_like(y0, memory_format=torch.contiguous_format)


@lowbit_linear_experts.register_fake
def _(  # type: ignore[no-untyped-def]
    x, z, q, scales, bits, block, q_experts, scales_experts, bits_experts, block_experts, bias
):
    return x.new_empty((*x.shape[:-1], q.shape[0]))


@ilora_route.register_kernel("cuda")
def _(
    x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int, rank: int, experts: int, groups: int
) -> Tensor:
    _check_route(x, q, scales, bits, block, rank, experts, groups)
    return _launch("route", x, q, scales, bits, block, rank, experts, groups)


@lowbit_linear.register_kernel("cuda")
def _(
    x: Tensor,
    z: Tensor | None,
    q: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    planes: int,
    bias: Tensor | None,
    rows: Sequence[int] | None = None,
) -> Tensor:
    _check_folded(x, z, q, scales, bits, block, planes, len(rows or (0,)))
    _check_rows(rows, q, z)
    _check_bias(bias, q)
    return _launch("linear", x, z, q, scales, bits, block, planes, bias, rows)


@ilora_experts.register_kernel("cuda")
def _(y0: Tensor, z: Tensor, q: Tensor, scales: Tensor, bits: int, block: int) -> Tensor:
    _check_experts(y0, z, q, scales, bits, block)
    return _launch("experts", y0, z, q, scales, bits, block)


@lowbit_linear_experts.register_kernel("cuda")
def _(
    x: Tensor,
    z: Tensor,
    q: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    q_experts: Tensor,
    scales_experts: Tensor,
    bits_experts: int,
    block_experts: int,
    bias: Tensor | None,
) -> Tensor:
    _check(x, q, scales, bits, block, "x")
    _check_bias(bias, q)
    _check_beside(x, z, q, q_experts, scales_experts, bits_experts, block_experts)
    beside = (q_experts, scales_experts, bits_experts, block_experts)
    return _launch("linear", x, z, q, scales, bits, block, 0, bias, None, beside)


def _launch(name: str, first: Tensor, *arguments: object) -> Tensor:
    """Calls a function of `triton_launch`, imported when the first CUDA tensor comes."""
    try:
        from . import triton_launch
    except ImportError as error:
        raise DependencyError(
            f"low-bit products on CUDA need triton ({error}); run `pip install 'crab-edge[cuda]'`"
        ) from None
    function: Callable[..., Tensor] = getattr(triton_launch, name)
    # Triton launches on the thread's current device, whatever the tensors' is.
    with torch.cuda.device(first.device):
        return function(first, *arguments)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., K] times weight^T in float32, x padded to the weight's columns."""
    return torch.nn.functional.pad(x.float(), (0, weight.shape[1] - x.shape[-1])) @ weight.t()


def _check(x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int, name: str) -> None:
    """CrabError unless codes, scales and the width of x belong together."""
    _check_operands(x, q, scales, bits, block)
    if n_blocks(x.shape[-1], block) != q.shape[1]:
        raise CrabError(
            f"{name} has {x.shape[-1]} columns, expected {q.shape[1]} blocks of {block} (see prepare)"
        )


def _check_route(
    x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int, rank: int, experts: int, groups: int
) -> None:
    if q.shape[0] != groups * (rank + experts):
        raise CrabError(f"route has {q.shape[0]} rows, expected {groups} x ({rank} + {experts})")
    _check(x, q, scales, bits, block, "x")


def _check_experts(y0: Tensor, z: Tensor, q: Tensor, scales: Tensor, bits: int, block: int) -> None:
    _check(z, q, scales, bits, block, "z")
    if y0.shape != (*z.shape[:-1], q.shape[0]):
        raise CrabError(f"y0 is {tuple(y0.shape)}, expected {(*z.shape[:-1], q.shape[0])}")


def _check_beside(
    x: Tensor, z: Tensor, q: Tensor, q_experts: Tensor, scales: Tensor, bits: int, block: int
) -> None:
    _check(z, q_experts, scales, bits, block, "z")
    if z.shape[:-1] != x.shape[:-1] or len(q_experts) != len(q):
        raise CrabError(
            f"z {tuple(z.shape)} and {len(q_experts)} rows of experts don't belong to x {tuple(x.shape)} and "
            f"{len(q)} rows"
        )


def _check_bias(bias: Tensor | None, q: Tensor) -> None:
    if bias is not None and (bias.shape != q.shape[:1] or not bias.is_contiguous()):
        raise CrabError(f"bias is {tuple(bias.shape)}, expected {(len(q),)}, contiguous")


def _check_rows(rows: Sequence[int] | None, q: Tensor, z: Tensor | None) -> None:
    if rows is None:
        return
    begins = list(itertools.accumulate(rows))
    if sum(rows) != q.shape[0] or not 2 <= len(rows) <= 3 or z is None:
        raise CrabError(f"rows are {list(rows)} of {q.shape[0]}, expected those of 2 or 3 linears, and a z")
    if any(begin % 16 for begin in begins[:-1]):
        raise CrabError(f"linears begin at rows {begins[:-1]}, expected multiples of 16: launch each alone")


def _check_folded(
    x: Tensor, z: Tensor | None, q: Tensor, scales: Tensor, bits: int, block: int, planes: int, linears: int
) -> None:
    if z is None:
        if planes:
            raise CrabError(f"planes is {planes} without z, expected 0")
        return _check(x, q, scales, bits, block, "x")
    _check_operands(x, q, scales, bits, block)
    k1, k2 = x.shape[-1], z.shape[-1] // linears
    if z.shape[-1] % linears:
        raise CrabError(
            f"z has {z.shape[-1]} columns, expected the same number for each of {linears} linears"
        )
    if planes < 1 or k1 % block or (planes > 1 and k2 % block):
        raise CrabError(f"x [.., {k1}] and {planes} x z [.., {k2}] don't fit blocks of {block}")
    if q.shape[1] != k1 // block + planes * n_blocks(k2, block):
        raise CrabError(f"weight has {q.shape[1]} blocks, expected those of {k1} + {planes} x {k2} columns")
    if z.shape[:-1] != x.shape[:-1] or z.dtype != x.dtype:
        raise CrabError(f"z is {z.dtype} {tuple(z.shape)}, expected rows and dtype of x {tuple(x.shape)}")


def _check_operands(x: Tensor, q: Tensor, scales: Tensor, bits: int, block: int) -> None:
    if x.dtype not in DTYPES or q.dtype != torch.uint8 or q.shape[-1] * 8 != block * bits:
        raise CrabError(f"got x {x.dtype}, codes {q.dtype} {tuple(q.shape)} for {bits} bits, block {block}")
    if scales.shape != q.shape[:2]:
        raise CrabError(f"scales are {tuple(scales.shape)}, expected {tuple(q.shape[:2])}")
    if not q.is_contiguous():
        raise CrabError(f"codes lie with strides {q.stride()}, expected contiguous ones (see prepare)")
