"""TensorRT and TensorRT-RTX: the engines that a bundle carries for a target, on one GPU.

One code path for both libraries; the bundle's manifest says which one built an engine. It is read before any
file: what can't run here is refused with its reason. A file is opened for the first time in a process of its
own, because the library ends the process over some that it can't run.
"""

from __future__ import annotations

import importlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from crab_edge.engines import _cuda, _tensorrt_probe
from crab_edge.engines import _tensorrt_check as checks
from crab_edge.engines._opening import GRAPHS
from crab_edge.engines._tensorrt_graph import EngineFile, Scratch
from crab_edge.errors import BundleError, EngineError, InputError
from crab_edge.manifest import COPY_AGAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle

VARIANT = "target"
"""What stands behind the colon of `tensorrt:rtx`."""
PATCHES = 256
"""Rows of `pixel_values` that belong to one pair of frames and go through the encoder together."""
_SPARE = 1.2
"""Activations and the library's own memory, beside weights and cache, when all graphs are open at once."""


def create(
    bundle: Bundle, *, threads: int | None = None, low_memory: bool | None = None, target: str | None = None
) -> TensorRTEngine:
    """Opens the bundle's engine for `target`, or the one that fits this machine; files open at first use.

    threads: without meaning here. low_memory: encoders are closed before the decoder opens; None does so
    where all together wouldn't fit in the GPU's free memory. Raises InputError, BundleError, DependencyError,
    DeviceError or EngineError with the way out.
    """
    return TensorRTEngine(bundle, low_memory=low_memory, target=target)


def machine() -> checks.Machine:
    """GPUs, driver and libraries of this machine. DeviceError without a driver or a GPU."""
    driver = _cuda.driver()
    return checks.Machine(driver.gpus(), driver.version(), *checks.installed())


class TensorRTEngine:
    """`Engine` over a target's engine files. Not thread-safe, but `warm` works beside the caller's thread."""

    name = "tensorrt"

    def __init__(self, bundle: Bundle, *, low_memory: bool | None = None, target: str | None = None) -> None:
        here = machine()
        self._bundle = bundle
        self._model = bundle.manifest.model
        self.target, self._info = checks.choose(bundle, target, here)
        missing = [name for name in GRAPHS if name not in self._info.graphs]
        if missing:
            raise BundleError(f"{bundle.path}: target {self.target} has no {missing[0]} engine; {COPY_AGAIN}")
        self._gpu = here.gpus[0]
        self._driver = here.driver
        self._library = importlib.import_module(self._info.library)
        self._device = _cuda.Device(self._gpu.index)
        free, _ = self._device.memory()
        self.low_memory = self._short(free) if low_memory is None else low_memory
        checks.check_memory(bundle, self._info, free, low_memory=self.low_memory)
        _tensorrt_probe.once(bundle.path, self.target, self._info, self._gpu, self._driver)
        self.capacity = min(self._info.capacity, self._model.max_positions)
        """Tokens that the cache holds: it is allocated whole when the decoder opens, and doesn't grow."""
        self._scratch = Scratch(self._device)
        self._files: dict[str, Future[EngineFile]] = {}
        self._lock = threading.Lock()
        # One at a time: opening is bound by disk and driver, and two at once would both stage their weights.
        self._opener = ThreadPoolExecutor(1, "open-engine")
        self._longest = _largest(self._info.graphs["decoder"], "inputs_embeds", 1)
        self.length = 0

    def _short(self, free: int) -> bool:
        sizes = (self._bundle.manifest.files[graph.file].size for graph in self._info.graphs.values())
        return (sum(sizes) + checks.cache_bytes(self._info)) * _SPARE > free

    def warm(self, *, vision: bool = True, audio: bool = True) -> None:
        """Starts opening the encoders named and the decoder in a thread; with `low_memory` not the
        decoder.
        """
        for name, wanted in (("audio", audio), ("vision", vision), ("decoder", not self.low_memory)):
            if wanted:
                self._start(name)

    def _start(self, name: str) -> Future[EngineFile]:
        with self._lock:
            if name not in self._files:
                self._files[name] = self._opener.submit(self._open, name)
            return self._files[name]

    def _open(self, name: str) -> EngineFile:
        self._device.activate()
        return open_file(self._library, self._device, self._scratch, self._bundle, self.target, name)

    def _file(self, name: str) -> EngineFile:
        file = self._start(name).result()
        self._device.activate()
        return file

    def close(self, *names: str) -> None:
        """Closes these graphs (default: all, with the cache) and frees their device memory."""
        with self._lock:
            closing = [self._files.pop(name) for name in names or GRAPHS if name in self._files]
        self._device.activate()
        failed = [error for future in closing if (error := future.exception()) is not None]
        for future in closing:
            if future.exception() is None:
                future.result().close()
        if closing:
            # What it was sized for is gone; the next pass takes what its own engine needs.
            self._scratch.free()
        if not names:
            self.length = 0
        if failed:
            # Of one that was still being opened; it mayn't be lost on the way.
            raise failed[0]

    def vision(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patches float32 [T*256, 1176] -> embeddings float32 [T*64, H].

        More frames than the engine's profile takes go through it in parts: it never mixes them.
        """
        if len(pixel_values) % PATCHES or not len(pixel_values):
            raise EngineError(f"vision got {len(pixel_values)} patches, expected a multiple of {PATCHES}")
        file = self._file("vision")
        step = max(PATCHES, _largest(file.spec, "pixel_values", 0) // PATCHES * PATCHES)
        parts = [
            file.run({"pixel_values": pixel_values[begin : begin + step]})["embeddings"].copy()
            for begin in range(0, len(pixel_values), step)
        ]
        return self._checked("vision", np.concatenate(parts), len(pixel_values) // 4)

    def audio(self, chunks: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mel chunks float32 [C, n_mels, 200], valid frames int64 [C] -> embeddings float32 [n, H].

        More chunks than the engine's profile takes go through it in parts: it never mixes them. The engine
        gives the rows of padding too (`embeddings` [C, tokens, H]), and how many of a chunk count (`tokens`
        [C]).
        """
        file = self._file("audio")
        step = _largest(file.spec, "mel", 0)
        parts = []
        for begin in range(0, len(chunks), step):
            part = slice(begin, begin + step)
            out = file.run({"mel": chunks[part], "lengths": lengths[part]})
            kept = zip(out["embeddings"], out["tokens"].astype(np.int64), strict=True)
            parts += [rows[:count].copy() for rows, count in kept]
        return self._checked("audio", np.concatenate(parts), None)

    def _checked(self, name: str, out: NDArray[np.float32], rows: int | None) -> NDArray[np.float32]:
        expected = (len(out) if rows is None else rows, self._model.hidden_size)
        if out.shape != expected:
            raise EngineError(
                f"the {name} engine returned shape {out.shape}, expected {expected}; build it again with "
                f"`{self._info.build_command}`"
            )
        return out

    def forward(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends S embeddings [1, S, H] at position_ids [3, 1, S] to the cache; logits [V] of the last.

        The returned array is overwritten by the next call. EngineError when the cache is full.
        """
        steps = embeds.shape[1] if embeds.ndim == 3 else 0
        if not steps or position_ids.shape != (3, 1, steps):
            raise EngineError(
                f"forward got {embeds.shape} and {position_ids.shape}, expected [1, S, H] and [3, 1, S]"
            )
        if self.length + steps > self.capacity:
            raise EngineError(
                f"{self.length + steps} tokens are more than the {self.capacity} that the cache of target "
                f"{self.target} holds, and an engine's cache can't grow; ask about a shorter clip, or export "
                "with a larger cache"
            )
        if self.low_memory:
            self.close("vision", "audio")
        file = self._file("decoder")
        for begin in range(0, steps, self._longest):
            part = slice(begin, begin + self._longest)
            logits = self._pass(file, embeds[:, part], position_ids[:, :, part])
        return logits

    def _pass(
        self, file: EngineFile, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        total = self.length + embeds.shape[1]
        logits = file.run(decoder_inputs(file, embeds, position_ids, total))["logits"]
        self.length = total
        return logits.reshape(-1)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise EngineError(f"can't rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def describe(self) -> dict[str, Any]:
        """Name, library with its version, target, GPU, and whether steps run as one CUDA graph."""
        decoder = self._files.get("decoder")
        open_now = decoder is not None and decoder.done() and decoder.exception() is None
        failed = decoder.result().capture_failed if decoder is not None and open_now else ""
        return {
            "name": self.name,
            "provider": self._info.library,
            "version": str(self._library.__version__),
            "target": self.target,
            "device": self._gpu.name,
            "compute_capability": self._gpu.capability,
            "cuda_graph": f"no ({failed})" if failed else "yes",
        }


def open_file(
    library: Any, device: _cuda.Device, scratch: Scratch, bundle: Bundle, target: str, name: str
) -> EngineFile:
    """Opens one graph of a target. What the library refuses comes as a typed error."""
    info = bundle.manifest.engines[target]
    spec = info.graphs[name]  # type: ignore[index]
    cache = {}
    if name == "decoder":
        shapes = [tensor.shape for tensor in spec.inputs if tensor.name.startswith("past.")]
        cache = {axis: info.capacity for shape in shapes for axis in shape if isinstance(axis, str)}
        if not spec.aliases:
            raise InputError(
                f"target {target}: its decoder doesn't say where its cache is written; build it again with "
                f"`{info.build_command}`"
            )
    return EngineFile(
        library,
        device,
        scratch,
        bundle.path / spec.file,
        spec,
        build_command=info.build_command,
        fixed=cache,
        graphs=name == "decoder",
        kernels=_tensorrt_probe.kernels_path(bundle, spec.file, info),
    )


def decoder_inputs(
    file: EngineFile, embeds: NDArray[np.float32], position_ids: NDArray[np.int64], total: int
) -> dict[str, NDArray[Any]]:
    """The decoder's inputs for tokens that end at `total`."""
    values: dict[str, NDArray[Any]] = {
        "inputs_embeds": embeds,
        "position_ids": position_ids,
        "seqlens_k": np.array([total - 1], np.int32),
        "total_sequence_length": np.array([total], np.int32),
    }
    return {tensor.name: values[tensor.name] for tensor in file.spec.inputs if tensor.name in values}


def _largest(spec: Any, name: str, place: int) -> int:
    """The largest size that a profile allows on one axis of an input."""
    axis = next(tensor.shape[place] for tensor in spec.inputs if tensor.name == name)
    if isinstance(axis, int):
        return axis
    return max(profile.axes[axis][2] for profile in spec.profiles if axis in profile.axes)
