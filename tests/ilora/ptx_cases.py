"""Operators of `torch_ops` and the kernels that compute them: operands, expected result, a launch on PTX."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from crab_edge.ilora import torch_ops, triton_compile
from tests.ptx import Global, launch
from tests.ptx.count import Counts

Blocks = Callable[[int, int, int], bool]


@dataclass(frozen=True)
class Case:
    """A kernel with its constants; operands in its order, without the number of rows and the result."""

    kernel: str
    constants: dict[str, int]
    operands: tuple[Tensor, ...]
    expected: Tensor
    bias: bool = False

    def compile(self, sm: int) -> triton_compile.CompiledKernel:
        """The kernel for a compute capability."""
        scales = [one.dtype for one in self.operands if one.dim() == 2 and one.stride(0) == 1]
        half = ["float32" if one == torch.float32 else "float16" for one in [*scales, torch.float16]]
        return triton_compile.compile_kernel(
            self.kernel, sm, constants=self.constants, dtype=str(self.expected.dtype).removeprefix("torch."),
            scales=half[0], scales_beside=half[1], bias=self.bias,
        )  # fmt: skip

    def run(
        self,
        made: triton_compile.CompiledKernel,
        only: Blocks | None = None,
        counts: Counts | None = None,
    ) -> Tensor:
        """What the PTX computes; with `only` some of its blocks, the other results are NaN."""
        memory, rows = Global(), len(self.expected)
        addresses = [memory.put(raw(one)) for one in self.operands]
        empty = np.full(self.expected.shape, 0x7FFF, np.int16)
        out = memory.put(empty, written=only is not None)
        arguments = [*addresses, rows, out, *[0] * made.hidden_parameters]
        launch(made.ptx, memory, arguments, made.grid(rows), made.threads, made.shared, only, counts)
        return torch.from_numpy(memory.get(out, empty)).view(self.expected.dtype)

    def error(self, got: Tensor, blocks: int | None = None) -> float:
        """The largest difference, relative to the largest value expected. None may be missing; of `blocks`
        whole blocks of one row exactly theirs must be there.
        """
        there, sizes = ~got.isnan(), self.constants
        each = sizes["EXPERTS"] * sizes["BA"] if self.kernel == "route" else sizes.get("BN", 0)
        expected = got.numel() if blocks is None else blocks * each
        assert int(there.sum()) == expected, f"{int(there.sum())} results, expected {expected}"
        wanted = self.expected.double()
        return float((got.double() - wanted)[there].abs().max() / wanted.abs().max())


def raw(value: Tensor) -> np.ndarray:
    """Bytes as the kernel finds them: scales column by column, float16 and bfloat16 as integers."""
    value = value.t() if value.dim() == 2 and value.stride(0) == 1 and value.stride(1) != 1 else value
    value = value.contiguous()
    return (value.view(torch.int16) if value.element_size() == 2 else value).numpy()


def _drawn(random: np.random.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.from_numpy(random.normal(size=shape).astype(np.float32)).to(dtype)


def _weight(
    random: np.random.Generator, n: int, k: int, bits: int, block: int, scales: type = np.float16
) -> torch_ops.GpuWeight:
    """Random bytes for codes, also where the last block is padding: x ends before."""
    blocks = -(-k // block)
    q = torch.from_numpy(random.integers(0, 256, (n, blocks, block * bits // 8), np.uint8))
    drawn = torch.from_numpy(random.uniform(0.5, 1, (blocks, n)).astype(scales)).t()
    return torch_ops.GpuWeight(q, drawn, bits, block, (n, k))


def linear(
    rows: int, n: int, k1: int, bits: int, block: int, *, form: int = 1, k2: int = 0, planes: int = 0,
    splits: Sequence[int] = (), beside: tuple[int, int] = (0, 0), bias: bool = False,
    dtype: torch.dtype = torch.float16, scales: type = np.float16,
) -> Case:  # fmt: skip
    """linear_kernel in its `form` for 1 row (decode), 8, or 64 (prefill), on `rows` rows."""
    random = np.random.default_rng(0)
    splits = tuple(splits)
    w = _weight(random, n, k1 + planes * k2, bits, block, scales)
    x = _drawn(random, dtype, rows, k1)
    z = _drawn(random, dtype, rows, k2 * (len(splits) + 1)) if k2 else None
    b = _drawn(random, dtype, n) if bias else None
    operands = [x, *([] if z is None else [z]), w.q, w.scales]
    if beside[0]:
        assert z is not None
        e = _weight(random, n, k2, *beside)
        operands += [e.q, e.scales]
        expected = torch_ops.lowbit_linear_experts(
            x, z, w.q, w.scales, bits, block, e.q, e.scales, *beside, b
        )
    else:
        bounds = (0, *splits, n)
        sizes = [end - begin for begin, end in itertools.pairwise(bounds)] if splits else None
        expected = torch_ops.lowbit_linear(x, z, w.q, w.scales, bits, block, planes, b, sizes)
    constants = triton_compile.linear_constants(
        form, n, k1, bits, block, k2=k2, planes=planes, splits=splits, beside=beside
    )
    return Case("linear", constants, (*operands, *([] if b is None else [b])), expected, bias)


def experts(
    rows: int, n: int, k: int, bits: int, block: int, *, form: int = 1, dtype: torch.dtype = torch.float16
) -> Case:
    """experts_kernel."""
    random = np.random.default_rng(0)
    w = _weight(random, n, k, bits, block)
    y0, z = _drawn(random, dtype, rows, n), _drawn(random, dtype, rows, k)
    expected = torch_ops.ilora_experts(y0, z, w.q, w.scales, bits, block)
    constants = triton_compile.experts_constants(form, n, k, bits, block)
    return Case("experts", constants, (y0, z, w.q, w.scales), expected)


def route(
    rows: int, k: int, bits: int, block: int, *, rank: int, experts: int, groups: int, form: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Case:  # fmt: skip
    """route_kernel, its logits of order one."""
    random = np.random.default_rng(0)
    w = _weight(random, groups * (rank + experts), k, bits, block)
    x = _drawn(random, dtype, rows, k) / k**0.5
    expected = torch_ops.ilora_route(x, w.q, w.scales, bits, block, rank, experts, groups)
    constants = triton_compile.route_constants(
        form, k, bits, block, rank=rank, experts=experts, groups=groups
    )
    return Case("route", constants, (x, w.q, w.scales), expected)
