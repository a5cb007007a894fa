"""The few calls of NVIDIA's driver that an engine needs: devices, memory, streams, captured graphs.

They go to the driver's own library (libcuda) through ctypes: it is there wherever a GPU can be used, its
functions are stable over releases, and it needs no package that must match the driver's release, as
`cuda-python` does. Memory is the primary context's, which TensorRT and other libraries share.
Pointers and handles are plain integers. Declared after cuda.h of CUDA 13.0.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator, Sequence
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crab_edge.errors import DeviceError, EngineError

if TYPE_CHECKING:
    from numpy.typing import NDArray

LIBRARY = "libcuda.so.1"
OUT_OF_MEMORY, NO_DEVICE = 2, 100
_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute
_NON_BLOCKING, _THREAD_LOCAL = 1, 1  # CUstream_flags, CUstreamCaptureMode
_OLD_DRIVER = {
    34: "the library is CUDA's stub, not a driver",
    36: "the driver is too old",
    222: "the driver is too old for the PTX in it",
    803: "the driver's library and its kernel module are of different versions",
    804: "CUDA's compatibility package doesn't support this GPU",
}
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (c_uint,),
    "cuDriverGetVersion": (POINTER(c_int),),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetUuid_v2": (c_void_p, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxSetCurrent": (c_void_p,),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemsetD8Async": (c_ulonglong, c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, POINTER(c_void_p)),
    "cuGraphInstantiateWithFlags": (POINTER(c_void_p), c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGraphDestroy": (c_void_p,),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver counts them. sm: compute capability (89 is 8.9); integrated: it shares the CPU's
    memory, as on a Jetson."""

    index: int
    name: str
    sm: int
    memory: int
    uuid: str
    integrated: bool

    @property
    def capability(self) -> str:
        """The compute capability as NVIDIA writes it."""
        return f"{self.sm // 10}.{self.sm % 10}"


def _load() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError:
        raise DeviceError(
            f"no NVIDIA driver on this machine ({LIBRARY} can't be loaded); install the driver for its GPU, "
            "or run on the CPU with `--engine onnxruntime`"
        ) from None


@functools.cache
def driver() -> Driver:
    """The machine's driver, initialised once. DeviceError where there is none or it finds no GPU."""
    return Driver(_load())


class Driver:
    """libcuda with its functions declared, so that 64-bit pointers aren't cut."""

    def __init__(self, library: Any) -> None:
        self._library = library
        for name, arguments in _SIGNATURES.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise DeviceError(
                    f"the NVIDIA driver is too old: it has no {name}; install a driver for CUDA 12.0 or newer"
                ) from None
            function.argtypes = arguments
            function.restype = c_int
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls one function; DeviceError or EngineError with the driver's own name of what went wrong."""
        status = getattr(self._library, name)(*arguments)
        if status:
            raise self._error(name, status)

    def _error(self, name: str, status: int) -> EngineError:
        text = c_char_p()
        known = self._library.cuGetErrorName(status, byref(text)) == 0 and text.value
        said = text.value.decode() if known and text.value else f"error {status}"
        if status == OUT_OF_MEMORY:
            return DeviceError(
                f"out of device memory ({name}: {said}); close other programs on the GPU, use --low-memory, "
                "or export the engine with a smaller cache"
            )
        if status == NO_DEVICE:
            return DeviceError(
                f"the NVIDIA driver finds no GPU ({said}); check `nvidia-smi` and CUDA_VISIBLE_DEVICES, and "
                "in a container start it with `--gpus all` (Jetson: `--runtime nvidia`)"
            )
        if status in _OLD_DRIVER:
            return DeviceError(
                f"{_OLD_DRIVER[status]} ({name}: {said}); install a newer NVIDIA driver (Jetson: a newer "
                "JetPack)"
            )
        return EngineError(f"the NVIDIA driver refused {name}: {said}; run `crab-edge doctor`")

    def version(self) -> tuple[int, int]:
        """The newest CUDA release that the driver supports, such as (13, 0)."""
        number = c_int()
        self.call("cuDriverGetVersion", byref(number))
        return number.value // 1000, number.value % 1000 // 10

    def gpus(self) -> list[Gpu]:
        """The GPUs that this process may use; CUDA_VISIBLE_DEVICES has its say."""
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        return [self._gpu(index) for index in range(count.value)]

    def _gpu(self, index: int) -> Gpu:
        handle, memory = c_int(), c_size_t()
        self.call("cuDeviceGet", byref(handle), index)
        name, uuid = ctypes.create_string_buffer(256), ctypes.create_string_buffer(16)
        self.call("cuDeviceGetName", name, 256, handle.value)
        self.call("cuDeviceGetUuid_v2", uuid, handle.value)
        self.call("cuDeviceTotalMem_v2", byref(memory), handle.value)
        values = []
        for attribute in (_MAJOR, _MINOR, _INTEGRATED):
            value = c_int()
            self.call("cuDeviceGetAttribute", byref(value), attribute, handle.value)
            values.append(value.value)
        code = uuid.raw.hex()
        parts = (code[:8], code[8:12], code[12:16], code[16:20], code[20:])
        shown = name.value.decode(errors="replace")
        return Gpu(
            index, shown, 10 * values[0] + values[1], memory.value, "GPU-" + "-".join(parts), bool(values[2])
        )


class Device:
    """One GPU's primary context and one stream of it, in which everything here happens in order.

    The context is current in the thread that opened it; another thread calls `activate` first.
    """

    def __init__(self, index: int = 0) -> None:
        self._driver = driver()
        self._handle, self._context, stream = c_int(), c_void_p(), c_void_p()
        self._driver.call("cuDeviceGet", byref(self._handle), index)
        self._driver.call("cuDevicePrimaryCtxRetain", byref(self._context), self._handle.value)
        self.activate()
        self._driver.call("cuStreamCreate", byref(stream), _NON_BLOCKING)
        self.stream = stream.value or 0
        self.alone = threading.Lock()
        """Held while the stream is recorded, and by another thread that puts work into it."""

    def activate(self) -> None:
        """Makes the context current in the calling thread."""
        self._driver.call("cuCtxSetCurrent", self._context)

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all. Of an integrated GPU: the driver's view of the shared memory."""
        free, total = c_size_t(), c_size_t()
        self._driver.call("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value, total.value

    def allocate(self, nbytes: int) -> Memory:
        """Device memory, whose content is undefined. DeviceError when there isn't enough."""
        address = c_ulonglong()
        self._driver.call("cuMemAlloc_v2", byref(address), max(1, nbytes))
        return Memory(self._driver, address.value, nbytes)

    def pinned(self, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """An array in page-locked host memory, from and to which copies don't wait. Freed with its last
        view.
        """
        import numpy as np

        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        pointer = c_void_p()
        self._driver.call("cuMemHostAlloc", byref(pointer), max(1, size), 0)
        owner = _Pinned(self._driver, pointer.value or 0, size)
        return np.asarray(owner).view(kind).reshape(tuple(shape))

    def zero(self, memory: Memory) -> None:
        """Fills with zero bytes, in the stream's order."""
        self._driver.call("cuMemsetD8Async", memory.address, 0, memory.nbytes, self.stream)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copies a contiguous array to the device, in the stream's order; it must live until
        `synchronize`.
        """
        self._driver.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Copies from the device into a contiguous array, complete after `synchronize`."""
        self._driver.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def synchronize(self) -> None:
        """Waits for the stream; errors of what ran in it come out here."""
        self._driver.call("cuStreamSynchronize", self.stream)

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        """What the block puts into the stream is recorded, not run. The graph is ready after the block."""
        graph = Graph(self._driver, self.stream)
        with self.alone:
            self._driver.call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)
            try:
                yield graph
            except BaseException:
                with contextlib.suppress(EngineError):
                    graph.abandon()
                raise
            graph.finish()

    def close(self) -> None:
        """Gives up stream and context. Memory of the context is freed by its own `free`, before this."""
        if self.stream:
            self.activate()
            self._driver.call("cuStreamDestroy_v2", self.stream)
            self.stream = 0
            # It may end with the last one who uses it; nobody may find it current then.
            self._driver.call("cuCtxSetCurrent", None)
            self._driver.call("cuDevicePrimaryCtxRelease_v2", self._handle.value)


class Memory:
    """Device memory. `free` gives it back; so does the garbage collector, where the process still lives."""

    def __init__(self, owner: Driver, address: int, nbytes: int) -> None:
        self._driver = owner
        self.address = address
        self.nbytes = nbytes

    def free(self) -> None:
        """Gives the memory back; a second call does nothing."""
        address, self.address = self.address, 0
        if address:
            self._driver.call("cuMemFree_v2", address)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.free()


class Graph:
    """A recorded sequence of work, launched as one."""

    def __init__(self, owner: Driver, stream: int) -> None:
        self._driver = owner
        self._stream = stream
        self._executable = c_void_p()

    def finish(self) -> None:
        """Ends the recording and makes it launchable."""
        graph = c_void_p()
        self._driver.call("cuStreamEndCapture", self._stream, byref(graph))
        try:
            self._driver.call("cuGraphInstantiateWithFlags", byref(self._executable), graph, 0)
        finally:
            self._driver.call("cuGraphDestroy", graph)

    def abandon(self) -> None:
        """Ends the recording and forgets it."""
        graph = c_void_p()
        self._driver.call("cuStreamEndCapture", self._stream, byref(graph))
        if graph:
            self._driver.call("cuGraphDestroy", graph)

    def launch(self) -> None:
        """Puts the work into the stream it was recorded in."""
        self._driver.call("cuGraphLaunch", self._executable, self._stream)

    def free(self) -> None:
        """Gives the graph back; a second call does nothing."""
        executable, self._executable = self._executable, c_void_p()
        if executable:
            self._driver.call("cuGraphExecDestroy", executable)


class _Pinned:
    """Owner of page-locked bytes; NumPy keeps it alive as long as an array looks at them."""

    def __init__(self, owner: Driver, address: int, nbytes: int) -> None:
        self._driver = owner
        self._address = address
        self.__array_interface__: dict[str, Any] = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (address, False),
        }

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self._driver.call("cuMemFreeHost", self._address)
