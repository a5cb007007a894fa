"""A driver library in Python: "device memory" is host memory with its bounds kept, and work put into a
stream runs when somebody waits for it, so that a missing wait, copy or bound shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading

import numpy as np

OK, INVALID, OUT_OF_MEMORY, NO_DEVICE, NO_CONTEXT, CAPTURE_UNSUPPORTED, CAPTURE_BROKEN = (
    0,
    1,
    2,
    100,
    201,
    900,
    901,
)
NAMES = {
    1: b"CUDA_ERROR_INVALID_VALUE",
    2: b"CUDA_ERROR_OUT_OF_MEMORY",
    100: b"CUDA_ERROR_NO_DEVICE",
    201: b"CUDA_ERROR_INVALID_CONTEXT",
    222: b"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
    900: b"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
    901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
}
ALIGNMENT = 256


class FakeGpu:
    def __init__(self, name="Test GPU", sm=89, memory=8 << 30, integrated=False):
        self.name, self.sm, self.memory, self.integrated = name, sm, memory, integrated


class _Function:
    """Takes `argtypes` and `restype` like a function of ctypes, and checks the number of arguments."""

    def __init__(self, name, call):
        self._name, self._call, self.argtypes, self.restype = name, call, None, None

    def __call__(self, *arguments):
        assert self.argtypes is not None, f"{self._name} wasn't declared"
        assert len(arguments) == len(self.argtypes), self._name
        return self._call(*arguments)


def _number(value):
    value = getattr(value, "value", value)
    return 0 if value is None else int(value)


class FakeDriver:
    """What `_cuda` calls of libcuda. `missing`: functions an old driver lacks; `fail`: name -> error code."""

    def __init__(self, gpus=None, version=13000, missing=()):
        self.gpus = [FakeGpu()] if gpus is None else gpus
        self.version = version
        self.missing = set(missing)
        self.fail = {}
        self.memory = {}
        self.pinned = {}
        self.calls = []
        self.launches = 0
        self._current = threading.local()
        self._work = {}
        self._recording = {}
        self._graphs = {}
        self._next = 0x1000
        self._functions = {}

    def __getattr__(self, name):
        if not name.startswith("cu") or name in self.missing or not hasattr(type(self), f"_{name}"):
            raise AttributeError(name)
        if name not in self._functions:
            self._functions[name] = _Function(name, lambda *a: self._enter(name, a))
        return self._functions[name]

    def _enter(self, name, arguments):
        self.calls.append(name)
        if name in self.fail:
            return self.fail[name]
        return getattr(self, f"_{name}")(*arguments)

    @property
    def used(self):
        return sum(block.nbytes for block in self.memory.values())

    def _handle(self):
        self._next += 1
        return self._next

    def _has_context(self):
        return getattr(self._current, "context", 0) != 0

    # Devices

    def _cuInit(self, flags):
        return OK if self.gpus else NO_DEVICE

    def _cuDriverGetVersion(self, out):
        out._obj.value = self.version
        return OK

    def _cuGetErrorName(self, code, out):
        out._obj.value = NAMES.get(code)
        return OK if code in NAMES else INVALID

    def _cuDeviceGetCount(self, out):
        out._obj.value = len(self.gpus)
        return OK

    def _cuDeviceGet(self, out, index):
        out._obj.value = index
        return OK if index < len(self.gpus) else INVALID

    def _cuDeviceGetName(self, buffer, size, device):
        buffer.value = self.gpus[device].name.encode()
        return OK

    def _cuDeviceGetUuid_v2(self, buffer, device):
        buffer.raw = bytes([device] * 16)
        return OK

    def _cuDeviceGetAttribute(self, out, attribute, device):
        gpu = self.gpus[device]
        out._obj.value = {75: gpu.sm // 10, 76: gpu.sm % 10, 18: int(gpu.integrated)}[attribute]
        return OK

    def _cuDeviceTotalMem_v2(self, out, device):
        out._obj.value = self.gpus[device].memory
        return OK

    def _cuDevicePrimaryCtxRetain(self, out, device):
        out._obj.value = 0xC0 + device
        return OK

    def _cuDevicePrimaryCtxRelease_v2(self, device):
        return OK

    def _cuCtxSetCurrent(self, context):
        self._current.context = _number(context)
        return OK

    # Memory

    def _cuMemGetInfo_v2(self, free, total):
        if not self._has_context():
            return NO_CONTEXT
        free._obj.value = self.gpus[0].memory - self.used
        total._obj.value = self.gpus[0].memory
        return OK

    def _cuMemAlloc_v2(self, out, size):
        if not self._has_context():
            return NO_CONTEXT
        if self._recording:
            return self._break()
        if self.used + size > self.gpus[0].memory:
            return OUT_OF_MEMORY
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # as float: not a number
        offset = -raw.ctypes.data % ALIGNMENT
        block = raw[offset : offset + size]
        self.memory[block.ctypes.data] = block
        out._obj.value = block.ctypes.data
        return OK

    def _cuMemFree_v2(self, address):
        if self._recording:
            return self._break()
        assert not any(self._work.values()), "memory is freed under work that hasn't run"
        return OK if self.memory.pop(_number(address), None) is not None else INVALID

    def _cuMemHostAlloc(self, out, size, flags):
        if not self._has_context():
            return NO_CONTEXT
        block = np.full(size, 0xFF, np.uint8)
        self.pinned[block.ctypes.data] = block
        out._obj.value = block.ctypes.data
        return OK

    def _cuMemFreeHost(self, address):
        return OK if self.pinned.pop(_number(address), None) is not None else INVALID

    def own_memory(self, size):
        """Memory that a library takes for itself."""
        block = np.zeros(size, np.uint8)
        self.memory[block.ctypes.data] = block
        return block

    def block(self, address, size):
        """The device bytes from `address` on; an error where they aren't all in one allocation."""
        for start, block in self.memory.items():
            if start <= address and address + size <= start + block.nbytes:
                return block[address - start : address - start + size]
        raise AssertionError(f"{size} bytes at {address:#x} are outside of what was allocated")

    # Streams

    def _cuStreamCreate(self, out, flags):
        if not self._has_context():
            return NO_CONTEXT
        assert flags == 1
        out._obj.value = self._handle()
        self._work[out._obj.value] = []
        return OK

    def _cuStreamDestroy_v2(self, stream):
        return OK if self._work.pop(_number(stream), None) is not None else INVALID

    def enqueue(self, stream, work):
        """Puts a function into a stream: run at the next wait, or recorded."""
        stream = _number(stream)
        target = self._recording[stream] if stream in self._recording else self._work[stream]
        target.append(work)

    def _cuStreamSynchronize(self, stream):
        if self._recording:
            return self._break()
        work, self._work[_number(stream)] = self._work[_number(stream)], []
        for one in work:
            status = one()
            if status:
                return status
        return OK

    def _cuMemsetD8Async(self, address, value, size, stream):
        self.enqueue(stream, lambda: self.block(address, size).fill(value))
        return OK

    def _cuMemcpyHtoDAsync_v2(self, address, host, size, stream):
        self.enqueue(stream, lambda: self._copy(self.block(address, size), host, size, True))
        return OK

    def _cuMemcpyDtoHAsync_v2(self, host, address, size, stream):
        self.enqueue(stream, lambda: self._copy(self.block(address, size), host, size, False))
        return OK

    @staticmethod
    def _copy(block, host, size, upload):
        there = np.frombuffer((ctypes.c_ubyte * size).from_address(host), np.uint8)
        if upload:
            block[...] = there
        else:
            there[...] = block

    # Graphs

    def _break(self):
        for stream in self._recording:
            self._recording[stream] = None
        return CAPTURE_UNSUPPORTED

    def _cuStreamBeginCapture_v2(self, stream, mode):
        self._recording[_number(stream)] = []
        return OK

    def _cuStreamEndCapture(self, stream, out):
        recorded = self._recording.pop(_number(stream))
        if recorded is None:
            out._obj.value = None
            return CAPTURE_BROKEN
        out._obj.value = self._handle()
        self._graphs[out._obj.value] = recorded
        return OK

    def _cuGraphInstantiateWithFlags(self, out, graph, flags):
        out._obj.value = self._handle()
        self._graphs[out._obj.value] = list(self._graphs[_number(graph)])
        return OK

    def _cuGraphLaunch(self, graph, stream):
        self.launches += 1
        for work in self._graphs[_number(graph)]:
            self.enqueue(stream, work)
        return OK

    def _cuGraphExecDestroy(self, graph):
        return OK if self._graphs.pop(_number(graph), None) is not None else INVALID

    def _cuGraphDestroy(self, graph):
        return self._cuGraphExecDestroy(graph)


@contextlib.contextmanager
def installed(monkeypatch, **how):
    """The fake in place of the machine's driver."""
    from crab_edge.engines import _cuda

    fake = FakeDriver(**how)
    monkeypatch.setattr(_cuda, "_load", lambda: fake)
    _cuda.driver.cache_clear()
    try:
        yield fake
    finally:
        _cuda.driver.cache_clear()
