"""Executes a kernel: an instruction at a time, on arrays of one element for every thread of every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx import arithmetic, warps
from tests.ptx.count import Counts
from tests.ptx.memory import SHARED, Global, Shared
from tests.ptx.parse import Instruction, Program, PtxError, parse

Array = NDArray[Any]
Mask = NDArray[np.bool_]

_FAMILIES = {
    "mov": "_move", "ld": "_load", "st": "_store", "cp": "_copy", "setp": "_compare", "selp": "_select",
    "cvt": "_convert", "shfl": "_shuffle", "mma": "_product", "ldmatrix": "_from_matrices",
    "stmatrix": "_to_matrices", "bar": "_barrier",
}  # fmt: skip
_MAX_THREADS = 1 << 15
_MAX_STEPS = 1 << 20
_UNDEFINED = 0x7FFF7FFF7FFF7FFF
"""What a register holds that nothing was written to: NaNs."""


def launch(
    ptx: str,
    memory: Global,
    arguments: Sequence[float],
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    only: Callable[[int, int, int], bool] | None = None,
    counts: Counts | None = None,
) -> None:
    """Launches the kernel of `ptx`.

    arguments: addresses and numbers in the order of the parameters; shared: bytes of shared memory a
    block; only: which blocks (x, y, z) of the grid are executed, all of them without it; counts: is told of
    every instruction. PtxError for whatever a GPU might let pass and a right program doesn't do: accesses
    outside of an array, reads of memory that nobody wrote, misaligned ones, races between warps for shared
    memory, copies that nobody waited for, barriers that not all threads come to.
    """
    program = parse(ptx)
    if program.threads is not None and program.threads != threads:
        raise PtxError(f"launched with {threads} threads, compiled for {program.threads}")
    if len(arguments) != len(program.parameters):
        raise PtxError(f"launched with {len(arguments)} arguments, takes {len(program.parameters)}")
    all_blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    blocks = np.array([one for one in all_blocks if only is None or only(*one)])
    step = max(1, _MAX_THREADS // threads)
    for start in range(0, len(blocks), step):
        some = blocks[start : start + step]
        with np.errstate(all="ignore"):
            _Run(program, memory, arguments, grid, some, threads, shared, counts).run()


class _Run:
    def __init__(
        self,
        program: Program,
        memory: Global,
        arguments: Sequence[float],
        grid: tuple[int, int, int],
        blocks: Array,
        threads: int,
        shared: int,
        counts: Counts | None,
    ) -> None:
        count = len(blocks) * threads
        self._program, self._memory, self._count = program, memory, count
        self._name, self._counts = "", counts
        if counts is None:
            self._shared = Shared(len(blocks), shared)
        else:
            self._shared = Shared(len(blocks), shared, lambda *access: counts.shared(self._name, *access))
        self._block = np.repeat(np.arange(len(blocks)), threads)
        self._warp = np.arange(count) // 32
        self._arguments = {
            name: int(np.float32(value).view(np.uint32)) if kind == "f32" else value
            for (name, kind), value in zip(program.parameters, arguments, strict=True)
        }
        tid = np.tile(np.arange(threads), len(blocks))
        special = {"%tid.x": tid, "%laneid": tid % 32, "%tid.y": 0, "%tid.z": 0, "%ntid.x": threads}
        for i, axis in enumerate("xyz"):
            special[f"%ctaid.{axis}"] = np.repeat(blocks[:, i], threads)
            special[f"%nctaid.{axis}"] = grid[i]
        self._registers = {
            name: np.broadcast_to(np.asarray(value, np.uint32), (count,)).copy()
            for name, value in special.items()
        }
        self._pc = np.zeros(count, np.int64)
        # Copies that set out: block, group, warp, address and data of each thread's. A block's groups are
        # numbered, and the one that is open has the number of those committed.
        self._copies: list[tuple[Array, ...]] = []
        self._committed = np.zeros(len(blocks), np.int64)

    def run(self) -> None:
        """Threads that stand at the earliest instruction go on, so those that part meet again."""
        end = len(self._program.instructions)
        for _ in range(_MAX_STEPS):
            at = int(self._pc.min())
            if at >= end:
                return
            instruction = self._program.instructions[at]
            try:
                self._step(instruction, self._pc == at, at)
            except (PtxError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                what = error if isinstance(error, PtxError) else f"isn't known ({error!r})"
                raise PtxError(f"{self._program.entry}, {instruction}: {what}") from error
        raise PtxError(f"{self._program.entry} hasn't ended after {_MAX_STEPS} instructions")

    def _step(self, instruction: Instruction, mask: Mask, at: int) -> None:
        self._pc[mask] = at + 1
        name = self._name = instruction.parts[0]
        if self._counts is not None:
            self._counts.instruction(name, int(mask.reshape(-1, 32).any(1).sum()))
        if instruction.guard is not None:
            guard = self._read(instruction.guard)
            mask = mask & (~guard if instruction.inverted else guard)
        if name in ("bra", "ret", "exit"):
            target = len(self._program.instructions)
            if name == "bra":
                target = self._program.labels[str(instruction.operands[0])]
            self._pc[mask] = target
        elif name in _FAMILIES:
            if mask.any() or name == "bar":
                getattr(self, _FAMILIES[name])(instruction, instruction.parts, mask)
        else:
            operands = [str(one) for one in instruction.operands]
            kinds = instruction.parts
            given = [self._read(one, kinds[-1]) for one in operands[1:]]
            self._write(operands[0], *arithmetic.compute(kinds, given), mask)

    # Registers

    def _read(self, operand: str, kind: str = "b32") -> Array:
        """A register, a constant of `kind`'s width, or the place of a symbol, as unsigned integers."""
        if operand in self._registers:
            return self._registers[operand]
        width = 32 if kind.endswith("f16x2") else int("".join(c for c in kind if c.isdigit()) or 32)
        if operand[:2] in ("0f", "0F"):
            value = int(operand[2:], 16)
        elif operand == "global_smem":
            value = SHARED
        elif operand.lstrip("-")[:1].isdigit():
            value = int(operand.rstrip("U"), 0)
        elif operand.startswith("%") or operand.isalpha():
            # Compilers join undefined halves with defined ones; what is computed from them becomes a NaN.
            self._program.width(operand)
            value = _UNDEFINED
        else:
            raise PtxError(f"operand {operand} isn't known")
        if kind == "pred":
            return np.full(self._count, value != 0)
        return np.full(self._count, value & ((1 << width) - 1), f"u{width // 8}")

    def _write(self, register: str, value: Array, kind: str, mask: Mask) -> None:
        if register == "_":
            return
        raw = arithmetic.bits(value, kind)
        width = self._program.width(register)
        if width > 1 and raw.dtype.itemsize * 8 < width and kind[0] == "s":
            raw = arithmetic.view(raw, kind).astype(f"i{width // 8}").view(f"u{width // 8}")
        raw = raw.astype(bool if width == 1 else f"u{width // 8}")
        if not mask.all():
            old = self._registers.get(register)
            raw = np.where(mask, raw, np.array(_UNDEFINED).astype(raw.dtype) if old is None else old)
        self._registers[register] = raw

    def _address(self, operand: str) -> Array:
        """What stands in brackets: a register or symbol, and bytes to add."""
        base, _, offset = operand.replace(" ", "").partition("+")
        return self._read(base, "b64").astype(np.int64) + int(offset or "0", 0)

    # Instructions

    def _move(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, source = instruction.operands
        kind = parts[-1]
        if isinstance(source, tuple):
            self._write(str(to), self._joined([self._read(one) for one in source], kind), kind, mask)
        elif isinstance(to, tuple):
            value = self._read(source, kind)
            size = int(kind[1:]) // len(to)
            for i, one in enumerate(to):
                self._write(one, value >> np.array(size * i, value.dtype), f"b{size}", mask)
        else:
            self._write(str(to), self._read(source, kind), kind, mask)

    @staticmethod
    def _joined(values: list[Array], kind: str) -> Array:
        wide = np.dtype(f"u{int(kind[1:]) // 8}")
        size = wide.itemsize * 8 // len(values)
        result = np.zeros(len(values[0]), wide)
        for i, value in enumerate(values):
            result |= value.astype(wide) << np.array(size * i, wide)
        return result

    def _load(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, source = instruction.operands
        registers = to if isinstance(to, tuple) else (to,)
        kind = parts[-1]
        if parts[1] == "param":
            base = str(source)
            if base not in self._arguments:
                raise PtxError(f"no parameter {base}")
            width = int(kind[1:])
            value = np.full(self._count, self._arguments[base] & ((1 << width) - 1), f"u{width // 8}")
            return self._write(registers[0], value, kind, mask)
        each = int(kind[1:]) // 8
        where = self._address(str(source))[mask]
        if self._is_global(parts):
            data = self._memory.load(where, each * len(registers))
        else:
            data = self._shared.load(self._block[mask], self._warp[mask], where, each * len(registers))
        numbers = np.ascontiguousarray(data).view(f"<u{each}")
        for i, register in enumerate(registers):
            value = np.zeros(self._count, f"u{each}")
            value[mask] = numbers[:, i]
            self._write(register, arithmetic.view(value, kind), kind, mask)

    @staticmethod
    def _is_global(parts: tuple[str, ...]) -> bool:
        if parts[1] not in ("global", "shared", "shared_cta") or set(parts[2:-1]) - {"v2", "v4"}:
            raise PtxError("isn't known")
        return parts[1] == "global"

    def _store(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, source = instruction.operands
        registers = source if isinstance(source, tuple) else (source,)
        kind = parts[-1]
        where = self._address(str(to))[mask]
        each = int(kind[1:]) // 8
        values = np.stack([self._read(one, kind)[mask].astype(f"<u{each}") for one in registers], -1)
        data = values.view(np.uint8)
        if self._is_global(parts):
            self._memory.store(where, data)
        else:
            self._shared.store(self._block[mask], self._warp[mask], where, data)

    def _copy(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        """cp.async: what it brings is there when the thread has waited for its group."""
        if parts[1] != "async":
            raise PtxError("isn't known")
        if parts[2] == "commit_group":
            self._committed[self._whole_blocks(mask)] += 1
            return
        if parts[2] == "wait_group":
            return self._wait(self._whole_blocks(mask), int(str(instruction.operands[0])))
        to, source, size = (str(one) for one in instruction.operands[:3])
        count = int(size, 0)
        taken = self._read(str(instruction.operands[3])) if len(instruction.operands) > 3 else None
        data = np.zeros((self._count, count), np.uint8)
        reads = mask if taken is None else mask & (taken > 0)
        if taken is not None and (~np.isin(taken[mask], (0, count))).any():
            raise PtxError("copies of a part aren't known")
        data[reads] = self._memory.load(self._address(source)[reads], count)
        where = self._address(to)[mask]
        block, warp = self._block[mask], self._warp[mask]
        self._shared.begin_copy(block, warp, where, data[mask])
        self._copies.append((block, self._committed[block], warp, where, data[mask]))

    def _wait(self, blocks: Array, left: int) -> None:
        """Ends the copies of these blocks' groups but the newest `left`."""
        still = []
        for block, group, *rest in self._copies:
            done = np.isin(block, blocks) & (group < self._committed[block] - left)
            if done.any():
                self._shared.end_copy(block[done], *(one[done] for one in rest))
            if not done.all():
                still.append(tuple(one[~done] for one in (block, group, *rest)))
        self._copies = still

    def _compare(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, a, b = (str(one) for one in instruction.operands)
        value = arithmetic.compare(parts, self._read(a, parts[-1]), self._read(b, parts[-1]))
        self._write(to, value, "pred", mask)

    def _select(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, a, b, which = (str(one) for one in instruction.operands)
        value = np.where(self._read(which), self._read(a, parts[-1]), self._read(b, parts[-1]))
        self._write(to, value, "b" + parts[-1].lstrip("bfsu"), mask)

    def _convert(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, *given = (str(one) for one in instruction.operands)
        self._write(to, *arithmetic.convert(parts, [self._read(one, parts[-1]) for one in given]), mask)

    def _barrier(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        if parts == ("bar", "warp", "sync"):
            return self._whole_warps(mask)
        if parts != ("bar", "sync") or instruction.operands != ("0",):
            raise PtxError("isn't known")
        self._shared.barrier(self._whole_blocks(mask))

    def _whole_blocks(self, mask: Mask) -> Array:
        """The blocks that are here, with all of their threads."""
        here = mask.reshape(len(self._committed), -1)
        if (here.any(1) != here.all(1)).any():
            raise PtxError("not all threads of a block have come here")
        return np.flatnonzero(here.all(1))

    def _whole_warps(self, mask: Mask) -> None:
        warps_here = mask.reshape(-1, 32)
        if (warps_here.any(1) != warps_here.all(1)).any():
            raise PtxError("some threads of a warp are elsewhere")

    def _lanes(self, value: Array) -> Array:
        return value.reshape(-1, 32)

    def _shuffle(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        self._whole_warps(mask)
        to, value, by, clamp, members = (str(one) for one in instruction.operands)
        if (self._read(members) != 0xFFFFFFFF).any() or parts[1] != "sync":
            raise PtxError("shuffles of some lanes aren't known")
        given = (self._lanes(self._read(one)).astype(np.int64) for one in (by, clamp))
        result = warps.shuffle(parts[2], self._lanes(self._read(value)), *given)
        self._write(to, result.reshape(-1), "b32", mask)

    def _product(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        self._whole_warps(mask)
        kind = parts[-2]
        expected = ("mma", "sync", "aligned", "m16n8k16", "row", "col", "f32", kind, kind, "f32")
        if parts != expected or kind not in ("f16", "bf16"):
            raise PtxError("isn't known")
        to, *given = instruction.operands
        a, b, c = ([self._lanes(self._read(one)) for one in group] for group in given)
        for register, value in zip(to, warps.product(kind, a, b, c), strict=True):
            self._write(register, value.reshape(-1), "b32", mask)

    def _matrix_rows(self, parts: tuple[str, ...], operand: str, mask: Mask) -> tuple[int, Mask, Array]:
        """How many 8x8 matrices, which threads give the address of a row, and the addresses."""
        self._whole_warps(mask)
        if parts[3] != "m8n8" or parts[-1] != "b16" or "shared" not in parts:
            raise PtxError("isn't known")
        count = int(parts[4][1:])
        giving = mask & (np.arange(self._count) % 32 < 8 * count)
        return count, giving, self._address(operand)[giving]

    def _from_matrices(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, source = instruction.operands
        count, giving, where = self._matrix_rows(parts, str(source), mask)
        data = self._shared.load(self._block[giving], self._warp[giving], where, 16)
        values = warps.matrices_from(data.reshape(-1, count, 8, 16), "trans" in parts)
        for register, value in zip(to, values, strict=True):
            whole = np.zeros(self._count, np.uint32)
            whole[mask] = value.reshape(-1)
            self._write(register, whole, "b32", mask)

    def _to_matrices(self, instruction: Instruction, parts: tuple[str, ...], mask: Mask) -> None:
        to, source = instruction.operands
        _, giving, where = self._matrix_rows(parts, str(to), mask)
        registers = [self._lanes(self._read(one)[mask]) for one in source]
        data = warps.matrices_to(registers, "trans" in parts).reshape(-1, 16)
        self._shared.store(self._block[giving], self._warp[giving], where, data)
