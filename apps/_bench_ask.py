"""Times `crab-edge ask` as a user meets it: a new process each time, from its start to its end."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from crab_edge.errors import EngineError


def measure(media: list[Path], task: str, bundle: Path | None, threads: int, rounds: int) -> dict[str, Any]:
    """Median and spread of wall seconds, peak memory of the process, and the answer's own timings.

    Without `media` it is the packaged clip. One run before the counted ones fills the file cache.
    """
    command = [sys.executable, "-m", "crab_edge_apps.cli", "ask", "--json", "--task", task]
    command += ["--threads", str(threads), *(str(path) for path in media)]
    command += [] if media else ["--sample"]
    command += ["--bundle", str(bundle)] if bundle else []
    _once(command)
    runs = [_once(command) for _ in range(rounds)]
    seconds = [run["wall_s"] for run in runs]
    return {
        "task": task,
        "media": [str(path) for path in media] or ["sample"],
        "threads": threads,
        "rounds": rounds,
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "timings": runs[len(runs) // 2]["timings"],
    }


def _once(command: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, error = child.stdout, child.stderr
    assert out is not None and error is not None
    text = out.read()
    said = error.read()
    # wait4 gives this child's own peak; the module `resource` only knows the largest of all children.
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - started
    if child.returncode:
        last = (said.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"ask ended with exit code {child.returncode}: {last}")
    return {
        "wall_s": wall,
        "peak_bytes": usage.ru_maxrss * 1024,
        "timings": json.loads(text.splitlines()[-1])["timings"],
    }


def show(result: dict[str, Any]) -> None:
    """The result as a few lines for the terminal."""
    times = result["timings"]
    print(
        f"ask {' '.join(result['media'])} --task {result['task']}: {result['median_s']:.2f} s cold start "
        f"included (median of {result['rounds']}, {result['min_s']:.2f} to {result['max_s']:.2f}), "
        f"{result['threads']} threads, peak memory {result['peak_bytes'] / 1e6:.0f} MB"
    )
    steps = ("decode_s", "features_s", "encode_s", "prefill_s", "generate_s")
    print("  inside: " + ", ".join(f"{name[:-2]} {times[name]:.2f} s" for name in steps))
    print(f"  tokens: {times['prompt_tokens']} in the prompt, {times['tokens']} generated")
