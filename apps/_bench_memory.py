"""What the machine can do: memory bandwidth, names and versions.

Run as a program it measures the read bandwidth in a process of its own: `THREADS [MEGABYTES]` -> one JSON
line.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_CPU = Path("/sys/devices/system/cpu")
# Enough that what is left in the last-level cache from the pass before doesn't count.
_CACHES = 16
_PASSES = 8
PACKAGES = ("onnxruntime", "torch", "transformers", "llama_cpp_python", "gguf", "numpy", "crab-edge")


def read_bandwidth(threads: int, megabytes: int = 0) -> float:
    """Bytes per second that `threads` cores read from memory: the best of several passes over a large array.

    megabytes: size of the array; 0 = sixteen times the last-level cache, at least 512 MB.
    """
    import numpy as np

    size = megabytes * 1_000_000 or max(512_000_000, _CACHES * last_level_cache())
    parts = [np.ones(size // 4 // threads, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(_PASSES):
            start = time.perf_counter()
            # A maximum is a load and one vector instruction; a sum's additions would wait for each other.
            list(pool.map(np.max, parts))
            best = max(best, threads * parts[0].nbytes / (time.perf_counter() - start))
    return best


def fresh_read_bandwidth(threads: int, megabytes: int = 0) -> float:
    """`read_bandwidth` in a process of its own, so that its memory is fresh and given back."""
    command = [sys.executable, "-m", "crab_edge_apps._bench_memory", str(threads), str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["bytes_per_s"])


def last_level_cache() -> int:
    """Bytes of the first core's largest cache; 0 where the kernel doesn't say."""
    sizes = [0]
    for path in _CPU.glob("cpu0/cache/index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KM")) * unit)
    return max(sizes)


def machine(threads: int) -> dict[str, Any]:
    """CPU, cores, threads in use, frequency governor (None where unreadable), load and package versions."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    governor = _CPU / "cpu0/cpufreq/scaling_governor"
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
        "threads": threads,
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "governor": governor.read_text().strip() if governor.is_file() else None,
        "load_before": os.getloadavg()[0],
        "versions": versions,
    }


def main() -> None:
    """Arguments: threads, megabytes (0 or absent: by the cache)."""
    threads, megabytes = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    print(json.dumps({"bytes_per_s": read_bandwidth(threads, megabytes)}))


if __name__ == "__main__":
    main()
