"""One engine file, open on the GPU: an execution context for each profile, every tensor bound to memory that
stays where it is, and a CUDA graph for the shapes that come again and again.

TensorRT and TensorRT-RTX have one API; what only one of them has is asked for by name.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crab_edge.engines._tensorrt_check import explain
from crab_edge.errors import BundleError, CrabError, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.engines._cuda import Device, Graph, Memory
    from crab_edge.manifest import EngineGraph, EngineProfile, TensorInfo

DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64"}
_KEPT_MESSAGES = 20


def make_log(library: Any) -> Any:
    """A logger of the library that keeps the last warnings and errors instead of printing them."""

    class Log(library.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.said: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                self.said = [*self.said[1 - _KEPT_MESSAGES :], f"{severity.name.lower()}: {message}"]

        def take(self) -> str:
            """What was said since the last call, errors only where there are any."""
            said, self.said = self.said, []
            errors = [line for line in said if not line.startswith("warning")]
            return "; ".join(errors or said)

    return Log()


class Scratch:
    """Memory for activations that all contexts share: only one of them runs at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._memory: Memory | None = None
        self.generation = 0

    def reserve(self, nbytes: int) -> Memory:
        """At least `nbytes` of it. When it moves, `generation` counts up and contexts must be told."""
        if self._memory is None or self._memory.nbytes < nbytes:
            self.free()
            self._memory = self._device.allocate(nbytes)
            self.generation += 1
        return self._memory

    def free(self) -> None:
        """Gives it back."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None


class EngineFile:
    """A deserialised engine. `run` copies inputs there, runs the profile that holds their shapes, and copies
    outputs back; tensors named in `aliases` stay on the device, output and input in one place.

    fixed: sizes of axes that no input of `run` has (the cache's). graphs: whether a shape that was run before
    is captured into a CUDA graph. Not thread-safe.
    """

    def __init__(
        self,
        library: Any,
        device: Device,
        scratch: Scratch,
        path: Path,
        spec: EngineGraph,
        *,
        build_command: str,
        fixed: Mapping[str, int] | None = None,
        graphs: bool = False,
        kernels: Path | None = None,
    ) -> None:
        self._library = library
        self._device = device
        self._scratch = scratch
        self._build = build_command
        self._what = f"{path.parent.name}/{path.name}"
        self.spec = spec
        self._fixed = dict(fixed or {})
        self._resident = {**spec.aliases, **{source: source for source in spec.aliases.values()}}
        self._log = make_log(library)
        self._runtime = library.Runtime(self._log)
        self._engine: Any = self._deserialise(path)
        _check_tensors(self._engine, spec, self._fixed, self._what, build_command)
        self._own_graphs = graphs and hasattr(library, "CudaGraphStrategy")
        self._on_host = self._host_inputs()
        self._captures = graphs and not self._own_graphs and not self._on_host
        self._kernels = kernels
        self._kernel_cache: Any = None
        self._kept = b""
        self._ran: set[int] = set()
        self._contexts = [self._context(index) for index in range(len(spec.profiles))]
        self._memory: dict[str, Memory] = {}
        self._host: dict[str, NDArray[Any]] = {}
        self._allocate()
        self._shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in self._contexts]
        self._scratch_seen = [-1 for _ in self._contexts]
        self._captured: dict[tuple[Any, ...], Graph | None] = {}
        self.capture_failed = f"{self._on_host[0]} is read by the CPU" if graphs and self._on_host else ""

    def _deserialise(self, path: Path) -> Any:
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = self._runtime.deserialize_cuda_engine(data) if self._valid(data) else None
        except (OSError, ValueError) as error:
            raise BundleError(f"{path}: can't be read ({error}); {self._rebuild}") from None
        if engine is None:
            raise explain(
                f"{path}: {self._library.__name__} can't open the engine", self._log.take(), self._build
            )
        return engine

    def _valid(self, data: mmap.mmap) -> bool:
        """What TensorRT-RTX says of the file's head, before all of it is read; TensorRT has no such
        question.
        """
        if not hasattr(self._runtime, "get_engine_validity"):
            return True
        validity, why = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
        if validity.name != "INVALID":
            return True
        flags = self._library.EngineInvalidityDiagnostics.__members__.items()
        self._log.said += [f"error: {name}" for name, flag in flags if int(why) & int(flag)]
        return False

    def _context(self, index: int) -> Any:
        """A context on profile `index`, without memory of its own for activations."""
        library, strategy = self._library, self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(library, "CudaGraphStrategy"):
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            if self._own_graphs:
                config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self._share_kernels(config)
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context(strategy)
        with self._device.alone:
            if context is None or not context.set_optimization_profile_async(index, self._device.stream):
                raise self._refused(f"profile {self.spec.profiles[index].name} can't be opened")
            self._device.synchronize()
        return context

    def _share_kernels(self, config: Any) -> None:
        """TensorRT-RTX compiles its kernels on this machine: all contexts use one cache, kept over runs."""
        if self._kernel_cache is None:
            self._kernel_cache = config.create_runtime_cache()
            if self._kernels is not None:
                with contextlib.suppress(OSError):
                    self._kept = self._kernels.read_bytes()
                    self._kernel_cache.deserialize(self._kept)
        config.set_runtime_cache(self._kernel_cache)

    def save_kernels(self) -> None:
        """Keeps what TensorRT-RTX has compiled for the next run; that it can't be written costs time only."""
        if self._kernel_cache is None or self._kernels is None:
            return
        made = self._kernel_cache.serialize()
        content = b"" if made is None else bytes(memoryview(made))
        if content in (b"", self._kept):
            return
        temporary = self._kernels.with_name(f"{self._kernels.name}.{os.getpid()}")
        try:
            self._kernels.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, self._kernels)
            self._kept = content
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _host_inputs(self) -> list[str]:
        """Inputs that the library reads itself, to compute shapes: bound to host memory, and never
        recorded.
        """
        names = (tensor.name for tensor in self.spec.inputs)
        return [name for name in names if self._engine.get_tensor_location(name).name == "HOST"]

    @property
    def scratch_bytes(self) -> int:
        """What the largest profile needs for activations."""
        sizes = [self._engine.get_device_memory_size_for_profile_v2(i) for i in range(len(self._contexts))]
        return int(max(sizes))

    def _allocate(self) -> None:
        """Memory for every tensor at the largest size that a profile allows; outputs of unknown size
        later.
        """
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            if tensor.name in self.spec.aliases:
                continue
            shape = self._largest(tensor)
            if shape is None:
                continue
            self._reserve(tensor, shape)
            if tensor.name in self._resident:
                # Values that were never written must at least be numbers: they are masked, not skipped.
                with self._device.alone:
                    self._device.zero(self._memory[tensor.name])
                    self._device.synchronize()

    def _largest(self, tensor: TensorInfo) -> tuple[int, ...] | None:
        sizes = []
        for axis in tensor.shape:
            if isinstance(axis, str):
                bounds = [profile.axes[axis][2] for profile in self.spec.profiles if axis in profile.axes]
                if axis not in self._fixed and not bounds:
                    return None
                axis = self._fixed.get(axis) or max(bounds)
            sizes.append(axis)
        return tuple(sizes)

    def _reserve(self, tensor: TensorInfo, shape: tuple[int, ...]) -> None:
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize
        held = self._memory.get(tensor.name)
        if held is not None and held.nbytes >= nbytes:
            return
        if held is not None:
            held.free()
        self._memory[tensor.name] = self._device.allocate(nbytes)
        if tensor.name not in self._resident:
            self._host[tensor.name] = self._device.pinned((nbytes,), np.uint8)

    def _view(self, tensor: TensorInfo, shape: tuple[int, ...]) -> NDArray[Any]:
        """The page-locked copy of a tensor in its present shape."""
        kind = np.dtype(tensor.dtype)
        nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        return self._host[tensor.name][:nbytes].view(kind).reshape(shape)

    def run(self, values: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One pass. Inputs are cast to the engine's types; outputs are overwritten by the next call.

        Raises EngineError for shapes that no profile holds, and what TensorRT or the driver refuse.
        """
        axes = self._axes(values)
        index = self._profile(axes)
        shapes = {tensor.name: _sized(tensor, axes) for tensor in self.spec.inputs}
        for tensor in self.spec.inputs:
            if tensor.name in values:
                self._view(tensor, shapes[tensor.name])[...] = values[tensor.name]
        self._set_shapes(index, shapes)
        outputs = self._outputs(index)
        key = (index, *shapes.values())
        graph = self._captured.get(key)
        if graph is not None:
            graph.launch()
        elif self._captures and key in self._captured:
            self._capture(index, shapes, outputs, key)
        else:
            self._enqueue(index, shapes, outputs)
            if self._captures:
                # The first run of a shape may still allocate and tune; from the second on it is captured.
                self._captured[key] = None
        try:
            self._device.synchronize()
        except EngineError as error:
            raise type(error)(f"{self._what}: {error}") from error
        if index not in self._ran:
            # Nobody need close an engine: what the first pass of a profile compiled is kept at once.
            self._ran.add(index)
            self.save_kernels()
        return {
            tensor.name: self._view(tensor, shape).astype(np.float32, copy=False) for tensor, shape in outputs
        }

    def _enqueue(
        self,
        index: int,
        shapes: Mapping[str, tuple[int, ...]],
        outputs: list[tuple[TensorInfo, tuple[int, ...]]],
    ) -> None:
        """Copies in, the pass, copies out, in the stream."""
        for tensor in self.spec.inputs:
            if tensor.name not in self._resident and tensor.name not in self._on_host:
                self._device.upload(
                    self._view(tensor, shapes[tensor.name]), self._memory[tensor.name].address
                )
        if not self._contexts[index].execute_async_v3(self._device.stream):
            raise self._refused("the pass failed")
        for tensor, shape in outputs:
            self._device.download(self._memory[tensor.name].address, self._view(tensor, shape))

    def _capture(
        self,
        index: int,
        shapes: Mapping[str, tuple[int, ...]],
        outputs: list[tuple[TensorInfo, tuple[int, ...]]],
        key: tuple[Any, ...],
    ) -> None:
        """Records the pass and runs it. An engine that can't be captured runs uncaptured, and says so."""
        try:
            with self._device.capture() as graph:
                self._enqueue(index, shapes, outputs)
        except CrabError as error:
            self._captures, self.capture_failed = False, str(error)
            self._forget_graphs()
            self._enqueue(index, shapes, outputs)
            return
        self._captured[key] = graph
        graph.launch()

    def _forget_graphs(self, context: int | None = None) -> None:
        """Recorded passes hold addresses, and the state of their context: when memory moves or the context's
        shapes change (then that one's alone) they are recorded anew.
        """
        for key in [key for key in self._captured if context in (None, key[0])]:
            graph = self._captured.pop(key)
            if graph is not None:
                graph.free()

    def _axes(self, values: Mapping[str, NDArray[Any]]) -> dict[str, int]:
        """Sizes of the named axes, from the arrays; EngineError where an array doesn't fit its tensor."""
        axes = dict(self._fixed)
        for tensor in self.spec.inputs:
            if tensor.name in self._resident:
                continue
            if tensor.name not in values:
                raise EngineError(f"{self._what}: input {tensor.name} is missing; {self._rebuild}")
            shape = values[tensor.name].shape
            fits = len(shape) == len(tensor.shape) and all(
                size == (axes.setdefault(axis, size) if isinstance(axis, str) else axis)
                for axis, size in zip(tensor.shape, shape, strict=True)
            )
            if not fits:
                raise EngineError(
                    f"{self._what}: {tensor.name} has shape {list(shape)}, expected {tensor.shape}; "
                    f"{self._rebuild}"
                )
        return axes

    def _profile(self, axes: Mapping[str, int]) -> int:
        """The profile that holds these sizes; of several, the one with the tightest bounds."""
        holding = [
            (sum(bounds[2] for bounds in profile.axes.values()), index)
            for index, profile in enumerate(self.spec.profiles)
            if all(low <= axes.get(axis, low) <= high for axis, (low, _, high) in profile.axes.items())
        ]
        if not holding:
            have = ", ".join(f"{profile.name} {_bounds(profile)}" for profile in self.spec.profiles)
            asked = ", ".join(f"{axis} {size}" for axis, size in axes.items())
            raise EngineError(f"{self._what}: no profile holds {asked} (there are {have}); {self._rebuild}")
        return min(holding)[1]

    def _set_shapes(self, index: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Tells the context its shapes and addresses, where they have changed."""
        context, known = self._contexts[index], self._shapes[index]
        scratch = self._scratch.reserve(self.scratch_bytes)
        if self._scratch_seen[index] != self._scratch.generation:
            self._forget_graphs()
            context.set_device_memory(scratch.address, scratch.nbytes)
            self._scratch_seen[index] = self._scratch.generation
        if not known:
            for tensor in (*self.spec.inputs, *self.spec.outputs):
                held = self._memory.get(self._resident.get(tensor.name, tensor.name))
                address = None if held is None else held.address
                if tensor.name in self._on_host:
                    address = self._host[tensor.name].ctypes.data
                if address is not None and not context.set_tensor_address(tensor.name, address):
                    raise self._refused(f"{tensor.name} can't be bound")
        for name, shape in shapes.items():
            if known.get(name) != shape:
                self._forget_graphs(index)
                if not context.set_input_shape(name, shape):
                    raise self._refused(f"{name} can't have shape {list(shape)}")
                known[name] = shape

    def _outputs(self, index: int) -> list[tuple[TensorInfo, tuple[int, ...]]]:
        """Outputs that are copied back, with their shapes under the inputs' present ones."""
        found = []
        for tensor in self.spec.outputs:
            if tensor.name in self._resident:
                continue
            shape = tuple(int(size) for size in self._contexts[index].get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                raise EngineError(
                    f"{self._what}: the shape of {tensor.name} depends on values ({list(shape)}), which "
                    f"this runtime doesn't take; {self._rebuild}"
                )
            before = self._memory.get(tensor.name)
            self._reserve(tensor, shape)
            if self._memory[tensor.name] is not before:
                self._forget_graphs()
                self._contexts[index].set_tensor_address(tensor.name, self._memory[tensor.name].address)
                for other, known in enumerate(self._shapes):
                    if other != index:
                        known.clear()
            found.append((tensor, shape))
        return found

    @property
    def _rebuild(self) -> str:
        return f"build it again with `{self._build}`"

    def _refused(self, what: str) -> CrabError:
        return explain(f"{self._what}: {what}", self._log.take(), self._build)

    def close(self) -> None:
        """Frees contexts, engine and memory, in this order."""
        self.save_kernels()
        self._forget_graphs()
        self._contexts.clear()
        self._kernel_cache = self._engine = self._runtime = None
        for memory in self._memory.values():
            memory.free()
        self._memory.clear()
        self._host.clear()


def _sized(tensor: TensorInfo, axes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(axes[axis] if isinstance(axis, str) else axis for axis in tensor.shape)


def _bounds(profile: EngineProfile) -> str:
    return " ".join(f"{axis} {low}..{high}" for axis, (low, _, high) in profile.axes.items())


def _check_tensors(
    engine: Any, spec: EngineGraph, fixed: Mapping[str, int], what: str, build_command: str
) -> None:
    """The file's tensors and profiles are the manifest's; BundleError with the first that isn't."""

    def wrong(text: str) -> BundleError:
        return BundleError(
            f"{what}: {text}, so it isn't the engine that bundle.json describes; build it again with "
            f"`{build_command}`"
        )

    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    expected = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    if set(names) != set(expected):
        odd = sorted(set(names) ^ set(expected))[0]
        raise wrong(f"tensor {odd} is {'in the file' if odd in names else 'in the manifest'} alone")
    if engine.num_optimization_profiles != len(spec.profiles):
        raise wrong(f"it has {engine.num_optimization_profiles} profiles, expected {len(spec.profiles)}")
    inputs = {tensor.name for tensor in spec.inputs}
    for name, tensor in expected.items():
        kind = DTYPES.get(engine.get_tensor_dtype(name).name, engine.get_tensor_dtype(name).name)
        if kind != tensor.dtype:
            raise wrong(f"{name} is {kind}, expected {tensor.dtype}")
        if (engine.get_tensor_mode(name).name == "INPUT") != (name in inputs):
            raise wrong(f"{name} is an {engine.get_tensor_mode(name).name.lower()}")
        shape = [int(size) for size in engine.get_tensor_shape(name)]
        wanted = [fixed.get(axis, -1) if isinstance(axis, str) else axis for axis in tensor.shape]
        if len(shape) != len(wanted) or any(
            size != axis for size, axis in zip(shape, wanted, strict=True) if size >= 0 and axis >= 0
        ):
            raise wrong(f"{name} has shape {shape}, expected {wanted}")
        if name in inputs:
            _check_profiles(engine, spec, tensor, wrong)


def _check_profiles(engine: Any, spec: EngineGraph, tensor: TensorInfo, wrong: Any) -> None:
    for index, profile in enumerate(spec.profiles):
        bounds = [
            [int(size) for size in shape] for shape in engine.get_tensor_profile_shape(tensor.name, index)
        ]
        for place, axis in enumerate(tensor.shape):
            if not isinstance(axis, str) or axis not in profile.axes:
                continue
            found = tuple(shape[place] for shape in bounds)
            if found != profile.axes[axis]:
                raise wrong(
                    f"profile {profile.name} takes {axis} {found} of {tensor.name}, expected "
                    f"{profile.axes[axis]}"
                )
