"""What machine this is: processor, memory, Jetson or not, driver and GPUs."""

from __future__ import annotations

import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crab_edge.errors import CrabError
from crab_edge.memory import available_bytes, total_bytes

_CPUINFO = Path("/proc/cpuinfo")
_TEGRA = Path("/etc/nv_tegra_release")
_DRIVER = Path("/proc/driver/nvidia/version")
# What makes products of 8-bit numbers quick, the best first, under the names of /proc/cpuinfo.
_INT8 = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
_WIDE = ("avx512f", "avx2", "sve", "asimd")
# Releases of Jetson Linux (L4T), from the newest on, and the JetPack that they are part of.
_JETPACKS = (
    ((39, 2), "7.2"),
    ((38, 4), "7.1"),
    ((38, 2), "7.0"),
    ((36, 4, 4), "6.2.1"),
    ((36, 4, 3), "6.2"),
    ((36, 4), "6.1"),
    ((36, 3), "6.0"),
    ((35, 0), "5"),
)


@dataclass(frozen=True)
class Machine:
    """Facts that decide what runs. cpu_int8, cpu_wide: names of instructions, None where there are none of
    use; cuda: the newest CUDA release that the driver supports; ptx: the newest PTX ISA that it compiles."""

    system: str
    python: str
    cpu_int8: str | None
    cpu_wide: str | None
    memory_bytes: int | None
    memory_free_bytes: int | None
    jetson_linux: str | None
    jetpack: str | None
    driver: str | None
    cuda: str | None
    ptx: str | None
    gpus: tuple[dict[str, Any], ...]
    gpu_problem: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def machine() -> Machine:
    """Looks at the machine. GPUs are asked through the driver; nothing is launched."""
    flags = cpu_flags()
    linux = jetson_linux()
    gpus, cuda, problem = _gpus()
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu_int8=next((name for name in _INT8 if name in flags), None),
        cpu_wide=next((name for name in _WIDE if name in flags), None),
        memory_bytes=total_bytes(),
        memory_free_bytes=available_bytes(),
        jetson_linux=None if linux is None else ".".join(map(str, linux)),
        jetpack=None if linux is None else jetpack(linux),
        driver=_driver_release(),
        cuda=None if cuda is None else f"{cuda[0]}.{cuda[1]}",
        ptx=None if cuda is None else newest_ptx(cuda),
        gpus=gpus,
        gpu_problem=problem,
    )


def cpu_flags() -> frozenset[str]:
    """Instruction sets of the processor as Linux names them; empty where it doesn't say."""
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return frozenset()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def jetson_linux() -> tuple[int, ...] | None:
    """The release of Jetson Linux, such as (36, 4, 3); None on other machines."""
    try:
        text = _TEGRA.read_text(errors="replace")
    except OSError:
        return None
    found = re.search(r"R(\d+)[^,]*,\s*REVISION:\s*(\d+(?:\.\d+)*)", text)
    return (int(found[1]), *map(int, found[2].split("."))) if found else None


def jetpack(release: tuple[int, ...]) -> str:
    """The JetPack that a release of Jetson Linux belongs to."""
    for least, name in _JETPACKS:
        if release[0] == least[0] and release >= least:
            return name
    return "unknown"


def newest_ptx(cuda: tuple[int, int]) -> str:
    """The newest PTX ISA that the driver of a CUDA release compiles; CUDA 12.6 brought none of its own."""
    major, minor = cuda
    if major == 12 and minor >= 6:
        minor -= 1
    return f"{major - 4}.{minor}"


def _driver_release() -> str | None:
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text(errors="replace"))
    except OSError:
        return None
    return found[1] if found else None


def _gpus() -> tuple[tuple[dict[str, Any], ...], tuple[int, int] | None, str | None]:
    """The GPUs as plain values, the driver's CUDA release, and why there is none."""
    from crab_edge.engines import _cuda

    try:
        driver = _cuda.driver()
        gpus = tuple(
            {
                "name": gpu.name,
                "capability": gpu.capability,
                "memory_bytes": gpu.memory,
                "integrated": gpu.integrated,
            }
            for gpu in driver.gpus()
        )
        return gpus, driver.version(), None
    except CrabError as error:
        return (), None, str(error)
