"""Where ONNX Runtime runs: the CPU, CUDA, or NVIDIA's TensorRT-RTX plugin. Whoever asks for one gets it or an
error: ONNX Runtime itself goes on on the CPU when a provider can't be loaded, or takes only some of the
nodes.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge.errors import DependencyError, DeviceError, EngineError, InputError

CPU = "CPUExecutionProvider"
PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
PLUGIN_INSTALL = "pip install onnxruntime-ep-nv-tensorrt-rtx"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")
ONE_PACKAGE = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'crab-edge[{extra}]'"
# What providers leave on the CPU on purpose: small integers that say how large things are.
SHAPE_NODES = frozenset(
    """Add And Cast Concat Constant ConstantOfShape Div Equal Expand Gather Greater GreaterOrEqual Identity
    Less LessOrEqual Max MemcpyFromHost MemcpyToHost Min Mul Neg NonZero Not Or Range ReduceMax ReduceSum
    Reshape Shape Size Slice Split Squeeze Sub Transpose Unsqueeze Where""".split()
)


@dataclass(frozen=True)
class Provider:
    """A way of ONNX Runtime to run. `name` is ours; `device` where its tensors lie, in ONNX Runtime's
    words.
    """

    name: str
    package: str
    device: str

    @property
    def on_cpu(self) -> bool:
        """Whether tensors lie in the process's own memory."""
        return self.device == "cpu"


PROVIDERS = {
    one.name: one
    for one in (
        Provider("cpu", CPU, "cpu"),
        Provider("cuda", "CUDAExecutionProvider", "cuda"),
        Provider("tensorrt-rtx", "NvTensorRTRTXExecutionProvider", "cuda"),
    )
}


def find(name: str) -> Provider:
    """The provider of that name. InputError lists them."""
    if name not in PROVIDERS:
        raise InputError(
            f"ONNX Runtime's provider {name!r} is unknown; choose one of: {', '.join(PROVIDERS)}"
        )
    return PROVIDERS[name]


def installed() -> dict[str, str]:
    """Versions of the packages that install the module `onnxruntime`."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check(provider: Provider, onnxruntime: Any) -> None:
    """Raises the error that says why `provider` can't run here: a package, a GPU or a library that is
    missing.
    """
    if provider.on_cpu:
        return
    packages = installed()
    extra = "gpu" if provider.name == "cuda" else "cpu"
    if len(packages) > 1:
        both = " and ".join(f"{name} {version}" for name, version in packages.items())
        raise DependencyError(
            f"{both} are both installed and overwrite each other, so that it's chance what runs; run "
            f"`{ONE_PACKAGE.format(extra=extra)}`"
        )
    if provider.name == "cuda":
        if provider.package not in onnxruntime.get_available_providers():
            raise DependencyError(
                f"this onnxruntime {onnxruntime.__version__} has no {provider.package}; run "
                f"`{ONE_PACKAGE.format(extra=extra)}` (x86-64, or aarch64 with Python 3.12)"
            )
    elif importlib.util.find_spec(PLUGIN) is None:
        raise DependencyError(
            f"onnxruntime's TensorRT-RTX provider is a plugin that isn't installed; run `{PLUGIN_INSTALL}`"
        )
    from crab_edge.engines import _cuda

    # Says it if there is no driver or no GPU.
    _cuda.driver()
    if hasattr(onnxruntime, "preload_dlls"):
        # CUDA's libraries from pip's wheels; the system's are found anyway.
        onnxruntime.preload_dlls()


def options_for(provider: Provider, onnxruntime: Any, options: Any) -> list[str]:
    """Prepares a session's options for `provider`; the list to give as its `providers`."""
    if provider.on_cpu:
        return [provider.package]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider.name == "cuda":
        return [provider.package, CPU]
    plugin = importlib.import_module(PLUGIN)
    name = plugin.get_ep_name()
    try:
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        if "already" not in str(error).lower():
            raise DeviceError(
                f"onnxruntime can't load its TensorRT-RTX plugin ({_one_line(error)}); update the NVIDIA "
                f"driver, or reinstall it with `{PLUGIN_INSTALL}`"
            ) from error
    devices = [
        device for device in onnxruntime.get_ep_devices() if device.ep_name in (name, provider.package)
    ]
    if not devices:
        raise DeviceError(
            "onnxruntime's TensorRT-RTX plugin finds no GPU that it can use (it needs an RTX card, Ampere or "
            "newer); use --engine onnxruntime"
        )
    options.add_provider_for_devices(devices[:1], {})
    return []


def assert_runs(provider: Provider, session: Any, path: Path) -> None:
    """Raises EngineError or DeviceError unless the session runs on `provider`, down to its nodes.

    Nodes that only compute shapes may be on the CPU.
    """
    session.disable_fallback()
    actual = session.get_providers()
    if provider.on_cpu:
        if actual != [provider.package]:
            raise EngineError(f"{path}: expected {provider.package}, got {actual}")
        return
    if not actual or actual[0] == CPU:
        raise DeviceError(
            f"{path}: {provider.package} was asked for and {', '.join(actual) or 'none'} runs: its CUDA or "
            "cuDNN libraries can't be loaded; run `pip install 'onnxruntime-gpu[cuda,cudnn]'`, or install "
            "CUDA for your system (Jetson: JetPack)"
        )
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise DependencyError(
            "which nodes run on the GPU can't be read from this onnxruntime; run `pip install -U "
            f"'{'onnxruntime-gpu' if provider.name == 'cuda' else 'onnxruntime'}>=1.24'`"
        )
    strays = _strays(session)
    if strays:
        shown = ", ".join(f"{count} {kind}" for kind, count in strays.most_common(4))
        raise EngineError(
            f"{path}: {provider.name} doesn't take {strays.total()} of its nodes, which would run on the CPU "
            f"({shown}); {_way(provider, strays)}"
        )


def _strays(session: Any) -> Counter[str]:
    """Kinds of the nodes that were put on the CPU and compute more than shapes."""
    found: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == CPU:
            found.update(node.op_type for node in part.get_nodes() if node.op_type not in SHAPE_NODES)
    return found


def _way(provider: Provider, strays: Counter[str]) -> str:
    if provider.name == "cuda" and "GroupQueryAttention" in strays:
        return (
            "CUDA's attention takes a cache in float16, so export with `--kv float16`, or use --engine "
            "onnxruntime"
        )
    if provider.name == "tensorrt-rtx":
        return "export an engine with `crab-edge export --target rtx` and use --engine tensorrt"
    return "use --engine onnxruntime"


def refused(provider: Provider, what: str, said: str) -> EngineError:
    """The error for something ONNX Runtime refused while it ran or opened a graph."""
    if provider.on_cpu:
        return EngineError(f"{what}: {said}")
    if re.search(r"out of memory|failed to allocate|OUT_OF_MEMORY", said, re.IGNORECASE):
        return DeviceError(
            f"{what}: out of device memory ({said}); close other programs on the GPU, or use --low-memory"
        )
    if re.search(r"no kernel image|unsupported toolchain|driver version is insufficient", said):
        return DeviceError(
            f"{what}: this onnxruntime has no kernels for the GPU or its driver ({said}); update the NVIDIA "
            "driver, or use --engine onnxruntime"
        )
    return EngineError(f"{what}: {said}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
