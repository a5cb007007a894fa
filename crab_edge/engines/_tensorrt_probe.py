"""Opens the engine files of a target for the first time, in a process of its own: TensorRT ends the process
over some files and plugins that it can't run, and then only that process is lost.

What went well is remembered by the files' identity, so that it is done once.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge import errors
from crab_edge.errors import CrabError, EngineError
from crab_edge.memo import Memo, cache_folder

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle
    from crab_edge.engines._cuda import Gpu
    from crab_edge.manifest import EngineInfo

MEMO = "engines.json"
LIMIT_S = 600.0
_SAID = 300


def once(folder: Path, target: str, info: EngineInfo, gpu: Gpu, driver: tuple[int, int]) -> None:
    """Tries a target's files, unless these very files went well before on this GPU, driver and library.

    Raises the error that the attempt met; EngineError when it ended the process or hung.
    """
    fact = f"{info.library} {info.version}, driver {driver[0]}.{driver[1]}, {gpu.uuid}"
    memo = Memo(MEMO)
    paths = [folder / graph.file for graph in info.graphs.values()]
    if all(memo.knows(path, fact) for path in paths):
        return
    attempt(folder, target, info.build_command)
    for path in paths:
        memo.learn(path, fact)
    memo.save()


def command(folder: Path, target: str) -> list[str]:
    """The process that tries the files."""
    return [sys.executable, "-m", "crab_edge.engines._tensorrt_probe", str(folder), target]


def attempt(folder: Path, target: str, build_command: str) -> None:
    """Runs `command`, and raises what it reports, or what became of it."""
    way = f"build it again with `{build_command}`, or use --engine onnxruntime"
    try:
        ran = subprocess.run(
            command(folder, target),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        stage = _last(late.stdout or b"").get("stage", "opening")
        raise EngineError(
            f"target {target}: {stage} took more than {LIMIT_S:g} s in a process of its own; {way}"
        ) from None
    report = _last(ran.stdout)
    if report.get("ok") and ran.returncode == 0:
        return
    if "error" in report:
        kind = getattr(errors, str(report.get("kind")), EngineError)
        raise kind(report["error"])
    said = " ".join(ran.stderr.decode(errors="replace").split())[-_SAID:]
    raise EngineError(
        f"target {target}: {report.get('stage', 'opening')} ended its process ({ended(ran.returncode)}); "
        f"{way}" + (f" ({said})" if said else "")
    )


def ended(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last(out: bytes) -> dict[str, Any]:
    """The last line that is a JSON object: libraries may print between ours."""
    for line in reversed(out.decode(errors="replace").splitlines()):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}


def kernels_path(bundle: Bundle, file: str, info: EngineInfo) -> Path:
    """Where the kernels are kept that TensorRT-RTX compiles for an engine file on this machine."""
    digest = bundle.manifest.files[file].sha256[:24]
    return cache_folder() / "kernels" / f"{digest}-{info.library}-{info.version}.bin"


def main(arguments: list[str]) -> int:
    """The child: opens each graph, runs the decoder once and reports on standard output."""
    # The library may write there too.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**report: Any) -> None:
        print(json.dumps(report), file=out, flush=True)

    try:
        _try(Path(arguments[0]), arguments[1], say)
    except CrabError as error:
        say(error=str(error), kind=type(error).__name__)
        return 1
    say(ok=True)
    return 0


def _try(folder: Path, target: str, say: Any) -> None:
    import numpy as np

    from crab_edge.bundle import Bundle
    from crab_edge.engines import _cuda, tensorrt
    from crab_edge.engines._tensorrt_graph import Scratch
    from crab_edge.manifest import read_manifest

    # Its hashes were checked by the parent.
    bundle = Bundle(folder, read_manifest(folder))
    info = bundle.manifest.engines[target]
    library = importlib.import_module(info.library)
    device = _cuda.Device()
    scratch = Scratch(device)
    for name in info.graphs:
        say(stage=f"opening the {name} engine")
        file = tensorrt.open_file(library, device, scratch, bundle, target, name)
        if name == "decoder":
            say(stage="running the decoder engine")
            width = bundle.manifest.model.hidden_size
            embeds, positions = np.zeros((1, 1, width), np.float32), np.zeros((3, 1, 1), np.int64)
            file.run(tensorrt.decoder_inputs(file, embeds, positions, 1))
        file.close()
    scratch.free()
    device.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
