"""One engine out of one ONNX file, with whichever TensorRT is given; in a process of its own.

TensorRT ends the process over some files and GPUs; `build_apart` turns that into an error as well.
"""

from __future__ import annotations

import importlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from crab_edge.errors import BundleError, CrabError, DependencyError, EngineError
from crab_edge.manifest import EngineGraph

_LOG_LINES = 20


@dataclass(frozen=True)
class Job:
    """source: the ONNX file; out: the engine's; graph: inputs and profiles; sm: capabilities; kernels: folder
    of the plugins' kernels or None, plugins: how many layers of the network they are to be.
    """

    library: str
    source: Path
    out: Path
    graph: EngineGraph
    sm: tuple[int, ...]
    workspace: int
    kernels: Path | None = None
    plugins: int = 0

    def to_json(self) -> str:
        """The job as text."""
        content = {**self.__dict__, "graph": self.graph.model_dump(mode="json")}
        return json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in content.items()})

    @classmethod
    def from_json(cls, text: str) -> Job:
        """The job that `to_json` wrote."""
        content = json.loads(text)
        return cls(
            content["library"],
            Path(content["source"]),
            Path(content["out"]),
            EngineGraph.model_validate(content["graph"]),
            tuple(content["sm"]),
            content["workspace"],
            None if content["kernels"] is None else Path(content["kernels"]),
            content["plugins"],
        )


def build_apart(job: Job, timeout: float | None = None) -> str:
    """Builds in a child process; the library's exact version.

    Raises the error that the child met, or EngineError when the library ended it, with the end of its log.
    """
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder) / "job.json", Path(folder) / "answer.json"
        request.write_text(job.to_json(), encoding="utf-8")
        command = [sys.executable, "-m", __name__, str(request), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        if answer.is_file():
            said = json.loads(answer.read_text(encoding="utf-8"))
            if "version" in said:
                return str(said["version"])
            kinds = {kind.__name__: kind for kind in (BundleError, DependencyError, EngineError)}
            raise kinds.get(said["kind"], EngineError)(said["error"])
    end = " | ".join(done.stderr.strip().splitlines()[-3:])
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    way = (
        "close other programs or add swap" if done.returncode == -signal.SIGKILL else "run `crab-edge doctor`"
    )
    raise EngineError(f"{job.source}: {job.library} ended its process ({how}) while building; {way} ({end})")


def build(trt: ModuleType, job: Job) -> str:
    """Builds in this process and writes `job.out`; the library's version.

    Raises BundleError for a file or kernels that TensorRT doesn't take, DependencyError for a TensorRT that
    is too old, EngineError when the build fails; the message has the library's own words.
    """
    log = _log(trt)
    if job.kernels is not None:
        _register(trt, job.kernels)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt, job))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(job.source)):
        said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)) or log.tail()
        raise BundleError(f"{job.source}: {job.library} doesn't take it ({said}); export the target again")
    _check_layers(trt, network, job)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    # What is float32 in a graph is so for its precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    if hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(job.sm)
        for index, sm in enumerate(job.sm):
            config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index)
    for profile in job.graph.profiles:
        config.add_optimization_profile(_profile(builder, job.graph, profile.axes))
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise EngineError(f"{job.source}: {job.library} can't build it: {log.tail()}; run `crab-edge doctor`")
    try:
        job.out.write_bytes(memoryview(engine))
    except OSError as error:
        raise EngineError(
            f"{job.out}: the engine of {memoryview(engine).nbytes / 1e9:.2f} GB can't be written "
            f"({error.strerror}); make room or choose another --out"
        ) from None
    # A suffix such as ".post1" is no part of what an engine is checked against.
    found = re.match(r"\d+(\.\d+)*", trt.__version__)
    return found[0] if found else "0"


def _register(trt: ModuleType, folder: Path) -> None:
    from crab_edge.ilora import plugin_kernels, tensorrt_plugins

    tensorrt_plugins.register(plugin_kernels.read(folder), trt)


def _network_flags(trt: ModuleType, job: Job) -> int:
    known = trt.NetworkDefinitionCreationFlag
    flags = 1 << int(known.STRONGLY_TYPED)
    if job.kernels is not None:
        flags |= 1 << int(known.PREFER_AOT_PYTHON_PLUGINS)
    return flags


def _check_layers(trt: ModuleType, network: Any, job: Job) -> None:
    """Raises BundleError unless all plugin nodes became plugins and all cache updates layers in place: a body
    would have been taken silently.
    """
    kinds = [network.get_layer(i).type for i in range(network.num_layers)]
    in_place = getattr(trt.LayerType, "KV_CACHE_UPDATE", None)
    updates = 0 if in_place is None else kinds.count(in_place)
    if updates != len(job.graph.aliases):
        raise BundleError(
            f"{job.source}: {job.library} {trt.__version__} updates {updates} of {len(job.graph.aliases)} "
            "cache tensors in place; TensorRT does so from 10.15 on: install a newer one, or run the bundle "
            "with --engine onnxruntime"
        )
    found = kinds.count(trt.LayerType.PLUGIN_V3)
    if found != job.plugins:
        raise BundleError(
            f"{job.source}: {job.library} made plugins of {found} nodes, expected {job.plugins}; export the "
            "target again with this version"
        )


def _profile(builder: Any, graph: EngineGraph, axes: dict[str, tuple[int, int, int]]) -> Any:
    profile = builder.create_optimization_profile()
    for tensor in graph.inputs:
        if any(isinstance(axis, str) for axis in tensor.shape):
            bounds = [[a if isinstance(a, int) else axes[a][i] for a in tensor.shape] for i in range(3)]
            profile.set_shape(tensor.name, *bounds)
    return profile


def _log(trt: ModuleType) -> Any:
    """A logger that keeps the last errors and warnings, and writes them to stderr."""

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=_LOG_LINES)

        def log(self, severity: Any, text: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
                print(text, file=sys.stderr, flush=True)
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.lines.append(" ".join(text.split()))

        def tail(self) -> str:
            return "; ".join(list(self.lines)[-3:]) or "it gave no reason"

    return Log()


def main(arguments: Sequence[str]) -> None:
    """The child of `build_apart`: reads a job, writes an answer."""
    request, answer = map(Path, arguments)
    job = Job.from_json(request.read_text(encoding="utf-8"))
    said: dict[str, str]
    try:
        said = {"version": build(importlib.import_module(job.library), job)}
    except CrabError as error:
        said = {"kind": type(error).__name__, "error": str(error)}
    except ImportError as error:
        text = f"{job.library} can't be imported ({error}); run `crab-edge doctor`"
        said = {"kind": "DependencyError", "error": text}
    answer.write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
