"""Which engine of a bundle runs here, from the manifest alone: asked before a file is deserialised, because
TensorRT ends the process over some files that it can't read.
"""

from __future__ import annotations

import importlib.util
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from crab_edge.errors import BundleError, CrabError, DependencyError, DeviceError, EngineError, InputError

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle
    from crab_edge.engines._cuda import Gpu
    from crab_edge.manifest import EngineInfo

LIBRARIES = ("tensorrt", "tensorrt_rtx")
AHEAD_OF_TIME = (10, 9)
"""The first TensorRT that runs kernels which lie compiled in an engine."""
IN_PLACE = (10, 15)
"""The first TensorRT that updates a key/value cache in place, as every decoder engine here does."""
PTX_DRIVER = (12, 5)
PTX_DRIVER_OF = {100: (12, 8), 103: (12, 9), 110: (13, 0), 120: (12, 8), 121: (12, 9)}
"""The first CUDA release whose drivers compile the PTX of the plugins' kernels: ISA 8.5, and newer for
newer cards (`crab_edge.ilora.triton_compile.ARCHITECTURES`)."""
INSTALL = {
    "tensorrt": "on a Jetson it comes with JetPack (make the environment with `--system-site-packages`), "
    "elsewhere run `pip install 'crab-edge[tensorrt]'`",
    "tensorrt_rtx": "run `pip install 'crab-edge[rtx]'`",
}
# A decoder is read whole; what activations take is known once the engine is open.
_BESIDE_FILES = 64 << 20


@dataclass(frozen=True)
class Machine:
    """What decides whether an engine runs: `driver` the newest CUDA release it supports; `libraries` the
    versions of those that can be imported, `broken` why others that are there can't."""

    gpus: Sequence[Gpu]
    driver: tuple[int, int]
    libraries: Mapping[str, str]
    broken: Mapping[str, str] = field(default_factory=dict)


def choose(bundle: Bundle, target: str | None, machine: Machine) -> tuple[str, EngineInfo]:
    """The engine to run: the one named, or the first that fits this machine.

    Raises InputError, BundleError, DependencyError or DeviceError that says what keeps it from running and
    the way out; of several engines that don't fit, the first one's that is made for this card.
    """
    found = bundle.manifest.engines
    if not found:
        raise InputError(
            f"{bundle.path}: the bundle has no TensorRT engine; make one with `crab-edge export --bundle "
            f"{bundle.path} --target {suggestion(machine)} --out DIR`, or use --engine onnxruntime"
        )
    if target is not None:
        if target not in found:
            raise InputError(
                f"{bundle.path}: no engine for target {target!r}; the bundle has {', '.join(found)}"
            )
        check(target, found[target], machine)
        return target, found[target]
    problems: list[tuple[bool, CrabError]] = []
    for name, info in found.items():
        try:
            check(name, info, machine)
        except CrabError as error:
            near = bool(machine.gpus) and machine.gpus[0].sm in info.sm
            problems.append((not near, error))
        else:
            return name, info
    raise min(problems, key=lambda pair: pair[0])[1]


def suggestion(machine: Machine) -> str:
    """The target to export for on this machine."""
    sm = machine.gpus[0].sm if machine.gpus else 0
    jetson = {87: "jetson-orin", 110: "jetson-thor"}
    if sm in jetson and platform.machine() == "aarch64":
        return jetson[sm]
    if sm in (86, 89, 120) or not sm:
        return "rtx"
    return f"cuda-sm{sm}"


def check(target: str, info: EngineInfo, machine: Machine) -> None:
    """Raises the error that says why this engine can't run on this machine; returns if nothing speaks
    against it.
    """
    _check_card(target, info, machine)
    rebuild = f"build it again with `{info.build_command}`"
    if not info.built:
        raise InputError(
            f"target {target}: its engine isn't built yet; run `{info.build_command}` on the device (needs "
            f"{info.library} {info.version} or newer)"
        )
    actual = machine.libraries.get(info.library)
    if info.library in machine.broken:
        raise DependencyError(
            f"target {target} needs {info.library}, which is installed but can't be imported "
            f"({machine.broken[info.library]}); {INSTALL[info.library]}"
        )
    if actual is None:
        raise DependencyError(
            f"target {target} needs {info.library} {info.version}, which isn't installed; "
            f"{INSTALL[info.library]}"
        )
    if not same_release(actual, info.version):
        raise BundleError(
            f"target {target}: its engine was built with {info.library} {info.version}, but {actual} is "
            f"installed, and each release reads only its own engines; {rebuild} or install {info.library} "
            f"{info.version}"
        )
    if info.plugins:
        _check_plugins(target, info, actual, machine.driver, rebuild)


def _check_card(target: str, info: EngineInfo, machine: Machine) -> None:
    if not machine.gpus:
        raise DeviceError(
            f"target {target} needs a GPU, and the driver finds none; check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES, or use --engine onnxruntime"
        )
    first = machine.gpus[0]
    if first.sm in info.sm:
        return
    made_for = ", ".join(f"{sm // 10}.{sm % 10}" for sm in info.sm)
    text = (
        f"target {target} is for compute capability {made_for}, but GPU 0, {first.name}, has "
        f"{first.capability}"
    )
    other = next((gpu for gpu in machine.gpus if gpu.sm in info.sm), None)
    if other is not None:
        raise DeviceError(
            f"{text}; GPU {other.index}, {other.name}, has {other.capability}: set "
            f"CUDA_VISIBLE_DEVICES={other.uuid}"
        )
    raise BundleError(
        f"{text}; export an engine for this card with `crab-edge export --bundle BUNDLE --target "
        f"{suggestion(machine)} --out DIR`"
    )


def _check_plugins(target: str, info: EngineInfo, actual: str, driver: tuple[int, int], rebuild: str) -> None:
    # A plugin is a kernel of one shape: even a small model has dozens.
    names = ", ".join(sorted(info.plugins)[:2])
    names += f" and {len(info.plugins) - 2} more" if len(info.plugins) > 2 else ""
    if info.library == "tensorrt_rtx":
        raise BundleError(
            f"target {target}: its engine has plugins ({names}), which tensorrt_rtx can't run; {rebuild}"
        )
    if numbers(actual)[:2] < AHEAD_OF_TIME:
        raise BundleError(
            f"target {target}: its engine has plugins with their kernels inside ({names}), which TensorRT "
            f"runs from {'.'.join(map(str, AHEAD_OF_TIME))} on, but {actual} is installed (JetPack 6.2 has "
            "10.3); update JetPack, or use --engine onnxruntime"
        )
    least = max(PTX_DRIVER_OF.get(sm, PTX_DRIVER) for sm in info.sm)
    if driver < least:
        raise DeviceError(
            f"target {target}: its plugins' kernels ({names}) need a driver for CUDA "
            f"{least[0]}.{least[1]} or newer, and this one supports {driver[0]}.{driver[1]}; "
            "update the NVIDIA driver (Jetson: JetPack)"
        )


def check_memory(bundle: Bundle, info: EngineInfo, free: int, *, low_memory: bool) -> None:
    """Raises DeviceError where weights and cache alone don't fit in `free` bytes of device memory."""
    files = bundle.manifest.files
    sizes = {name: files[graph.file].size for name, graph in info.graphs.items()}
    decoder = sizes.pop("decoder", 0)
    towers = max(sizes.values(), default=0) if low_memory else sum(sizes.values())
    cache = cache_bytes(info)
    needed = max(decoder + cache, towers) if low_memory else decoder + cache + towers
    if needed + _BESIDE_FILES > free:
        ways = ["close other programs on the GPU"]
        ways += [] if low_memory else ["use --low-memory"]
        ways += ["export the engine with a smaller cache or in fewer bits"]
        raise DeviceError(
            f"the engine takes {needed >> 20} MB of device memory ({decoder >> 20} MB decoder, {cache >> 20} "
            f"MB cache, {towers >> 20} MB encoders) and what its activations need, but {free >> 20} MB are "
            f"free; {', '.join(ways)}"
        )


def cache_bytes(info: EngineInfo) -> int:
    """Bytes of the decoder's key/value cache at its full capacity."""
    decoder = info.graphs.get("decoder")
    width = {"float32": 4, "float16": 2, "int64": 8, "int32": 4}
    total = 0
    for tensor in decoder.inputs if decoder is not None else ():
        if tensor.name.startswith("past."):
            size = width[tensor.dtype]
            for axis in tensor.shape:
                size *= axis if isinstance(axis, int) else info.capacity
            total += size
    return total


def same_release(one: str, other: str) -> bool:
    """Whether two versions are of one release, in as many numbers as both have (at least three)."""
    a, b = numbers(one), numbers(other)
    places = max(3, min(len(a), len(b)))
    return a[:places] == b[:places]


def numbers(version: str) -> tuple[int, ...]:
    """A release's numbers, without its suffix: "10.16.2.10" -> (10, 16, 2, 10)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def installed() -> tuple[dict[str, str], dict[str, str]]:
    """Versions of the TensorRT libraries that can be imported here, and why others that are there can't."""
    found, broken = {}, {}
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is not None:
            try:
                found[name] = str(importlib.import_module(name).__version__)
            except (ImportError, OSError, RuntimeError, AttributeError) as error:
                broken[name] = " ".join(str(error).split())[:200]
    return found, broken


# What the libraries write to their log, and the error that people get for it.
_MESSAGES: tuple[tuple[str, type[CrabError], str], ...] = (
    (
        r"not compatible with this version|version tag does not match|[Vv]ersion mismatch|VERSION_MISMATCH",
        BundleError,
        "the engine is of another release of the library; build it again with `{build}`",
    ),
    (
        r"incompatible device|expecting compute|[Cc]ompute capability|UNSUPPORTED_CC",
        BundleError,
        "the engine was built for another GPU; build it again on this one with `{build}`",
    ),
    (
        r"UNSUPPORTED_PTX_VERSION|unsupported toolchain|OLD_CUDA_|driver version is insufficient",
        DeviceError,
        (
            "the NVIDIA driver is too old for the kernels in the engine; install a newer one (Jetson: a "
            "newer JetPack)"
        ),
    ),
    (
        r"[Pp]lugin not found|could not find plugin|getPluginCreator|creator.*not found",
        BundleError,
        "the engine needs a plugin that isn't in it; build it again with `{build}`",
    ),
    (
        r"[Oo]ut ?[Oo]f ?[Mm]emory|OUT_OF_MEMORY|INSUFFICIENT_GPU_MEMORY|[Rr]equested amount of GPU memory",
        DeviceError,
        (
            "out of device memory; close other programs on the GPU, use --low-memory, or export with a "
            "smaller cache"
        ),
    ),
    (
        r"no CUDA-capable device|NO_DEVICE|initialization failure with error: 100",
        DeviceError,
        "the library finds no GPU; check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
    ),
    (
        r"[Ss]erialization|magic|MALFORMED|corrupt|truncated|[Dd]eseriali[sz]",
        BundleError,
        "the engine file can't be read; build it again with `{build}`",
    ),
)


def explain(what: str, said: str, build_command: str) -> CrabError:
    """The error for something that a library refused: `said` is what it wrote to its log."""
    line = " ".join(said.split())[:300] or "it gave no reason"
    for pattern, kind, way in _MESSAGES:
        if re.search(pattern, said):
            return kind(f"{what}: {way.format(build=build_command)} ({line})")
    return EngineError(f"{what}: {line}; run `crab-edge doctor`, or build it again with `{build_command}`")
