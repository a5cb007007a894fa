"""The device that `bench --gpu` runs on: what it is, what it has free, and how fast it copies memory."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crab_edge.errors import DependencyError, InputError

if TYPE_CHECKING:
    import torch

DRY_RUN = "or try the benchmark's logic without one: `crab-edge bench --gpu --device cpu --shape nano`"
PACKAGES = ("torch", "triton", "tensorrt-rtx-cu13", "tensorrt", "onnxruntime-gpu", "numpy", "crab-edge")
# A copy of this size is far beyond any last-level cache; it counts twice, once read and once written.
COPY_BYTES = 1 << 30
_DRY_COPY_BYTES = 1 << 22
_NVIDIA_SMI = (
    "driver_version",
    "pstate",
    "power.limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "temperature.gpu",
)


@dataclass(frozen=True)
class Card:
    """A CUDA device, or the CPU as a stand-in whose figures mean nothing (`real` is False)."""

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    memory_bytes: int
    l2_bytes: int

    @property
    def real(self) -> bool:
        """Whether figures measured here are a GPU's."""
        return self.device.type == "cuda"

    def free_bytes(self) -> int:
        """Memory that can still be allocated, what torch keeps for reuse included."""
        from crab_edge.engines._torch_device import free_bytes
        from crab_edge.memory import available_bytes

        free = free_bytes(self.device)
        return (available_bytes() or self.memory_bytes) if free is None else free

    def may_cache(self, size: int) -> bool:
        """Whether `size` bytes may stay in the L2 from one call to the next: under twice its size."""
        return not self.real or size < 2 * self.l2_bytes

    def synchronize(self) -> None:
        """Waits for everything that was launched; a kernel's fault surfaces here."""
        import torch

        if self.real:
            torch.cuda.synchronize(self.device)


def open_card(device: str = "cuda") -> Card:
    """The card that `device` names: cuda, cuda:N or cpu.

    DependencyError without torch, InputError when torch can't use such a device, or when "cuda" could mean
    cards of different kinds.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise DependencyError(
            "bench --gpu needs torch, which isn't installed; install it with CUDA and Triton: "
            'pip install "crab-edge[cuda]"'
        ) from None
    kind, _, index = device.partition(":")
    if kind not in ("cuda", "cpu") or (index and not (kind == "cuda" and index.isdigit())):
        raise InputError(f"--device {device}: expected cuda, cuda:0 (and so on) or cpu")
    if kind == "cpu":
        from crab_edge.memory import total_bytes

        return Card(
            torch.device("cpu"), platform.processor() or platform.machine(), None, total_bytes() or 0, 0
        )
    _need_cuda(torch)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if index and int(index) >= len(names):
        raise InputError(
            f"--device {device}: this machine has {len(names)} (cuda:0 to cuda:{len(names) - 1})"
        )
    if not index and len(set(names)) > 1:
        listed = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(names))
        raise InputError(f"--device cuda could mean cards of different kinds ({listed}); name one of them")
    found = torch.device("cuda", int(index or 0))
    torch.cuda.set_device(found)
    facts = torch.cuda.get_device_properties(found)
    return Card(
        found,
        names[found.index],
        (facts.major, facts.minor),
        facts.total_memory,
        int(getattr(facts, "L2_cache_size", 0)),
    )


def _need_cuda(torch: Any) -> None:
    if torch.version.cuda is None:
        raise InputError(
            f"bench --gpu needs an NVIDIA GPU and a torch built for it, but torch {torch.__version__} has no "
            f'CUDA; install one that has (pip install "crab-edge[cuda]" on a machine with a GPU), {DRY_RUN}'
        )
    if torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
        why = "no device is visible"
    except Exception as error:
        why = str(error).splitlines()[0].strip().rstrip(".") or type(error).__name__
    raise InputError(
        f"bench --gpu needs an NVIDIA GPU, and torch {torch.__version__} can use none: {why}; check the "
        f"driver with `nvidia-smi` (a Jetson: `nvpmodel -q`), {DRY_RUN}"
    )


def facts(card: Card) -> dict[str, Any]:
    """What a reader needs to judge or repeat the figures, as plain JSON values."""
    import importlib.metadata

    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "name": card.name,
        "device": str(card.device),
        "real": card.real,
        "memory_bytes": card.memory_bytes,
        "l2_bytes": card.l2_bytes,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "versions": versions,
    }
    if card.real:
        properties = torch.cuda.get_device_properties(card.device)
        found["compute_capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = properties.multi_processor_count
        # uuid, where torch gives it: indices of nvidia-smi and of CUDA may differ.
        found |= _driver(str(getattr(properties, "uuid", card.device.index)))
    return found


def _driver(which: str) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi reads them; a Jetson's power mode from nvpmodel."""
    said: dict[str, str] = {}
    wanted = which if which.isdigit() else f"GPU-{which}"
    line = _output(
        ["nvidia-smi", f"--id={wanted}", f"--query-gpu={','.join(_NVIDIA_SMI)}", "--format=csv,noheader"]
    )
    values = [value.strip() for value in line.split(",")]
    if len(values) == len(_NVIDIA_SMI):
        said |= dict(zip((name.replace(".", "_") for name in _NVIDIA_SMI), values, strict=True))
    mode = " ".join(_output(["nvpmodel", "-q"]).split())
    if mode:
        said["power_mode"] = mode
    return said


def _output(command: list[str]) -> str:
    """Standard output of a tool of the driver's; "" where it is absent or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Copier:
    """Two large arrays on the card, and the copy of one into the other that bandwidths are compared with."""

    def __init__(self, card: Card) -> None:
        import torch

        size = COPY_BYTES if card.real else _DRY_COPY_BYTES
        self._source = torch.ones(size, dtype=torch.uint8, device=card.device)
        self._target = torch.empty_like(self._source)
        self.moved_bytes = 2 * size
        """Bytes that one copy reads and writes."""

    def __call__(self) -> None:
        self._target.copy_(self._source)
