"""The Triton kernels in Triton's interpreter against float64 and the reference, on odd shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("interpreted_kernels.py")
# Of the largest value: half a unit of the result's type (2^-11, 2^-8), and float32 sums.
FLOAT16, BFLOAT16 = 6e-4, 5e-3
CASES = (
    "one row", "five rows", "leading axes", "no row", "prefill", "block 16", "block 32", "block 256",
    "8 bits, block 16", "8 bits, part of a block", "8 bits, vision width", "bfloat16", "two planes",
    "two planes, rows", "last plane part of a block", "planes of block 32", "q, k, v", "gate, up",
    "experts beside", "experts beside, rows", "experts", "experts of 4 bits", "route", "route of 4 bits",
    "route, q k v", "route, prefill", "route, bfloat16", "float32 scales",
)  # fmt: skip


@pytest.fixture(scope="module")
def errors():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_agree_with_float64(errors, case):
    assert errors[case] <= (BFLOAT16 if "bfloat16" in case else FLOAT16)


def test_the_bound_would_notice_one_wrong_code(errors):
    assert errors["a wrong code"] > 2 * FLOAT16


def test_offsets_beyond_32_bits_are_refused(errors):
    assert errors["too long"] == 1


def test_every_case_is_looked_at(errors):
    assert set(errors) == {*CASES, "a wrong code", "too long"}
