"""The driver's wrapper through real ctypes, on a small library in C with the driver's signatures."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from crab_edge.engines import _cuda
from crab_edge.errors import DeviceError, EngineError

SOURCE = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
typedef struct { unsigned char bytes[16]; } uuid;
typedef struct { void *to; const void *from; size_t size; } copy;
static copy recorded[64];
static int count = 0, capturing = 0, limit = 1 << 20;
static int move(void *to, const void *from, size_t size) {
    if (capturing) { recorded[count++] = (copy){to, from, size}; return 0; }
    memcpy(to, from, size);
    return 0;
}
int cuInit(unsigned flags) { return flags; }
int cuDriverGetVersion(int *out) { *out = 12040; return 0; }
int cuGetErrorName(int code, const char **out) {
    *out = code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : 0;
    return !*out;
}
int cuDeviceGetCount(int *out) { *out = 1; return 0; }
int cuDeviceGet(int *out, int index) { *out = 7 + index; return 0; }
int cuDeviceGetName(char *out, int size, int device) { strncpy(out, "Card in C", size); return device != 7; }
int cuDeviceGetUuid_v2(uuid *out, int device) { memset(out, 0xAB, sizeof *out); return device != 7; }
int cuDeviceGetAttribute(int *out, int name, int device) {
    *out = name == 75 ? 8 : name == 76 ? 7 : 1;
    return device != 7;
}
int cuDeviceTotalMem_v2(size_t *out, int device) { *out = 5ULL << 30; return device != 7; }
int cuDevicePrimaryCtxRetain(void **out, int device) { *out = (void *)0x7fff00000001; return device != 7; }
int cuDevicePrimaryCtxRelease_v2(int device) { return device != 7; }
int cuCtxSetCurrent(void *context) { return context && context != (void *)0x7fff00000001; }
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 3ULL << 30; *total = 5ULL << 30; return 0; }
int cuMemAlloc_v2(ptr *out, size_t size) {
    if (size > (size_t)limit) return 2;
    *out = (ptr)malloc(size);
    return 0;
}
int cuMemFree_v2(ptr address) { free((void *)address); return 0; }
int cuMemHostAlloc(void **out, size_t size, unsigned flags) { *out = malloc(size); return flags; }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuMemsetD8Async(ptr to, unsigned char value, size_t size, void *stream) {
    memset((void *)to, value, size);
    return stream != (void *)0x7fff00000002;
}
int cuMemcpyHtoDAsync_v2(ptr to, const void *from, size_t size, void *stream) {
    return stream != (void *)0x7fff00000002 || move((void *)to, from, size);
}
int cuMemcpyDtoHAsync_v2(void *to, ptr from, size_t size, void *stream) {
    return stream != (void *)0x7fff00000002 || move(to, (void *)from, size);
}
int cuStreamCreate(void **out, unsigned flags) { *out = (void *)0x7fff00000002; return flags != 1; }
int cuStreamDestroy_v2(void *stream) { return stream != (void *)0x7fff00000002; }
int cuStreamSynchronize(void *stream) { return stream != (void *)0x7fff00000002; }
int cuStreamBeginCapture_v2(void *stream, int mode) { capturing = 1; count = 0; return mode != 1; }
int cuStreamEndCapture(void *stream, void **out) { capturing = 0; *out = recorded; return 0; }
int cuGraphInstantiateWithFlags(void **out, void *graph, unsigned long long flags) {
    *out = (void *)0x7fff00000003;
    return graph != recorded || flags;
}
int cuGraphLaunch(void *graph, void *stream) {
    if (graph != (void *)0x7fff00000003) return 1;
    for (int i = 0; i < count; i++) memcpy(recorded[i].to, recorded[i].from, recorded[i].size);
    return 0;
}
int cuGraphExecDestroy(void *graph) { return graph != (void *)0x7fff00000003; }
int cuGraphDestroy(void *graph) { return graph != recorded; }
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler on this machine")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(SOURCE)
    out = folder / "libcuda-test.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", out, folder / "driver.c"], check=True)
    return out


@pytest.fixture
def device(library, monkeypatch):
    monkeypatch.setattr(_cuda, "LIBRARY", str(library))
    _cuda.driver.cache_clear()
    device = _cuda.Device()
    yield device
    device.close()
    _cuda.driver.cache_clear()


def test_what_the_driver_says_of_its_gpu(device):
    driver = _cuda.driver()
    assert driver.version() == (12, 4)
    (gpu,) = driver.gpus()
    assert (gpu.name, gpu.sm, gpu.capability, gpu.memory, gpu.integrated) == (
        "Card in C",
        87,
        "8.7",
        5 << 30,
        True,
    )
    assert gpu.uuid == "GPU-abababab-abab-abab-abab-abababababab"
    assert device.memory() == (3 << 30, 5 << 30)


def test_memory_and_copies(device):
    values = np.arange(1000, dtype=np.float32)
    memory = device.allocate(values.nbytes)
    device.zero(memory)
    back = device.pinned((1000,), np.float32)
    device.download(memory.address, back)
    device.synchronize()
    assert not back.any()
    device.upload(values, memory.address)
    device.download(memory.address, back)
    device.synchronize()
    np.testing.assert_array_equal(back, values)
    memory.free()
    memory.free()
    with pytest.raises(DeviceError, match="out of device memory"):
        device.allocate(2 << 20)


def test_a_graph_is_recorded_and_launched(device):
    source, target = device.pinned((8,), np.float32), device.pinned((8,), np.float32)
    memory = device.allocate(source.nbytes)
    target[:] = 0
    with device.capture() as graph:
        device.upload(source, memory.address)
        device.download(memory.address, target)
    assert not target.any()
    for number in (1.0, 2.0):
        source[:] = number
        graph.launch()
        device.synchronize()
        assert (target == number).all()
    graph.free()
    with pytest.raises(ValueError, match="in the block"), device.capture():
        raise ValueError("in the block")


def test_a_call_that_fails_names_itself(device):
    with pytest.raises(EngineError, match="refused cuDeviceGetName: error 1"):
        _cuda.driver().call("cuDeviceGetName", ctypes.create_string_buffer(9), 9, 3)
