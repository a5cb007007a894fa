"""The Triton kernels between a decoder's products: interpreted on the CPU, and compiled for a card."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
triton = pytest.importorskip("triton")

from crab_edge.engines import _torch_kernels as kernels  # noqa: E402

NAMES = ("_add_norm", "_silu_mul", "_turn_and_store", "_attend_part", "_join_parts")


def test_interpreted_kernels_equal_torch():
    cases = Path(__file__).with_name("torch_kernels_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_depths_that_the_step_takes():
    assert [depth for depth in range(8, 257) if kernels.FastStep.takes(depth)] == [16, 32, 64, 128, 256]


CONSTANTS = {"ADDS": True, "HALF": 64, "PART": 128, "ROWS": 16, "DEPTH": 128, "WIDE": 32}
TYPES = {
    "residual": "*fp32",
    "weight": "*fp32",
    "total_out": "*fp32",
    "past": "*i64",
    "epsilon": "fp32",
    "scale": "fp32",
    **dict.fromkeys(("cos", "sin", "tops", "sums", "parts"), "*fp32"),
    **dict.fromkeys(
        ("width", "gate_stride", "up_stride", "count", "capacity", "heads", "kv_heads", "group"), "i32"
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_compile_for_a_card(name, capability=90):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels, name)
    names = list(inspect.signature(kernel.fn).parameters)
    constants = {each.name: CONSTANTS.get(each.name, 64) for each in kernel.params if each.is_constexpr}
    signature = {key: "constexpr" if key in constants else TYPES.get(key, "*bf16") for key in names}
    source = ASTSource(kernel, signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert ("mma" in ptx) == (name == "_attend_part")
