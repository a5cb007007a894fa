"""Triton kernels of the low-bit products and of I-LoRA's route. Operands: `torch_ops`; why: docs/kernels.md.

Every product is computed transposed, y^T = W x^T, because tensor cores want 16 rows of the first factor and
only 8 columns of the second: the weight gives the rows, and one token wastes little. Codes go from memory to
shared memory by asynchronous copies, are unpacked in registers and multiplied exactly: code minus zero point
is a small integer in float16 and bfloat16. Scales meet the float32 sums, once a chunk.

A chunk is C bytes of a row, all under one scale. A program takes KS chunks at a time, side by side in the
leading axis of its tiles, so that warps share out K and no partial sum leaves the program: no atomics, no
second launch, the same result every time.

ASM is False in Triton's interpreter, which has no inline assembly and no products of bfloat16: there codes
are unpacked by plain arithmetic and multiplied in float32.

Sizes are constants of the kernel, M alone is an argument: pointers to inputs, M, pointer to the output.
"""

# Triton reads annotations itself, so no `from __future__ import annotations`.

import triton
import triton.language as tl


@triton.jit
def _unpack4(q, UPPER: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """uint8 of two codes -> the upper or the lower one - 8 in DTYPE.

    A statement each, not one for both: Triton 3.8 takes those with two results through shared memory.
    """
    if not ASM:
        return ((q >> 4) if UPPER else (q & 15)).to(DTYPE) - 8
    # A code in the low bits of a number whose exponent makes them units: 1024 + c in float16, 128 + c in
    # bfloat16. Conversions of integers run at an eighth of the rate of these.
    SHIFT: tl.constexpr = "shr.u32 c, $2, 4;" if UPPER else "mov.b32 c, $2;"
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 c, e, z;
            mov.b32 e, 0x64646464;
            mov.b32 z, 0x64086408;
            """
            + SHIFT
            + """
            and.b32 c, c, 0x0F0F0F0F;
            prmt.b32 $0, c, e, 0x4140;
            prmt.b32 $1, c, e, 0x4342;
            sub.f16x2 $0, $0, z;
            sub.f16x2 $1, $1, z;
            }
            """,
            "=&r,=&r,r",
            [q],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 c, e, o, z;
            mov.b32 e, 0x43434343;
            mov.b32 o, 0x3F803F80;
            mov.b32 z, 0xC308C308;
            """
            + SHIFT
            + """
            and.b32 c, c, 0x0F0F0F0F;
            prmt.b32 $0, c, e, 0x4140;
            prmt.b32 $1, c, e, 0x4342;
            fma.rn.bf16x2 $0, $0, o, z;
            fma.rn.bf16x2 $1, $1, o, z;
            }
            """,
            "=&r,=&r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _unpack8(q, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """uint8 -> code - 128 in DTYPE."""
    if not ASM:
        return q.to(DTYPE) - 128
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 e, z;
            mov.b32 e, 0x64646464;
            mov.b32 z, 0x64806480;
            prmt.b32 $0, $2, e, 0x4140;
            prmt.b32 $1, $2, e, 0x4342;
            sub.f16x2 $0, $0, z;
            sub.f16x2 $1, $1, z;
            }
            """,
            "=&r,=&r,r",
            [q],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
    else:
        # 128 + c is exact in bfloat16 only for four bits: 16 (high - 8) + low.
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 l, h, e, o, s, z, zl, l0, l1;
            mov.b32 e, 0x43434343;
            mov.b32 o, 0x3F803F80;
            mov.b32 s, 0x41804180;
            mov.b32 z, 0xC308C308;
            mov.b32 zl, 0xC300C300;
            and.b32 l, $2, 0x0F0F0F0F;
            shr.u32 h, $2, 4;
            and.b32 h, h, 0x0F0F0F0F;
            prmt.b32 l0, l, e, 0x4140;
            prmt.b32 l1, l, e, 0x4342;
            prmt.b32 $0, h, e, 0x4140;
            prmt.b32 $1, h, e, 0x4342;
            fma.rn.bf16x2 l0, l0, o, zl;
            fma.rn.bf16x2 l1, l1, o, zl;
            fma.rn.bf16x2 $0, $0, o, z;
            fma.rn.bf16x2 $1, $1, o, z;
            fma.rn.bf16x2 $0, $0, s, l0;
            fma.rn.bf16x2 $1, $1, s, l1;
            }
            """,
            "=&r,=&r,r",
            [q],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )


@triton.jit
def _activations(
    x_ptr, z_ptr, M, m, block, column, fits,
    K1: tl.constexpr, K2: tl.constexpr, XS: tl.constexpr, ZS: tl.constexpr,
    PLANES: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """[x ; z ; ..]^T [KS, columns, rows] of rows `m`, at `column` [KS, columns] of blocks `block` [KS].

    With BM = 1 the first row is loaded once and stands in all of them.
    """
    k = (block * BLOCK)[:, None] + column
    fits = fits[:, None]
    if PLANES > 0:
        X_BLOCKS: tl.constexpr = (K1 + BLOCK - 1) // BLOCK
        Z_BLOCKS: tl.constexpr = (K2 + BLOCK - 1) // BLOCK
        in_x = (block < X_BLOCKS)[:, None]
        kz = ((block - X_BLOCKS) % Z_BLOCKS * BLOCK)[:, None] + column
        if K2 % BLOCK != 0:
            fits = fits & (in_x | (kz < K2))
        if BM == 1:
            row = tl.program_id(0)
            x = tl.load(tl.where(in_x, x_ptr + row * XS + k, z_ptr + row * ZS + kz), mask=fits, other=0.0)
        else:
            in_z = (z_ptr + kz)[:, :, None] + (m * ZS)[None, None, :]
            pointers = tl.where(in_x[:, :, None], (x_ptr + k)[:, :, None] + (m * XS)[None, None, :], in_z)
            x = tl.load(pointers, mask=fits[:, :, None] & (m < M)[None, None, :], other=0.0)
    else:
        if K1 % BLOCK != 0:
            fits = fits & (k < K1)
        if BM == 1:
            x = tl.load(x_ptr + tl.program_id(0) * XS + k, mask=fits, other=0.0)
        else:
            pointers = (x_ptr + k)[:, :, None] + (m * XS)[None, None, :]
            x = tl.load(pointers, mask=fits[:, :, None] & (m < M)[None, None, :], other=0.0)
    if BM == 1:
        x = tl.broadcast_to(x[:, :, None], column.shape[0], column.shape[1], m.shape[0])
    return x if ASM else x.to(tl.float32)


@triton.jit
def _scales(
    s_ptr, start, row, inside, N: tl.constexpr, BLOCKS: tl.constexpr, PER: tl.constexpr, KS: tl.constexpr
):
    """Scales [KS, BN] of the chunks from `start` on."""
    block = (start + tl.arange(0, KS)) // PER
    mask = (block < BLOCKS)[:, None] & inside[None, :]
    return tl.load(s_ptr + (block * N)[:, None] + row[None, :], mask=mask, other=0.0)


@triton.jit
def _accumulate(
    total, x_ptr, z_ptr, q_ptr, s_ptr, M, m, row, inside,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, XS: tl.constexpr, ZS: tl.constexpr,
    PLANES: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """total [KS, BN, rows] + products of the weight's rows `row` [BN] (where `inside`) with rows `m` of x, z.

    K1, K2: columns of x and z (PLANES times in the weight); XS, ZS: their rows' strides; N: stride of scales.
    """
    X_BLOCKS: tl.constexpr = (K1 + BLOCK - 1) // BLOCK
    Z_BLOCKS: tl.constexpr = (K2 + BLOCK - 1) // BLOCK
    BLOCKS: tl.constexpr = X_BLOCKS + PLANES * Z_BLOCKS
    BYTES: tl.constexpr = BLOCK * BITS // 8
    PER: tl.constexpr = BYTES // C
    KS: tl.constexpr = total.shape[0]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty if ASM else tl.float32
    BN: tl.constexpr = row.shape[0]
    j = tl.arange(0, C)
    # Codes are loaded as a matrix, a chunk's rows below each other: as a tile of three axes they would lie in
    # shared memory chunk by chunk, and eight rows of one chunk in the same banks.
    flat_chunk = tl.arange(0, KS * BN) // BN
    flat_row = tl.broadcast_to(row[None, :], KS, BN).reshape(KS * BN)
    flat_inside = tl.broadcast_to(inside[None, :], KS, BN).reshape(KS * BN)
    ahead = _scales(s_ptr, 0, row, inside, N, BLOCKS, PER, KS)
    for start in tl.range(0, BLOCKS * PER, KS, num_stages=STAGES):
        chunk = start + tl.arange(0, KS)
        fits = chunk < BLOCKS * PER
        block = chunk // PER
        codes = (flat_row * (BLOCKS * BYTES) + (start + flat_chunk) * C)[:, None] + j[None, :]
        here = flat_inside & (start + flat_chunk < BLOCKS * PER)
        q = tl.load(q_ptr + codes, mask=here[:, None], other=0).reshape(KS, BN, C)
        s, ahead = ahead, _scales(s_ptr, start + KS, row, inside, N, BLOCKS, PER, KS)
        column = (chunk % PER * C)[:, None] + j[None, :]
        if BITS == 8:
            x = _activations(x_ptr, z_ptr, M, m, block, column, fits, K1, K2, XS, ZS, PLANES, BLOCK, BM, ASM)
            part = tl.dot(_unpack8(q, DTYPE, ASM), x)
        elif BLOCK < 64:
            # Half a block is too short for a product of its own: the halves are put side by side.
            low, high = _unpack4(q, False, DTYPE, ASM), _unpack4(q, True, DTYPE, ASM)
            whole = tl.join(low, high).permute(0, 1, 3, 2).reshape(KS, BN, BLOCK)
            # Triton before 3.9 gets products of such halves wrong that are 16 long: zeros in between make
            # them 32.
            LENGTH: tl.constexpr = 32 if BLOCK < 32 else BLOCK
            if LENGTH > BLOCK:
                whole = tl.join(whole, tl.zeros_like(whole)).reshape(KS, BN, LENGTH)
            column = (chunk * 0)[:, None] + (tl.arange(0, LENGTH) * BLOCK // LENGTH)[None, :]
            x = _activations(x_ptr, z_ptr, M, m, block, column, fits, K1, K2, XS, ZS, PLANES, BLOCK, BM, ASM)
            part = tl.dot(whole, x)
        else:
            low, high = _unpack4(q, False, DTYPE, ASM), _unpack4(q, True, DTYPE, ASM)
            x = _activations(x_ptr, z_ptr, M, m, block, column, fits, K1, K2, XS, ZS, PLANES, BLOCK, BM, ASM)
            part = tl.dot(low, x)
            column += BLOCK // 2
            x = _activations(x_ptr, z_ptr, M, m, block, column, fits, K1, K2, XS, ZS, PLANES, BLOCK, BM, ASM)
            part = tl.dot(high, x, part)
        total += part * s.to(tl.float32)[:, :, None]
    return total


@triton.jit
def _rows(BM: tl.constexpr):
    """Rows of activations that a program computes: BM, but 8 (the least for tensor cores) for 1."""
    return tl.program_id(0) * BM + tl.arange(0, 8 if BM == 1 else BM)


@triton.jit
def _counts(m, M, BM: tl.constexpr):
    """Which of `_rows` are this program's to store."""
    return (m < M) & (m < (tl.program_id(0) + 1) * BM)


@triton.jit
def _product(
    x_ptr, z_ptr, q_ptr, s_ptr, qe_ptr, se_ptr, add_ptr, M, y_ptr,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, XS: tl.constexpr, ZS: tl.constexpr,
    PLANES: tl.constexpr, SPLIT0: tl.constexpr, SPLIT1: tl.constexpr, ADD_ROWS: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    BITS_E: tl.constexpr, BLOCK_E: tl.constexpr, C_E: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    # Programs that share rows of the weight follow each other, so that the cache serves all but the first.
    m = _rows(BM)
    begin = tl.program_id(1) * BN
    row = begin + tl.arange(0, BN)
    inside = row < N
    if SPLIT0 > 0:
        linear = (begin >= SPLIT0).to(tl.int32)
        if SPLIT1 > 0:
            linear += (begin >= SPLIT1).to(tl.int32)
        z_ptr += linear * K2
    total = tl.zeros([KS, BN, m.shape[0]], tl.float32)
    total = _accumulate(
        total, x_ptr, z_ptr, q_ptr, s_ptr, M, m, row, inside,
        N, K1, K2, XS, ZS, PLANES, BITS, BLOCK, C, BM, STAGES, ASM,
    )  # fmt: skip
    if BITS_E > 0:
        total = _accumulate(
            total, z_ptr, z_ptr, qe_ptr, se_ptr, M, m, row, inside,
            N, K2, K2, ZS, ZS, 0, BITS_E, BLOCK_E, C_E, BM, STAGES, ASM,
        )  # fmt: skip
    y = tl.sum(total, 0)
    within = inside[:, None] & _counts(m, M, BM)[None, :]
    place = (m * N)[None, :] + row[:, None]
    if ADD_ROWS:
        y += tl.load(add_ptr + place, mask=within, other=0.0).to(tl.float32)
    elif add_ptr is not None:
        y += tl.load(add_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=within)


@triton.jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr, z_ptr, q_ptr, s_ptr, qe_ptr, se_ptr, bias_ptr, M, y_ptr,
    N: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr, XS: tl.constexpr, ZS: tl.constexpr,
    PLANES: tl.constexpr, SPLIT0: tl.constexpr, SPLIT1: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    BITS_E: tl.constexpr, BLOCK_E: tl.constexpr, C_E: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N] = [W | planes of sB] [x ; z ..] + bias, or with BITS_E W x + sB z + bias.

    x [M, K1], z [M, .. K2 ..] or None, q and s the weight, qe and se the experts' or None, bias [N] or None.
    Where several linears are one weight, SPLIT0 (and SPLIT1) are the first rows of the second (third), both
    multiples of BN, and z holds theirs side by side.
    """
    _product(
        x_ptr, z_ptr, q_ptr, s_ptr, qe_ptr, se_ptr, bias_ptr, M, y_ptr,
        N, K1, K2, XS, ZS, PLANES, SPLIT0, SPLIT1, False, BITS, BLOCK, C, BITS_E, BLOCK_E, C_E,
        BN, BM, KS, STAGES, ASM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def experts_kernel(
    y0_ptr, z_ptr, q_ptr, s_ptr, M, y_ptr,
    N: tl.constexpr, K1: tl.constexpr, XS: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y [M, N] = y0 [M, N] + sB z, z [M, K1]."""
    _product(
        z_ptr, None, q_ptr, s_ptr, None, None, y0_ptr, M, y_ptr,
        N, K1, 0, XS, 0, 0, 0, 0, True, BITS, BLOCK, C, 0, 16, 16, BN, BM, KS, STAGES, ASM,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def route_kernel(
    x_ptr, q_ptr, s_ptr, M, z_ptr,
    K1: tl.constexpr, XS: tl.constexpr, RANK: tl.constexpr, EXPERTS: tl.constexpr, GROUPS: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    BT: tl.constexpr, BA: tl.constexpr,
    BM: tl.constexpr, KS: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """z [M, GROUPS*EXPERTS*RANK] = flatten(softmax(R x) outer (A x)) of x [M, K1], for every linear.

    A program's BT rows are BA rows of one A and all of its R: each program makes its own softmax.
    """
    TILES: tl.constexpr = (RANK + BA - 1) // BA
    m = _rows(BM)
    linear = tl.program_id(1) // TILES
    first = tl.program_id(1) % TILES * BA
    r = tl.arange(0, BT)
    down = (r < BA) & (first + r < RANK)
    router = (r >= BA) & (r < BA + EXPERTS)
    row = linear * (RANK + EXPERTS) + tl.where(r < BA, first + r, RANK + r - BA)
    h = tl.zeros([KS, BT, m.shape[0]], tl.float32)
    h = _accumulate(
        h, x_ptr, x_ptr, q_ptr, s_ptr, M, m, row, down | router,
        GROUPS * (RANK + EXPERTS), K1, 0, XS, 0, 0, BITS, BLOCK, C, BM, STAGES, ASM,
    )  # fmt: skip
    h = tl.sum(h, 0)
    logits = tl.where(router[:, None], h, float("-inf"))
    g = tl.exp(logits - tl.max(logits, 0)[None, :])
    g = g / tl.sum(g, 0)[None, :]
    z = z_ptr + (m * (GROUPS * EXPERTS * RANK))[None, :] + (linear * EXPERTS * RANK + first + r)[:, None]
    within = down[:, None] & _counts(m, M, BM)[None, :]
    for i in tl.static_range(EXPERTS):
        weight = tl.sum(tl.where((r == BA + i)[:, None], g, 0.0), 0)
        tl.store(z + i * RANK, (h * weight[None, :]).to(z_ptr.dtype.element_ty), mask=within)
