"""Memory that the C libraries hold and don't need: pages of mapped files, freed blocks of the heap.

Both are hints. On a system that doesn't know them nothing happens, and nothing is wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

_MADV_PAGEOUT = 21


def page_out(folder: Path, names: Sequence[str]) -> None:
    """Take this process's mappings of these files out of memory; whoever reads them again gets them back.

    ONNX Runtime keeps the scales mapped that it copied when it packed the weights, and never looks at them.
    """
    wanted = {str(folder / name) for name in names}
    if not wanted:
        return
    with contextlib.suppress(OSError, AttributeError, ValueError):
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] in wanted:
                begin, end = (int(part, 16) for part in fields[0].split("-"))
                madvise(begin, end - begin, _MADV_PAGEOUT)


def give_back() -> None:
    """Let the C library return freed memory to the system."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
