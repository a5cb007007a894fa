"""The kernels' PTX, instruction by instruction: the text that a driver would compile, inline assembly,
tensor cores and asynchronous copies included, against the operators' definition in torch.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from crab_edge.ilora.torch_ops import dequantize  # noqa: E402
from crab_edge.ilora.triton_compile import ARCHITECTURES, linear_constants  # noqa: E402
from tests.ilora.ptx_cases import Case, experts, linear, route  # noqa: E402
from tests.ptx import PtxError  # noqa: E402
from tests.ptx.count import Counts  # noqa: E402

HALF, BRAIN = torch.float16, torch.bfloat16
# Of the largest value: a unit in the last place of the result's type; sums are float32.
BOUND = {HALF: 1e-3, BRAIN: 8e-3}
CASES = {
    "one row": (90, linear, (1, 256, 256, 4, 128), {"k2": 384, "planes": 2}),
    "one row, part of a tile": (90, linear, (1, 200, 128, 4, 32), {"k2": 96, "planes": 2, "bias": True}),
    "nine rows in a form for one": (87, linear, (9, 96, 256, 4, 128), {"k2": 128, "planes": 1}),
    "five rows": (89, linear, (5, 192, 256, 4, 128), {"k2": 384, "planes": 2, "form": 8}),
    "block 16": (90, linear, (3, 100, 100, 4, 16), {"form": 8}),
    "block 16, planes": (90, linear, (1, 100, 96, 4, 16), {"k2": 48, "planes": 2}),
    "block 16, experts beside": (87, linear, (3, 100, 96, 4, 32), {"k2": 48, "beside": (4, 16), "form": 8}),
    "8 bits, block 16": (87, linear, (1, 100, 96, 8, 16), {"k2": 48, "planes": 1}),
    "block 16, prefill": (120, linear, (70, 100, 100, 4, 16), {"form": 64}),
    "8 bits, part of a block": (120, linear, (2, 200, 300, 8, 64), {"form": 8, "bias": True}),
    "last plane part of a block": (90, linear, (1, 96, 256, 4, 128), {"k2": 200, "planes": 1}),
    "experts beside": (86, linear, (1, 128, 256, 4, 128), {"k2": 384, "beside": (8, 64)}),
    "q, k, v": (
        90, linear, (1, 320, 256, 4, 128), {"k2": 128, "planes": 2, "splits": (256, 288), "bias": True},
    ),
    "q, k, v of five rows": (
        87, linear, (5, 320, 256, 4, 128), {"k2": 128, "planes": 2, "splits": (256, 288)},
    ),
    "gate, up of a prompt": (
        90, linear, (70, 256, 256, 4, 128), {"k2": 128, "planes": 1, "splits": (128,), "form": 64},
    ),
    "float32 scales": (90, linear, (1, 96, 256, 4, 128), {"k2": 128, "planes": 1, "scales": np.float32}),
    "experts beside, bias": (90, linear, (9, 96, 256, 4, 32), {"k2": 96, "beside": (8, 16), "bias": True}),
    "prefill": (90, linear, (70, 200, 256, 4, 128), {"k2": 128, "planes": 2, "form": 64}),
    "prefill, block 32": (
        87, linear, (130, 96, 128, 4, 32), {"k2": 96, "planes": 1, "form": 64, "bias": True},
    ),
    "prefill of towers": (120, linear, (65, 130, 200, 8, 128), {"form": 64, "bias": True}),
    "experts": (90, experts, (3, 200, 384, 8, 64), {"form": 8}),
    "experts, prefill": (120, experts, (20, 130, 96, 4, 32), {"form": 64}),
    "route": (90, route, (1, 256, 8, 128), {"rank": 128, "experts": 3, "groups": 3}),
    "route of odd sizes": (87, route, (3, 200, 4, 32), {"rank": 30, "experts": 5, "groups": 2, "form": 8}),
    "route, prefill": (120, route, (70, 256, 8, 64), {"rank": 64, "experts": 3, "groups": 1, "form": 64}),
}  # fmt: skip


def check(case: Case, sm: int, blocks: set[int] | None = None) -> None:
    got = case.run(case.compile(sm), None if blocks is None else lambda x, y, z: y in blocks)
    assert case.error(got, blocks and len(blocks)) <= BOUND[case.expected.dtype]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["float16", "bfloat16"])
def test_kernels_compute_what_the_operators_say(name, dtype):
    sm, make, sizes, options = CASES[name]
    check(make(*sizes, dtype=dtype, **options), sm)


@pytest.mark.parametrize("sm", sorted(ARCHITECTURES))
def test_every_architecture(sm):
    check(linear(1, 64, 256, 4, 128, k2=384, planes=2), sm)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=["float16", "bfloat16"])
@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (8, 16), (8, 128)])
def test_every_code_becomes_its_value(bits, block, dtype):
    """Rows of the unit matrix pick the weight's columns out, one by one and without rounding."""
    codes = torch.arange(32 * block * bits // 8, dtype=torch.int64).reshape(32, 1, -1) % 256
    q, scales, x = codes.to(torch.uint8), torch.ones(1, 32, dtype=HALF).t(), torch.eye(block, dtype=dtype)
    constants = linear_constants(8, 32, block, bits, block)
    values = dequantize(q, scales, bits, block)
    assert len(values.unique()) == 1 << bits
    case = Case("linear", constants, (x, q, scales), values.t().to(dtype))
    assert (case.run(case.compile(90)) == case.expected).all()


# A few blocks, at the ends and where one linear becomes the next, of the launches of one decode step at 7B.
FOLDED = {"k2": 384, "planes": 2}
ADAPTER = {"rank": 128, "experts": 3}
SEVEN_B = {
    "gate and up": (linear, (1, 37888, 3584, 4, 128), {**FOLDED, "splits": (18944,)}, {0, 295, 296, 591}),
    "q, k, v": (
        linear, (1, 4608, 3584, 4, 128), {**FOLDED, "splits": (3584, 4096), "bias": True},
        {0, 223, 224, 255, 256, 287},
    ),
    "down": (linear, (1, 3584, 18944, 4, 128), FOLDED, {0, 223}),
    "down, experts of 8 bits": (linear, (1, 3584, 18944, 4, 128), {"k2": 384, "beside": (8, 128)}, {7}),
    "route of q, k, v": (route, (1, 3584, 8, 128), {**ADAPTER, "groups": 3}, {0, 15, 16, 47}),
    "route of down": (route, (1, 18944, 8, 128), {**ADAPTER, "groups": 1}, {0, 31}),
}  # fmt: skip


@pytest.mark.parametrize("name", SEVEN_B)
def test_launches_of_a_7b_step(name):
    make, sizes, options, blocks = SEVEN_B[name]
    check(make(*sizes, **options), 90, blocks)


NARROW = {
    "narrow": (linear, (1, 64, 4096, 4, 128), {}),
    "wide": (linear, (1, 16384, 1024, 4, 128), {}),
    "narrow, 8 bits": (linear, (1, 64, 2048, 8, 128), {}),
    "route": (route, (1, 2048, 8, 128), {**ADAPTER, "groups": 3}),
    "route of many columns": (route, (1, 9216, 8, 128), {**ADAPTER, "groups": 1}),
}


@pytest.mark.parametrize("name", NARROW)
def test_rows_of_a_tile_lie_in_different_banks(name):
    """Codes come to shared memory and leave it in as few turns as there can be."""
    make, sizes, options = NARROW[name]
    case, counts = make(*sizes, **options), Counts()
    case.run(case.compile(90), lambda x, y, z: y == 1, counts)
    assert counts.turns["ldmatrix"] and counts.turns["cp"]
    for kind in ("ldmatrix", "cp"):
        assert counts.turns[kind] == counts.least[kind]


def test_a_barrier_left_out_shows():
    """The race the machine is there for: without a barrier the kernel reads what others are writing."""
    case = linear(1, 64, 4096, 4, 128, k2=384, planes=2)
    made = case.compile(90)
    before, *after = re.split(r"(?=\bbar\.sync)", made.ptx)
    caught = 0
    for left_out in range(len(after)):
        parts = [f"// {text}" if i == left_out else text for i, text in enumerate(after)]
        try:
            case.run(dataclasses.replace(made, ptx=before + "".join(parts)))
        except PtxError as error:
            assert "race" in str(error)
            caught += 1
    # Triton is on the safe side with some, older versions with more.
    assert len(after) > 5 and caught > len(after) / 2


def test_a_wait_too_short_shows():
    case = linear(1, 64, 4096, 4, 128)
    made = case.compile(90)
    longer = re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda m: m[1] + str(int(m[2]) + 1), made.ptx)
    with pytest.raises(PtxError, match="still on its way"):
        case.run(dataclasses.replace(made, ptx=longer))


def test_operands_in_another_order_show():
    case = linear(1, 64, 256, 4, 128, k2=384, planes=2)
    x, z, *rest = case.operands
    swapped = Case(case.kernel, case.constants, (z, x, *rest), case.expected)
    with pytest.raises(PtxError, match="outside of every array"):
        swapped.run(case.compile(90))
