"""ONNX Runtime on the CPU or another of its providers: three sessions, the KV cache bound in place.

GroupQueryAttention writes present into past when both are bound to one buffer, so a step copies nothing and
rewinding is a number. On the CPU the buffers are numpy arrays that ONNX Runtime uses as they lie; elsewhere
they lie on the device, and only a step's inputs and logits cross over.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crab_edge.engines import _onnxruntime_provider as providers
from crab_edge.engines._opening import GRAPHS, Opening
from crab_edge.errors import BundleError, CrabError, DependencyError, EngineError, InputError
from crab_edge.manifest import COPY_AGAIN
from crab_edge.memory import available_bytes, give_back, page_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle
    from crab_edge.engines import Tracer

VARIANT = "provider"
"""What stands behind the colon of `onnxruntime:cuda`."""
CPU = providers.PROVIDERS["cpu"]
FIRST_CAPACITY = 1024
# What ONNX Runtime's CPU kernels make of a byte of low-bit weights, with their block sums.
PACKED = 1.25


def create(
    bundle: Bundle, *, threads: int | None = None, low_memory: bool | None = None, provider: str = "cpu"
) -> OnnxRuntimeEngine:
    """Opens the bundle; graphs are opened when first used, or by `warm`.

    low_memory: encoders are closed before the decoder runs, and opened again for the next media; None does so
    where all graphs together wouldn't fit in the memory that is available. provider: "cpu", "cuda" or
    "tensorrt-rtx"; what can't run there is refused, never run elsewhere.
    Raises InputError, DependencyError or DeviceError that says what to install.
    """
    return OnnxRuntimeEngine(bundle, threads=threads, low_memory=low_memory, provider=provider)


def cpu_count() -> int:
    """CPUs that this process may use: its affinity, bounded by the container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        if quota != "max":
            count = min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


class OnnxRuntimeEngine:
    """`Engine` over a bundle's ONNX graphs. Not thread-safe, but `warm` works beside the caller's thread."""

    name = "onnxruntime"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        low_memory: bool | None = None,
        provider: str = "cpu",
    ) -> None:
        self._bundle = bundle
        self._provider = providers.find(provider)
        if not self._provider.on_cpu:
            providers.check(self._provider, _import())
        if low_memory is None:
            low_memory = _short_of_memory(bundle, self._provider)
        self.low_memory = low_memory
        self._model = bundle.manifest.model
        self._threads = threads or cpu_count()
        self._graphs = Opening(self._open)
        self._cache: _Cache | None = None
        self.length = 0

    def warm(self, *, vision: bool = True, audio: bool = True) -> None:
        """Starts opening the decoder and the towers named, each in a thread of its own.

        With `low_memory` the decoder waits until the towers have run.
        """
        for name, wanted in (("decoder", not self.low_memory), ("audio", audio), ("vision", vision)):
            if wanted:
                self._graphs.start(name)

    def _open(self, name: str) -> Any:
        return _open(self._bundle, name, self._threads, provider=self._provider)

    def close(self, *names: str) -> None:
        """Closes these graphs (default: all, with the cache) and gives their memory back."""
        dropped = self._graphs.drop(names)
        if not names:
            self._cache, self.length = None, 0
        if dropped:
            give_back()

    def vision(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patches float32 [T*256, 1176] -> embeddings float32 [T*64, H]."""
        out = self._run("vision", {"pixel_values": pixel_values})
        return self._checked("vision", out, len(pixel_values) // 4)

    def audio(self, chunks: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mel chunks float32 [C, n_mels, 200], valid frames int64 [C] -> embeddings float32 [n, H]."""
        out = self._run("audio", {"mel": chunks, "lengths": lengths})
        return self._checked("audio", out, None)

    def _run(self, name: str, inputs: dict[str, NDArray[Any]]) -> NDArray[np.float32]:
        session = self._graphs.get(name)
        try:
            (out,) = session.run(["embeddings"], inputs)
        except Exception as error:
            raise providers.refused(self._provider, f"the {name} graph failed", _one_line(error)) from error
        return np.asarray(out, dtype=np.float32)

    def _checked(self, name: str, out: NDArray[np.float32], rows: int | None) -> NDArray[np.float32]:
        expected = (len(out) if rows is None else rows, self._model.hidden_size)
        if out.shape != expected:
            raise EngineError(
                f"the {name} graph returned shape {out.shape}, expected {expected}; {COPY_AGAIN}"
            )
        return out

    def forward(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends S embeddings [1, S, H] at position_ids [3, 1, S] to the cache; logits [V] of the last.

        The returned array is overwritten by the next call.
        """
        total = self.length + embeds.shape[1]
        if total > self._model.max_positions:
            raise EngineError(
                f"{total} tokens are more than the {self._model.max_positions} that {self._model.name} "
                "can hold; ask about a shorter clip"
            )
        if self.low_memory:
            self.close("vision", "audio")
        if self._cache is None:
            self._cache = _Cache(self._graphs.get("decoder"), self._bundle, self._provider)
        self._cache.reserve(total, self.length)
        logits = self._cache.run(embeds, position_ids, total)
        self.length = total
        return logits

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise EngineError(f"can't rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def tracer(self) -> Tracer:
        """Passes that give the routers' weights, beside this engine's cache. See `engines.Traceable`."""
        from crab_edge.engines._onnxruntime_trace import RouterTracer

        if not self._provider.on_cpu:
            raise InputError(
                f"routers are traced on the CPU, and this engine runs on {self._provider.name}; use --engine "
                "onnxruntime, or ask without a router trace"
            )
        return RouterTracer(self._bundle, self._threads)

    def describe(self) -> dict[str, Any]:
        """Name, provider, version and threads."""
        return {
            "name": self.name,
            "provider": self._provider.package,
            "version": _import().__version__,
            "threads": self._threads,
        }


def _short_of_memory(bundle: Bundle, provider: providers.Provider) -> bool:
    """Whether all graphs at once would take more than is available; the embedding stays on the disk."""
    available = available_bytes()
    if not provider.on_cpu:
        from crab_edge.engines import _cuda

        device = _cuda.Device()
        available = device.memory()[0]
        device.close()
    files = bundle.manifest.files
    held = sum(files[file].size for name in GRAPHS for file in bundle.graph_files(name))
    return available is not None and held * PACKED > available


def _import() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise DependencyError(
            f"onnxruntime can't be imported ({error}); run `pip install 'crab-edge[cpu]'`"
        ) from error
    # Its device scan warns about absent GPUs on stderr; errors still come through.
    onnxruntime.set_default_logger_severity(3)
    return onnxruntime


def _open(
    bundle: Bundle,
    name: str,
    threads: int,
    model: bytes | None = None,
    provider: providers.Provider = CPU,
) -> Any:
    """One session, on that provider and nothing else.

    `model`: its bytes, where they aren't those of the bundle's file; external data are the bundle's.
    """
    onnxruntime = _import()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if name != "decoder":
        # A tower runs once a clip: its threads must not spin beside the decoder's.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    path = bundle.graph(name)
    if model is not None:
        # Nodes added at a graph's end would else run last and keep every layer's activations till then.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
    wanted = providers.options_for(provider, onnxruntime, options)
    try:
        session = onnxruntime.InferenceSession(model or str(path), options, providers=wanted or None)
    except Exception as error:
        raise _unopened(path, error, provider) from error
    page_out(bundle.path, bundle.graph_files(name))
    providers.assert_runs(provider, session, path)
    return session


def _unopened(path: Path, error: Exception, provider: providers.Provider) -> CrabError:
    """The error for a graph that ONNX Runtime refused: on a GPU the machine may be at fault, not the file."""
    said = _one_line(error)
    if provider.on_cpu:
        return BundleError(f"{path}: ONNX Runtime can't open it ({said}); {COPY_AGAIN}")
    return providers.refused(provider, f"{path}: ONNX Runtime can't open it on {provider.name}", said)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


class _Cache:
    """The KV buffers, and the bindings of the decoder to them: one for single steps, one for chunks."""

    def __init__(self, session: Any, bundle: Bundle, provider: providers.Provider = CPU) -> None:
        model = bundle.manifest.model
        self._session = session
        self._provider = provider
        self._ort = _import()
        self._names = [f"{i}.{part}" for i in range(model.layers) for part in ("key", "value")]
        self._shape = (1, model.kv_heads, 0, model.head_dim)
        self._dtype = np.dtype(bundle.manifest.recipe.kv_dtype)
        self._limit = model.max_positions
        self._buffers: list[NDArray[Any]] = []
        """The cache on the CPU; elsewhere empty, and `_values` are on the device."""
        self._values: list[Any] = []
        self.capacity = 0
        self._logits = np.empty((1, 1, model.vocab_size), np.float32)
        self._seqlens = np.empty(1, np.int32)
        self._total = np.empty(1, np.int32)
        self._embeds = np.empty((1, 1, model.hidden_size), np.float32)
        self._positions = np.empty((3, 1, 1), np.int64)
        self._step: Any = None
        self._chunk: Any = None

    def reserve(self, total: int, used: int) -> None:
        """Room for `total` tokens; the first `used` are kept when the buffers have to grow."""
        if total <= self.capacity:
            return
        capacity = max(FIRST_CAPACITY, self.capacity)
        while capacity < total:
            capacity *= 2
        capacity = max(total, min(capacity, self._limit))
        batch, heads, _, depth = self._shape
        shape = (batch, heads, capacity, depth)
        if self._provider.on_cpu:
            buffers = [np.zeros(shape, self._dtype) for _ in self._names]
            for new, old in zip(buffers, self._buffers, strict=False):
                new[:, :, :used] = old[:, :, :used]
            self._buffers = buffers
            self._values = [self._value(buffer) for buffer in buffers]
        else:
            self._values = self._on_device(shape, used)
        self.capacity = capacity
        self._step, self._chunk = self._binding(), self._binding()

    def _on_device(self, shape: tuple[int, ...], used: int) -> list[Any]:
        """New buffers there, one by one: beside the old ones only one is on the way."""
        made = []
        for place in range(len(self._names)):
            host = np.zeros(shape, self._dtype)
            if used:
                host[:, :, :used] = self._values[place].numpy()[:, :, :used]
            try:
                made.append(self._ort.OrtValue.ortvalue_from_numpy(host, self._provider.device, 0))
            except Exception as error:
                raise providers.refused(
                    self._provider, "the KV cache can't be allocated", _one_line(error)
                ) from error
        return made

    def _value(self, array: NDArray[Any]) -> Any:
        """An OrtValue over the array's own memory (ONNX Runtime copies only for other devices)."""
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _binding(self) -> Any:
        binding = self._session.io_binding()
        for name, value in zip(self._names, self._values, strict=True):
            binding.bind_ortvalue_input(f"past.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        self._bind(binding, self._embeds, self._positions)
        binding.bind_ortvalue_output("logits", self._value(self._logits))
        return binding

    def _bind(self, binding: Any, embeds: NDArray[np.float32], positions: NDArray[np.int64]) -> None:
        """The inputs as they are now: bound on the CPU they are read where they lie, for a device copied
        here.
        """
        binding.bind_ortvalue_input("inputs_embeds", self._value(embeds))
        binding.bind_ortvalue_input("position_ids", self._value(positions))
        binding.bind_ortvalue_input("seqlens_k", self._value(self._seqlens))
        binding.bind_ortvalue_input("total_sequence_length", self._value(self._total))

    def run(
        self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64], total: int
    ) -> NDArray[np.float32]:
        """One run of the decoder over the tokens that end at `total`."""
        self._seqlens[0] = total - 1
        self._total[0] = total
        if embeds.shape[1] == 1:
            self._embeds[...] = embeds
            self._positions[...] = position_ids
            binding = self._step
            if not self._provider.on_cpu:
                self._bind(binding, self._embeds, self._positions)
        else:
            binding = self._chunk
            embeds = np.ascontiguousarray(embeds, np.float32)
            position_ids = np.ascontiguousarray(position_ids, np.int64)
            self._bind(binding, embeds, position_ids)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise providers.refused(self._provider, "the decoder graph failed", _one_line(error)) from error
        return self._logits[0, 0]
