"""What a launch asks of a multiprocessor, counted on the machine: instructions, and turns at shared memory.

Times aren't to be had without a GPU, but a bound is: a multiprocessor issues four warps' instructions a clock
and its shared memory serves 128 bytes of different banks a clock (NVIDIA, CUDA C++ Programming Guide).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

BANKS = 32


class Counts:
    """Of one launch. instructions: warps' instructions by name; turns: of shared memory by what asks for it
    (ld, st, ldmatrix, stmatrix, cp), and least: how few would do if no two addresses met in a bank.
    """

    def __init__(self) -> None:
        self.instructions: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.least: Counter[str] = Counter()

    def instruction(self, name: str, warps: int) -> None:
        """An instruction of so many warps."""
        self.instructions[name] += warps

    def shared(self, name: str, warp: NDArray[np.int64], address: NDArray[Any], size: int) -> None:
        """An access of `size` bytes by each thread: a turn is 32 threads' or, of 8 or 16 bytes, fewer."""
        together = 32 if size <= 4 else 128 // size
        begins = np.flatnonzero(np.r_[True, warp[1:] != warp[:-1]])
        for begin, end in zip(begins, [*begins[1:], len(warp)], strict=True):
            for first in range(begin, end, together):
                word = address[first : min(first + together, end)].astype(np.int64)[:, None] // 4
                words = np.unique(word + np.arange(max(1, size // 4)))
                self.turns[name] += int(np.bincount(words % BANKS).max())
                self.least[name] += -(-len(words) // BANKS)
