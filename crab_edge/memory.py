"""How much memory this process can still get."""

from __future__ import annotations

from pathlib import Path

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
