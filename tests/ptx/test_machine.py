"""The machine itself: small kernels written by hand, right ones and ones with a fault it must notice."""

from __future__ import annotations

import numpy as np
import pytest

from tests.ptx import Global, PtxError, launch, warps
from tests.ptx.arithmetic import bits, compare, compute, convert, view
from tests.ptx.count import Counts

HEAD = """.version 8.5
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 given,
\t.param .u32 rows,
\t.param .u64 .ptr .global .align 1 out
)
.reqntid 64
{
\t.reg .pred %p<9>;
\t.reg .b16 %rs<9>;
\t.reg .b32 %r<99>;
\t.reg .b64 %rd<9>;
\tld.param.b64 %rd1, [given];
\tld.param.b64 %rd2, [out];
\tmov.u32 %r1, %tid.x;
\tmul.wide.u32 %rd3, %r1, 4;
\tadd.s64 %rd4, %rd1, %rd3;
\tadd.s64 %rd5, %rd2, %rd3;
\tshl.b32 %r2, %r1, 2;
\tmov.b32 %r3, global_smem;
\tadd.s32 %r4, %r3, %r2;
"""
GIVEN = np.arange(100, 164, dtype=np.uint32)


def run(body: str, given=GIVEN, count: int = 64, shared: int = 256, threads: int = 64):
    """What the kernel stores. %rd4, %rd5: a thread's places in `given` and `out`, %r4: in shared memory."""
    memory = Global()
    out = np.zeros(count, np.uint32)
    arguments = [memory.put(given), 7, memory.put(out, written=False)]
    launch(HEAD + body + "\tret;\n}\n", memory, arguments, (1, 1, 1), threads, shared)
    return memory.get(arguments[2], out)


SWAP = """
\tld.global.b32 %r5, [%rd4];
\tst.shared.b32 [%r4], %r5;
{barrier}
\txor.b32 %r6, %r2, {mask};
\tadd.s32 %r7, %r3, %r6;
\tld.shared.b32 %r8, [%r7];
\tst.global.b32 [%rd5], %r8;
"""


def test_warps_meet_at_a_barrier():
    assert (run(SWAP.format(barrier="bar.sync 0;", mask=128)) == GIVEN[np.arange(64) ^ 32]).all()


def test_what_another_warp_wrote_needs_a_barrier():
    # The lanes of a warp go in step here.
    assert (run(SWAP.format(barrier="", mask=4)) == GIVEN[np.arange(64) ^ 1]).all()
    with pytest.raises(PtxError, match="a race: a read of shared memory that another warp wrote"):
        run(SWAP.format(barrier="", mask=128))
    with pytest.raises(PtxError, match="a race: a write of shared memory that another warp read"):
        run(SWAP.format(barrier="bar.sync 0;", mask=128) + "st.shared.b32 [%r4], %r8;\n")


COPY = """
\tcp.async.ca.shared.global [%r4], [%rd4], 4;
\tcp.async.commit_group;
\tcp.async.wait_group {left};
{barrier}
\tld.shared.b32 %r8, [%r4];
\tst.global.b32 [%rd5], %r8;
"""


def test_copies_are_there_once_they_were_waited_for():
    assert (run(COPY.format(left=0, barrier="")) == GIVEN).all()
    with pytest.raises(PtxError, match="a copy is still on its way"):
        run(COPY.format(left=1, barrier="bar.sync 0;"))
    with pytest.raises(PtxError, match="still on its way"):
        run("cp.async.ca.shared.global [%r4], [%rd4], 4;\nst.shared.b32 [%r4], %r1;\n")


def test_a_copy_of_nothing_reads_nothing_and_writes_zeros():
    body = """
\tmov.b64 %rd4, 0;
\tmov.b32 %r5, 0;
\tcp.async.ca.shared.global [%r4], [%rd4], 4, %r5;
\tcp.async.commit_group;
\tcp.async.wait_group 0;
\tld.shared.b32 %r8, [%r4];
\tst.global.b32 [%rd5], %r8;
"""
    assert (run(body) == 0).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r5, [%rd4+4];", "4 bytes outside of every array"),
        ("ld.global.b32 %r5, [%rd4+2];", "isn't a multiple"),
        ("ld.global.b32 %r5, [%rd5];", "memory that nothing was stored to"),
        ("st.global.b32 [%rd2], %r1;", "different values to one address"),
        ("st.shared.b32 [%r4+4], %r1;", "outside of the 256 bytes of shared memory"),
        ("ld.shared.b32 %r5, [%r4];", "shared memory that nothing was written to"),
        ("st.shared.b32 [%r3], %r1;", "different values to one place"),
        ("setp.lt.u32 %p1, %r1, 32;\n@%p1 bar.sync 0;", "not all threads of a block"),
        ("setp.lt.u32 %p1, %r1, 3;\n@%p1 shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", "threads of a warp are"),
        ("cp.async.ca.shared.global [%r3], [%rd4], 4;", "copy different values"),
        ("ld.global.b32 %r5, [%rd4+65536];", "outside of every array"),
        ("ld.global.b32 %r5, [%rd1+-4];", "outside of every array"),
        ("add.sat.s32 %r5, %r1, %r1;", "add.sat.s32 isn't known"),
        ("ld.volatile.global.b32 %r5, [%rd4];", "isn't known"),
        ("membar.gl;", "isn't known"),
        ("$L_a:\nbra $L_a;", "hasn't ended"),
        ("vadd.s32 %r5, %r1, %r1;", "no arithmetic vadd"),
        ("st.global.b32 [%rd5], %q1;", "%q1 isn't declared"),
    ],
)  # fmt: skip
def test_faults_have_a_name(body, message):
    with pytest.raises(PtxError, match=message):
        run(f"\t{body}\n")


def test_a_message_names_the_line():
    text = HEAD + "\tld.shared.b32 %r5, [%r4];\n"
    with pytest.raises(PtxError, match=rf"kernel, line {text.count(chr(10))}: ld.shared.b32"):
        run("\tld.shared.b32 %r5, [%r4];\n")


def test_a_launch_must_fit_the_kernel():
    with pytest.raises(PtxError, match="launched with 32 threads, compiled for 64"):
        run("", threads=32)
    with pytest.raises(PtxError, match="2 arguments, takes 3"):
        launch(HEAD + "\tret;\n}\n", Global(), [1, 2], (1, 1, 1), 64, 0)
    with pytest.raises(PtxError, match="256 of 256 bytes were never stored"):
        run("")


@pytest.mark.parametrize(("stride", "turns"), [(4, 1), (8, 2), (128, 32), (0, 1)])
def test_turns_at_shared_memory_are_counted(stride, turns):
    counts, threads = Counts(), np.arange(64)
    counts.shared("ld", threads // 32, 1024 + stride * (threads % 32), 4)
    # Two warps; all of a warp's words fit into so many turns.
    assert counts.turns["ld"] == 2 * turns
    assert counts.least["ld"] == 2
    counts.shared("cp", threads // 32, 1024 + 16 * threads, 16)
    assert counts.turns["cp"] == counts.least["cp"] == 8


def test_undefined_values_become_nans():
    body = "\tmov.b32 %r5, {%rs1, %rs2};\n\tst.global.b32 [%rd5], %r5;\n"
    assert np.isnan(run(body).view(np.float16)).all()
    # Also in the threads that a guard leaves out.
    guarded = "setp.lt.u32 %p1, %r1, 2;\n@%p1 mov.b32 %r5, 0;\nst.global.b32 [%rd5], %r5;\n"
    assert np.isnan(run(guarded).view(np.float16)).reshape(64, 2).all(1).tolist() == [False] * 2 + [True] * 62


def test_threads_that_part_meet_again():
    """Each thread loops as often as its number says, half of them skip a step."""
    body = """
\tmov.b32 %r5, 0;
\tmov.b32 %r6, 0;
$L_loop:
\tsetp.ge.u32 %p1, %r6, %r1;
\t@%p1 bra $L_end;
\tadd.s32 %r6, %r6, 1;
\tand.b32 %r7, %r1, 1;
\tsetp.eq.s32 %p2, %r7, 0;
\t@%p2 bra $L_loop;
\tadd.s32 %r5, %r5, 3;
\tbra $L_loop;
$L_end:
\tbar.sync 0;
\tst.global.b32 [%rd5], %r5;
"""
    number = np.arange(64)
    assert (run(body) == np.where(number % 2, 3 * number, 0)).all()


def test_blocks_have_their_own_shared_memory_and_only_some_may_run():
    body = """
\tmov.u32 %r5, %ctaid.y;
\tmul.lo.s32 %r5, %r5, 64;
\tadd.s32 %r6, %r5, %r1;
\tst.shared.b32 [%r4], %r6;
\tbar.sync 0;
\tld.shared.b32 %r7, [%r4];
\tmul.wide.u32 %rd6, %r6, 4;
\tadd.s64 %rd7, %rd2, %rd6;
\tst.global.b32 [%rd7], %r7;
\tret;
}
"""
    memory, out = Global(), np.zeros(192, np.uint32)
    place = memory.put(out, written=False)
    launch(HEAD + body, memory, [memory.put(GIVEN), 7, place], (1, 3, 1), 64, 256)
    assert (memory.get(place, out) == np.arange(192)).all()
    place = memory.put(out, written=False)
    launch(HEAD + body, memory, [0, 7, place], (1, 3, 1), 64, 256, only=lambda x, y, z: y == 2)
    assert (memory.get(place + 512, out[:64]) == np.arange(128, 192)).all()
    with pytest.raises(PtxError, match="never stored"):
        memory.get(place, out)


def lanes(random, warps_here=3):
    return random.integers(0, 1 << 32, (warps_here, 32), np.uint32)


def test_matrices_go_to_shared_memory_and_come_back():
    random = np.random.default_rng(0)
    elements = random.integers(0, 1 << 16, (3, 2, 8, 8)).astype("<u2")
    for transposed in (False, True):
        registers = warps.matrices_from(elements.view(np.uint8), transposed)
        at = elements.swapaxes(2, 3) if transposed else elements
        # Lane 13 holds row 3, columns 2 and 3.
        assert (registers[1][:, 13] & 0xFFFF == at[:, 1, 3, 2]).all()
        assert (registers[1][:, 13] >> 16 == at[:, 1, 3, 3]).all()
        assert (warps.matrices_to(registers, transposed) == elements.view(np.uint8)).all()


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_tensor_cores_multiply_matrices(kind):
    """The fragments of the PTX manual: element (row, column) by lane and register."""
    random = np.random.default_rng(1)
    a, b, c = random.normal(size=(16, 16)), random.normal(size=(16, 8)), random.normal(size=(16, 8))
    a, b = (view(bits(one, kind), kind).astype(float) for one in (a, b))
    c = c.astype(np.float32)
    lane = np.arange(32)
    row, pair = lane // 4, 2 * (lane % 4)
    packed = [
        bits(np.stack([a[row + down, pair + right], a[row + down, pair + right + 1]], -1), f"{kind}x2")[None]
        for right in (0, 8) for down in (0, 8)
    ]  # fmt: skip
    columns = [
        bits(np.stack([b[pair + down, row], b[pair + down + 1, row]], -1), f"{kind}x2")[None]
        for down in (0, 8)
    ]
    sums = [bits(c[row + down, pair + right], "f32")[None] for down in (0, 8) for right in (0, 1)]
    got = [view(one, "f32")[0] for one in warps.product(kind, packed, columns, sums)]
    expected = a @ b + c
    for one, (down, right) in zip(got, ((0, 0), (0, 1), (8, 0), (8, 1)), strict=True):
        np.testing.assert_allclose(one, expected[row + down, pair + right], rtol=1e-6, atol=1e-6)


def test_shuffles():
    value = lanes(np.random.default_rng(2))
    number = np.arange(32)
    clamp = np.full((3, 32), 31)
    by = np.full((3, 32), 5)
    assert (warps.shuffle("bfly", value, by, clamp) == value[:, number ^ 5]).all()
    assert (warps.shuffle("idx", value, by, clamp) == value[:, 5:6]).all()
    # Lanes that nobody is so far from keep their own.
    below, above = np.where(number < 27, number + 5, number), np.where(number < 5, number, number - 5)
    assert (warps.shuffle("down", value, by, clamp) == value[:, below]).all()
    assert (warps.shuffle("up", value, by, 0 * clamp) == value[:, above]).all()


def words(*values, kind="u4"):
    return np.array(values, kind)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("add.s32", (0xFFFFFFFF, 2), 1),
        ("sub.s16", (1, 3), 0xFFFE),
        ("mul.lo.s32", (0xFFFFFFFE, 3), 0xFFFFFFFA),
        ("mul.hi.u16", (40000, 21846), 40000 * 21846 >> 16),
        ("mul.wide.s16", (0xFFFF, 128), 0xFFFFFF80),
        ("mul.wide.u16", (0xFFFF, 128), 0xFFFF * 128),
        ("mad.wide.u16", (7, 0x8300, 5), 7 * 0x8300 + 5),
        ("mad.lo.s32", (5, 0xFFFFFFFF, 3), 0xFFFFFFFE),
        ("shl.b32", (1, 40), 0),
        ("shr.u32", (0x80000000, 31), 1),
        ("shr.s32", (0x80000000, 40), 0xFFFFFFFF),
        ("bfe.u32", (0xABCD1234, 4, 8), 0x23),
        ("bfe.s32", (0x40, 6, 1), 0xFFFFFFFF),
        ("bfe.u64", (0xABCD1234, 4, 8), 0x23),
        ("prmt.b32", (0x33221100, 0x77665544, 0x4140), 0x44114400),
        ("prmt.b32", (0x80, 0, 0x8888), 0xFFFFFFFF),
        ("lop3.b32", (0b1100, 0b1010, 0b1001, 0xE8), 0b1000),
        ("min.s32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("min.u32", (0xFFFFFFFF, 1), 1),
        ("rem.s32", (0xFFFFFFF9, 3), 0xFFFFFFFF),
        ("not.b32", (0,), 0xFFFFFFFF),
        ("sub.f16x2", (0x64006408, 0x64086408), 0xC8000000),
        ("fma.rn.bf16x2", (0x43084300, 0x3F803F80, 0xC308C308), 0x0000C100),
        ("add.rn.f32.f16", (0x3C00, 0x3F800000), 0x40000000),
        ("add.rn.f32.bf16", (0x3F80, 0x3F800000), 0x40000000),
        ("max.f32", (0x7FC00000, 0x3F800000), 0x3F800000),
        ("max.f32", (0x3F800000, 0x40000000, 0x40400000), 0x40400000),
        ("ex2.approx.f32", (0x40400000,), 0x41000000),
        ("div.full.f32", (0x40C00000, 0x40000000), 0x40400000),
    ],
)  # fmt: skip
def test_arithmetic(name, given, expected):
    wide = "u8" if name.endswith("64") else "u2" if name.endswith("16") and "f16" not in name else "u4"
    operands = [words(one, kind=wide) for one in given[:2]] + [words(one) for one in given[2:]]
    if name.startswith("add.rn"):
        operands[0] = operands[0].astype("u2")
    value, kind = compute(tuple(name.split(".")), operands)
    assert int(bits(value, kind)[0]) == expected


def test_conversions_and_comparisons():
    def converted(name, *given):
        value, kind = convert(tuple(name.split(".")), list(given))
        return int(bits(value, kind)[0])

    one, two = words(0x3F800000), words(0x40000000)
    assert converted("cvt.rn.f16x2.f32", one, two) == 0x3C004000
    assert converted("cvt.rn.bf16x2.f32", one, two) == 0x3F804000
    # Half way between two: to the even one.
    assert converted("cvt.rn.bf16.f32", words(0x3F808000)) == 0x3F80
    assert converted("cvt.rn.bf16.f32", words(0x3F818000)) == 0x3F82
    assert converted("cvt.s64.s32", words(0xFFFFFFFF)) == (1 << 64) - 1
    assert converted("cvt.u64.u32", words(0xFFFFFFFF)) == 0xFFFFFFFF
    assert converted("cvt.s16.s8", words(0x12FE, kind="u2")) == 0xFFFE
    assert converted("cvt.rzi.s32.f32", words(0xC0200000)) == 0xFFFFFFFE
    assert converted("cvt.rn.f32.s32", words(0xFFFFFFFF)) == 0xBF800000
    nan = words(0x7FC00000)
    assert not compare(("setp", "lt", "f32"), nan, one)[0] and compare(("setp", "ltu", "f32"), nan, one)[0]
    assert compare(("setp", "lt", "s32"), words(0xFFFFFFFF), words(0))[0]
    assert not compare(("setp", "lt", "u32"), words(0xFFFFFFFF), words(0))[0]
