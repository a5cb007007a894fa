"""Runs one `crab-edge` command and prints its exit code and peak memory as one JSON line at the end.

A process of its own, since peaks don't go down again.
"""

from __future__ import annotations

import json
import sys

from crab_edge_apps.cli import run

from crab_edge.memory import peak_bytes

if __name__ == "__main__":
    code = run(sys.argv[1:])
    print(json.dumps({"code": code, "peak_bytes": peak_bytes()}))
