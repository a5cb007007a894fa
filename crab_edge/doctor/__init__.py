"""Which engines run on this machine: each launches a kernel and asks the model one question, in a process of
its own with a time limit, so that one that aborts or hangs is a finding.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from crab_edge.errors import InputError

State = Literal["works", "kernel only", "fails", "missing"]
ENGINES = (
    "onnxruntime:cpu",
    "onnxruntime:cuda",
    "onnxruntime:tensorrt-rtx",
    "torch:cpu",
    "torch:cuda",
    "tensorrt:tensorrt",
    "tensorrt:tensorrt_rtx",
)
"""What is examined; an engine of the TensorRT family by the library that runs it."""
LIMIT_S = 180.0
QUESTION = "Can you hear a dog?"
_SAID = 300


@dataclass
class Finding:
    """What one engine did.

    state: "works" (it answered), "kernel only" (a kernel ran, the bundle didn't), "fails" (it is there and
    runs nothing), "missing". facts: such as version, device, kernel. seconds: loading, encoding and
    answering, interpreter left out. problem: why it isn't "works", with the way out.
    """

    engine: str
    state: State = "missing"
    facts: dict[str, str] = field(default_factory=dict)
    seconds: float | None = None
    answer: str | None = None
    problem: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def chosen(name: str | None) -> list[str]:
    """The engines that `name` means: one of ENGINES, or all with that half of a name (`onnxruntime`, `cuda`).

    InputError if there is none.
    """
    if name is None:
        return list(ENGINES)
    found = [one for one in ENGINES if name in (one, *one.split(":"))]
    if not found:
        families = dict.fromkeys(one.partition(":")[0] for one in ENGINES)
        raise InputError(f"unknown engine {name!r}; choose one of: {', '.join((*families, *ENGINES))}")
    return found


def examine(names: Sequence[str], bundle: Path, clip: Path, *, limit_s: float = LIMIT_S) -> Iterator[Finding]:
    """Examines one engine after another."""
    for name in names:
        yield _examine(name, bundle, clip, limit_s)


def command(engine: str, bundle: Path, clip: Path) -> list[str]:
    """The process that examines an engine: JSON objects on standard output, one a step."""
    return [sys.executable, "-m", "crab_edge.doctor.probe", engine, str(bundle), str(clip)]


def _examine(engine: str, bundle: Path, clip: Path, limit_s: float) -> Finding:
    started = time.perf_counter()
    try:
        ran = subprocess.run(
            command(engine, bundle, clip),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=limit_s,
            check=False,
        )
        out, error, code = ran.stdout, ran.stderr, ran.returncode
    except subprocess.TimeoutExpired as late:
        out, error, code = late.stdout or b"", late.stderr or b"", None
    return _finding(engine, _reports(out), error, code, time.perf_counter() - started)


def _reports(out: bytes) -> list[dict[str, Any]]:
    found = []
    for line in out.decode(errors="replace").splitlines():
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict):
            found.append(report)
    return found


def _finding(
    engine: str, reports: list[dict[str, Any]], error: bytes, code: int | None, seconds: float
) -> Finding:
    """What the reports of a process, and its end, amount to."""
    finding = Finding(engine)
    step, ended = "starting", False
    for report in reports:
        step = report.get("step", step)
        finding.facts |= report.get("facts", {})
        finding.notes += report.get("notes", [])
        finding.state = report.get("state", finding.state)
        finding.seconds = report.get("seconds", finding.seconds)
        finding.answer = report.get("answer", finding.answer)
        finding.problem = report.get("problem", finding.problem)
        ended = ended or bool(report.get("end"))
    if ended:
        return finding
    if finding.state == "missing":
        finding.state = "fails"
    if code is None:
        finding.problem = (
            f"{step} hung: stopped after {seconds:.0f} s (--timeout); check the driver with `nvidia-smi`"
        )
        return finding
    how = signal.Signals(-code).name if -code in set(signal.Signals) else f"exit code {code}"
    said = " ".join(error.decode(errors="replace").split())[-_SAID:]
    finding.problem = f"{step} ended its process ({how})" + (f": {said}" if said else "")
    return finding
