"""How much memory this process has and can still get, and giving back what C libraries hold for nothing."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path

_MADV_PAGEOUT = 21
_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int | None:
    """Bytes that can be allocated without swapping: the machine's, bounded by the container's limit.

    Linux only; None where it can't be measured.
    """
    found = [free for free in (_machine(), _container()) if free is not None]
    return min(found, default=None)


def _machine() -> int | None:
    try:
        return _numbers(_MEMINFO).get("MemAvailable:", 0) * 1024 or None
    except (OSError, ValueError):
        return None


def _container() -> int | None:
    """What the cgroup leaves, its reclaimable file cache not counted as used; None without a limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((_CGROUP / "memory.current").read_text())
        cached = _numbers(_CGROUP / "memory.stat")
        reclaimable = cached.get("inactive_file", 0) + cached.get("active_file", 0)
        return max(0, int(limit) - used + reclaimable)
    except (OSError, ValueError):
        return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number ..." of a file."""
    words = (line.split() for line in path.read_text().splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1}


def total_bytes() -> int | None:
    """Memory of the machine, bounded by the container's limit; None where it can't be measured."""
    found = []
    try:
        found.append(_numbers(_MEMINFO)["MemTotal:"] * 1024)
        found.append(int((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError, KeyError):
        pass
    return min(found, default=None)


def peak_bytes() -> int | None:
    """The most that this process ever had resident; None where it can't be measured."""
    # Not ru_maxrss: that starts at what the parent had when it forked.
    return _status("VmHWM:")


def resident_bytes() -> int | None:
    """What this process has resident now; None where it can't be measured."""
    return _status("VmRSS:")


def _status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    except (OSError, ValueError, StopIteration, IndexError):
        return None


def page_out(folder: Path, names: Sequence[str]) -> None:
    """Take this process's mappings of these files out of memory; whoever reads them again gets them back.

    A hint: on a system that doesn't know it nothing happens. ONNX Runtime keeps the scales mapped that it
    copied when it packed the weights, and never looks at them.
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
    """Let the C library return freed memory to the system, where it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
