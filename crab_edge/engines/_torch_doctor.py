"""What `crab-edge doctor` launches of torch: a product, and the low-bit kernels against their exact form."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..errors import DependencyError, DeviceError, EngineError
from ..lowbit import QTensor

_SIZE = 256
_BLOCK = 128
_TOLERANCE = 2e-2
"""Relative, of products in bfloat16 against float32."""


def kernels(variant: str, say: Callable[..., None]) -> None:
    """Launches on "cpu" or "cuda" and reports through `say`; raises what keeps it from running."""
    say(facts={"version": torch.__version__})
    device = torch.device(variant)
    if device.type == "cuda":
        _look_at_gpu(say)
    say(step=f"running a product in torch on {device}")
    x = torch.eye(_SIZE, device=device) * 3
    started = time.perf_counter()
    y = (x @ x).cpu()
    if not torch.allclose(y, torch.eye(_SIZE) * 9):
        raise EngineError(f"torch on {device} computes wrong numbers; reinstall it")
    say(facts={"kernel": f"a product in {1e3 * (time.perf_counter() - started):.1f} ms"})
    say(step=f"running the low-bit kernels on {device}")
    _low_bit(device, say)


def _look_at_gpu(say: Callable[..., None]) -> None:
    if torch.version.cuda is None and torch.version.hip is None:
        raise DependencyError(
            f"torch {torch.__version__} is built without CUDA; install one that is, see "
            "pytorch.org/get-started (Jetson: NVIDIA's wheels for its JetPack)"
        )
    if not torch.cuda.is_available():
        from . import _cuda

        # Says it if there is no driver or no GPU; else torch and driver don't fit together.
        version = _cuda.driver().version()
        raise DeviceError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) can't use this GPU; the driver supports "
            f"CUDA {version[0]}.{version[1]}: update the NVIDIA driver, or install a torch for an older CUDA"
        )
    major, minor = torch.cuda.get_device_capability()
    free, total = torch.cuda.mem_get_info()
    say(
        facts={
            "device": f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}",
            "device memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        }
    )
    if importlib.util.find_spec("triton") is None:
        raise DependencyError(
            "torch runs on the GPU, but its low-bit kernels need Triton; run `pip install 'crab-edge[cuda]'`"
        )
    import triton

    say(facts={"triton": triton.__version__})


def _low_bit(device: torch.device, say: Callable[..., None]) -> None:
    """A 4-bit product as the decoder has them, on `device` in the engine's type and on the CPU in float32."""
    from ..ilora import torch_ops
    from ._torch_device import check_dtype, choose_dtype

    dtype = choose_dtype(None, device)
    check_dtype(device, dtype)
    random = np.random.default_rng(0)
    codes = random.integers(0, 256, (_SIZE, _SIZE // _BLOCK, _BLOCK // 2), dtype=np.uint8)
    scales = random.random((_SIZE, _SIZE // _BLOCK), dtype=np.float32) * 0.1
    weight = QTensor(codes, scales, 4, _BLOCK, (_SIZE, _SIZE))
    x = torch.from_numpy(random.standard_normal((3, _SIZE), dtype=np.float32))

    def product(where: torch.device, dtype: torch.dtype) -> Any:
        w = torch_ops.prepare(weight, where)
        given = x.to(where, dtype)
        y = torch_ops.lowbit_linear(given, None, w.q, w.scales, w.bits, w.block, 0, None)
        return y.float().cpu()

    started = time.perf_counter()
    actual = product(device, dtype)
    seconds = time.perf_counter() - started
    expected = product(torch.device("cpu"), torch.float32)
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error < _TOLERANCE:
        raise EngineError(f"the low-bit kernels on {device} are off by {error:.2g}; update Triton and torch")
    say(facts={"low-bit kernel": f"off by {error:.1g}, compiled and run in {seconds:.2f} s"})
