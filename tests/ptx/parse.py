"""PTX text -> a list of instructions with their operands taken apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

_STATEMENT = re.compile(r"^(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{\n(.*?)\n\}", re.DOTALL)
_WIDTH = re.compile(r"\d+")


class PtxError(AssertionError):
    """What the machine can't execute, or what a program must not do."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its operands as text or, where braces hold several, as tuples of text.

    guard: the predicate register that it depends on, if any; inverted: whether on its being false.
    """

    name: str
    operands: tuple[str | tuple[str, ...], ...]
    guard: str | None
    inverted: bool
    line: int

    @cached_property
    def parts(self) -> tuple[str, ...]:
        """`ld.global.v2.b32` taken apart at its dots."""
        return tuple(self.name.replace("::", "_").split("."))

    def __str__(self) -> str:
        return f"line {self.line}: {self.name} {self.operands}"


@dataclass
class Program:
    """A kernel: its name, parameters (name, type), threads it demands, instructions, where its labels point,
    and the bits of registers by name or by what stands before their number (1 for a predicate).
    """

    entry: str
    parameters: list[tuple[str, str]]
    threads: int | None
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)

    def width(self, register: str) -> int:
        """Bits of a register."""
        width = self.widths.get(register) or self.widths.get(register.rstrip("0123456789"))
        if width is None:
            raise PtxError(f"register {register} isn't declared")
        return width


def parse(ptx: str) -> Program:
    """The one kernel of a text."""
    # Comments go, their lines stay, so that messages name the text's own lines.
    ptx = re.sub(r"//[^\n]*", "", ptx)
    found = _ENTRY.search(ptx)
    if found is None:
        raise PtxError("no kernel in the text")
    entry, parameters, head, body = found.groups()
    threads = re.search(r"\.reqntid\s+(\d+)", head)
    pieces = [part.split() for part in parameters.split(",") if part.strip()]
    program = Program(
        entry, [(one[-1], one[1].lstrip(".")) for one in pieces], int(threads[1]) if threads else None
    )
    statement = ""
    first = ptx.count("\n", 0, found.start(4)) + 1
    for line, text in enumerate((one.strip() for one in body.split("\n")), first):
        if text.endswith(":"):
            program.labels[text[:-1]] = len(program.instructions)
        elif text and text not in "{}" and not text.startswith((".loc", ".pragma")):
            statement += " " + text
            if text.endswith(";"):
                _add(program, statement.strip(" ;"), line)
                statement = ""
    return program


def _add(program: Program, text: str, line: int) -> None:
    if text.startswith(".reg"):
        _, kind, names = text.split(None, 2)
        bits = _WIDTH.search(kind)
        for name in names.split(","):
            program.widths[name.split("<")[0].strip()] = int(bits[0]) if bits else 1
        return
    found = _STATEMENT.match(text)
    if found is None:
        raise PtxError(f"line {line}: can't read {text!r}")
    inverted, guard, name, rest = found.groups()
    operands = tuple(_operand(one.strip()) for one in _OPERAND.findall(rest))
    program.instructions.append(Instruction(name, operands, guard, bool(inverted), line))


def _operand(text: str) -> str | tuple[str, ...]:
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    return text[1:-1].strip() if text.startswith("[") else text
