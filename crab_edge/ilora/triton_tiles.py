"""Which tile each Triton kernel works on, by the shape of its product: plain numbers, no Triton, no search.

Nothing is tuned at run time: a kernel's constants depend on shapes alone, so CUDA graphs, torch.compile and
kernels compiled ahead of time all get the same ones. Nobody has measured these on a GPU yet; docs/kernels.md
says what they were derived from.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CrabError

SHARED = 48 * 1024
"""Bytes of shared memory that a program may take: more needs a permission that engines don't ask for."""
DECODE = 8
"""Rows of activations up to which a product counts as decode: the columns of a tensor core's tile."""
PREFILL = 64


@dataclass(frozen=True)
class Tile:
    """rows: of the weight (for a route, `down` of A and all of R); columns: rows of activations; chunks: that
    a program takes at a time, `chunk` bytes of a row each; stages: loads under way, plus one; warps.
    """

    rows: int
    columns: int
    chunks: int
    chunk: int
    stages: int
    warps: int
    down: int = 0


def linear_tile(
    m: int,
    n: int,
    k: int,
    bits: int,
    block: int,
    splits: tuple[int, ...] = (),
    beside: tuple[int, int] = (0, 0),
) -> Tile:
    """For an [n, k] weight and m rows of activations.

    splits: rows at which the linears of a joined weight begin; beside: bits and block of a second weight.
    """
    chunks = 1
    rows = 64
    if m <= DECODE:
        # A wide weight has rows enough for four programs a multiprocessor; a narrow one shares out K instead.
        rows, chunks = (64, 4) if n >= 16384 else (32, 4) if n >= 8192 else (16, 8 if k < 8192 else 16)
    while any(split % rows for split in splits):
        rows //= 2
    if rows < 16:
        raise CrabError(f"linears of one weight begin at rows {splits}, expected multiples of 16")
    columns = _columns(m)
    stage = max(
        stage_bytes(rows, columns, bits, block), stage_bytes(rows, columns, *beside) if beside[0] else 0
    )
    return _tile(rows, columns, stage, chunks, bits, block)


def route_tile(m: int, k: int, bits: int, block: int, rank: int, experts: int, groups: int) -> Tile:
    """For a group's stacked A and R of k columns and m rows of activations."""
    decode = m <= DECODE
    rows = 16 if decode else 64
    while rows <= experts:
        rows *= 2
    parts = -(-rank // (rows - experts))
    if decode:
        # The more programs, the more multiprocessors read at once, and the more often R is read.
        parts = max(parts, min(32 if groups == 1 else 16, rank))
    columns = _columns(m)
    stage = stage_bytes(rows, columns, bits, block)
    chunks = (8 if k < 8192 else 16) if decode else 1
    return _tile(rows, columns, stage, chunks, bits, block, -(-rank // parts))


def chunk_bytes(bits: int, block: int) -> int:
    """Bytes of one row that are multiplied at a time: a block, half of one at most, or 64."""
    return min(64, block * bits // 8)


def _columns(m: int) -> int:
    return next((size for size in (1, DECODE, 16, 32) if m <= size), PREFILL)


def stage_bytes(rows: int, columns: int, bits: int, block: int) -> int:
    """Bytes of shared memory that one chunk takes: codes, 16-bit activations, scales."""
    size = chunk_bytes(bits, block)
    return size * rows + size * 8 // bits * columns * 2 + 4 * rows


def _tile(rows: int, columns: int, stage: int, chunks: int, bits: int, block: int, down: int = 0) -> Tile:
    """As many chunks as asked for (more where they are small) and as many stages as there is room for."""
    size = chunk_bytes(bits, block)
    if chunks > 1:
        chunks = min(16, chunks * max(1, 64 // size))
    while chunks > 1 and stage * chunks * 2 > SHARED:
        chunks //= 2
    stages = 1 + max(1, min(4, SHARED // (stage * chunks)))
    # A tensor core's tile has 16 rows; a warp with less than one to itself would repeat another's.
    warps = min(8 if chunks == 16 else 4, chunks * rows // 16)
    return Tile(rows, columns, chunks, size, stages, warps, down)
