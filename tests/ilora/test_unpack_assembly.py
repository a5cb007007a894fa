"""The kernels' inline assembly, executed here on every code: the interpreter of Triton leaves it out."""

import re
from pathlib import Path

import numpy as np
import pytest

import crab_edge

SOURCE = Path(crab_edge.__file__).parent / "ilora" / "triton_kernels.py"
PATTERN = r'"""\s*\{\s*(\.reg.*?)\}\s*""",\s*"([^"]+)",.*?dtype=\(?tl\.(\w+)'
BLOCKS = re.findall(PATTERN, SOURCE.read_text(), re.DOTALL)
HALVES = np.arange(1 << 16, dtype=np.uint16)
FLOATS = {
    "f16": HALVES.view(np.float16).astype(np.float64),
    "bf16": (HALVES.astype(np.uint32) << 16).view(np.float32).astype(np.float64),
}


def two(word, kind):
    """The two numbers in a register."""
    return [FLOATS[kind][word & 0xFFFF], FLOATS[kind][word >> 16]]


def word(values, kind):
    """Two numbers as a register; they must be exact in the type."""
    halves = []
    for value in values:
        if kind == "f16":
            half = int(np.float16(value).view(np.uint16))
        else:
            half = int(np.float32(value).view(np.uint32)) >> 16
        assert FLOATS[kind][half] == value, f"{value} isn't exact in {kind}"
        halves.append(half)
    return halves[0] | halves[1] << 16


def run(assembly, source, packed):
    """The registers after the instructions, `packed` in operand `source`."""
    registers = {source: packed}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 0)

    for line in (part.strip() for part in assembly.split(";")):
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(None, 1)
        to, *operands = (part.strip() for part in rest.split(","))
        a = [value(one) for one in operands]
        if name == "mov.b32":
            result = a[0]
        elif name == "and.b32":
            result = a[0] & a[1]
        elif name == "shr.u32":
            result = a[0] >> a[1]
        elif name == "prmt.b32":
            places = (a[0] | a[1] << 32).to_bytes(8, "little")
            chosen = [a[2] >> 4 * i & 0xF for i in range(4)]
            assert max(chosen) < 8
            result = int.from_bytes(bytes(places[one] for one in chosen), "little")
        elif name == "sub.f16x2":
            x, y = (two(one, "f16") for one in a)
            result = word([x[0] - y[0], x[1] - y[1]], "f16")
        elif name == "fma.rn.bf16x2":
            x, y, z = (two(one, "bf16") for one in a)
            result = word([x[0] * y[0] + z[0], x[1] * y[1] + z[1]], "bf16")
        else:
            raise AssertionError(f"unknown instruction {name}")
        registers[to] = result
    return registers


@pytest.mark.parametrize("index", range(4))
def test_every_code_becomes_its_value(index):
    assembly, constraints, dtype = BLOCKS[index]
    bits, kind = (4, 4, 8, 8)[index], ("f16", "bf16")[index % 2]
    assert dtype == {"f16": "float16", "bf16": "bfloat16"}[kind]
    outputs = constraints.count("=&r")
    assert outputs == 16 // bits and constraints == ",".join(["=&r"] * outputs + ["r"])
    for code in range(256):
        # Neighbours differ, so that a byte in the wrong place shows.
        codes = [code, (code + 85) % 256, (7 * code + 3) % 256, 255 - code]
        registers = run(assembly, f"${outputs}", int.from_bytes(bytes(codes), "little"))
        values = [number for i in range(outputs) for number in two(registers[f"${i}"], kind)]
        if bits == 8:
            assert values == [one - 128 for one in codes]
        else:
            assert values == [(one & 15) - 8 for one in codes] + [(one >> 4) - 8 for one in codes]


def test_there_are_four():
    assert len(BLOCKS) == 4
