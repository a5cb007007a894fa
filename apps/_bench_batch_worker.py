"""Runs one `crab-edge` command and prints its exit code and peak memory as one JSON line at the end.

A process of its own, since peaks don't go down again.
"""

from __future__ import annotations

import json
import sys

from crab_edge_apps.cli import run


def peak_bytes() -> int:
    """This process's largest resident set so far."""
    # VmHWM, because ru_maxrss starts at what the parent had when it forked.
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    code = run(sys.argv[1:])
    print(json.dumps({"code": code, "peak_bytes": peak_bytes()}))
