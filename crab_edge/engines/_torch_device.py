"""Which device the torch engine runs on, in which type, and what its failures mean."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from crab_edge.errors import CrabError, DependencyError, DeviceError, EngineError, InputError
from crab_edge.memory import available_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BF16_SINCE = (8, 0)
_MB = 1 << 20


def choose_device(name: str) -> torch.device:
    """`auto` (CUDA where there is a GPU, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises InputError for another name, DeviceError without that GPU, DependencyError without Triton.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    if kind != "cuda" or not (number.isdecimal() or name == "cuda"):
        raise InputError(f"device {name!r}: engine torch knows auto, cpu, cuda and cuda:N")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {name}: torch {torch.__version__} finds no GPU ({_why_no_gpu()}); check `nvidia-smi`, "
            "install a torch that is built for your driver's CUDA, or use device cpu or engine onnxruntime"
        )
    count = torch.cuda.device_count()
    index = int(number) if number else torch.cuda.current_device()
    if index >= count:
        cards = ", ".join(f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(count))
        raise DeviceError(f"device {name} isn't there; choose one of: {cards}")
    if importlib.util.find_spec("triton") is None:
        raise DependencyError("engine torch on CUDA needs Triton; run `pip install 'crab-edge[cuda]'`")
    return torch.device("cuda", index)


def _why_no_gpu() -> str:
    """What CUDA says to it: a torch without CUDA, a driver that is too old or missing, no device."""
    try:
        torch.cuda.init()
    except Exception as error:
        return " ".join(str(error).split())[:200].rstrip(".")
    return "no device"


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type of activations: bfloat16 on CUDA, float32 on the CPU, or the one asked for.

    Raises InputError for one that the device's kernels don't take.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    allowed = [known for known in DTYPES if device.type == "cpu" or known != "float32"]
    if name not in allowed:
        raise InputError(f"dtype {name}: on {device} expected one of {', '.join(allowed)}")
    return DTYPES[name]


def check_dtype(device: torch.device, dtype: torch.dtype) -> None:
    """Raises DeviceError where the GPU is too old for bfloat16."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    found = torch.cuda.get_device_capability(device)
    if found < _BF16_SINCE:
        raise DeviceError(
            f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}, but "
            "bfloat16 needs 8.0; use dtype float16 or engine onnxruntime"
        )


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated on the GPU, torch's own reserve included; None on the CPU."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        # A Jetson's memory is the machine's: CUDA doesn't count the files in its cache (the bundle's among
        # them) as free, though it gets their room when it asks for it.
        free = max(free, available_bytes() or 0)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def check_room(device: torch.device, what: str, needed: int) -> None:
    """Raises DeviceError where the GPU hasn't `needed` bytes left for `what`."""
    free = free_bytes(device)
    if free is not None and free < needed:
        raise DeviceError(_short(device, what, needed, free))


@contextmanager
def running(device: torch.device, what: str, needed: int) -> Iterator[None]:
    """`what` on the device, without gradients; what torch and the kernels raise becomes an EngineError, a
    lack of memory a DeviceError.

    needed: bytes that `what` takes, 0 if unknown, for the message when they aren't there.
    """
    # Triton launches on the thread's current device, whatever the tensors' is.
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    try:
        with torch.inference_mode(), current:
            yield
    except CrabError:
        raise
    except torch.cuda.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise DeviceError(_short(device, what, needed, free_bytes(device) or 0)) from error
    except Exception as error:
        line = " ".join(str(error).split())[:300]
        raise EngineError(f"{what} failed on {device} ({type(error).__name__}: {line})") from error


def _short(device: torch.device, what: str, needed: int, free: int) -> str:
    least = f"about {needed // _MB} MB are needed, " if needed else ""
    return (
        f"{device} is short of memory for {what}: {least}{free // _MB} MB are free; close what else uses the "
        "GPU, choose low_memory, a shorter clip or a bundle of fewer bits (`crab-edge plan` says what fits)"
    )
