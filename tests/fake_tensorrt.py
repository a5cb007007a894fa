"""A TensorRT in Python over `tests.fake_cuda`: an engine file names an ONNX graph, and a pass runs that
graph in ONNX Runtime on the very bytes that the tensors' addresses point to. So what a session on it answers
is right, or an address, shape, profile or copy was wrong.
"""

from __future__ import annotations

import enum
import importlib.machinery
import json
import os
import sys
import types

import numpy as np

MAGIC = b"FAKE ENGINE "
SCRATCH = 1 << 16


class DataType(enum.Enum):
    FLOAT, HALF, INT32, INT64 = 0, 1, 2, 3


class TensorLocation(enum.Enum):
    DEVICE, HOST = 0, 1


class TensorIOMode(enum.Enum):
    INPUT, OUTPUT = 0, 1


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC, USER_MANAGED = 0, 1


class CudaGraphStrategy(enum.Enum):
    DISABLED, WHOLE_GRAPH_CAPTURE = 0, 1


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO = 0, 1, 2, 3


class ILogger:
    Severity = Severity


KINDS = {
    "tensor(float)": (DataType.FLOAT, np.float32),
    "tensor(float16)": (DataType.HALF, np.float16),
    "tensor(int32)": (DataType.INT32, np.int32),
    "tensor(int64)": (DataType.INT64, np.int64),
}


def write_engine(path, onnx, profiles, *, version, sm, **how):
    """An engine file: the graph it runs, its profiles ({axis: (min, opt, max)} each), and how it misbehaves.

    padded: the audio graph's rows come back [C, 50, H], with how many count; plugin: a name that no creator
    has; abort: ends the process; unstreamable: can't be captured into a graph; sizes: of axes that are no
    profile's; host: inputs that are read on the host.
    """
    header = {"onnx": str(onnx), "profiles": profiles, "version": version, "sm": list(sm), **how}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(MAGIC + json.dumps(header).encode())


def make(name, driver, version):
    """The module `name`, of this version, on the fake driver."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__version__ = version
    module.ILogger = ILogger
    module.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    module.Runtime = lambda logger: Runtime(module, driver, logger)
    module.passes = []
    if name == "tensorrt_rtx":
        module.CudaGraphStrategy = CudaGraphStrategy
    return module


def installed(monkeypatch, driver, name="tensorrt", version="10.16.2"):
    """Puts the module where `import` finds it."""
    module = make(name, driver, version)
    monkeypatch.setitem(sys.modules, name, module)
    return module


class Runtime:
    def __init__(self, module, driver, logger):
        self.module, self.driver, self.logger = module, driver, logger

    def _error(self, text):
        self.logger.log(Severity.ERROR, text)

    def deserialize_cuda_engine(self, data):
        data = bytes(data)
        if not data.startswith(MAGIC):
            self._error(
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (magicTag assertion failed.)"
            )
            return None
        header = json.loads(data[len(MAGIC) :])
        if header.get("abort"):
            os.abort()
        if header["version"] != self.module.__version__:
            self._error(
                "The engine plan file is not compatible with this version of TensorRT, expecting library "
                "version "
                f"{self.module.__version__} got {header['version']}, please rebuild."
            )
            return None
        if self.driver.gpus[0].sm not in header["sm"]:
            self._error("The engine plan file is generated on an incompatible device, please rebuild.")
            return None
        if header.get("says"):
            self._error(header["says"])
            return None
        return CudaEngine(self, header)


class CudaEngine:
    def __init__(self, runtime, header):
        import onnxruntime

        self.runtime, self.header = runtime, header
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            header["onnx"], options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {one.name: one for one in self.session.get_inputs()}
        self.outputs = {one.name: one for one in self.session.get_outputs()}
        if header.get("padded"):
            self.outputs["tokens"] = types.SimpleNamespace(type="tensor(int64)", shape=["chunks"])
        self.names = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(header["profiles"])

    def get_tensor_name(self, index):
        return self.names[index]

    def _tensor(self, name):
        return self.inputs.get(name) or self.outputs[name]

    def get_tensor_mode(self, name):
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name):
        return TensorLocation.HOST if name in self.header.get("host", ()) else TensorLocation.DEVICE

    def get_tensor_dtype(self, name):
        return KINDS[self._tensor(name).type][0]

    def get_tensor_shape(self, name):
        sizes = self.header.get("sizes", {})
        shape = [sizes.get(axis, axis) for axis in self._tensor(name).shape]
        if self.header.get("padded") and name == "embeddings":
            shape = [-1, 50, shape[-1]]
        return tuple(axis if isinstance(axis, int) else -1 for axis in shape)

    def get_tensor_profile_shape(self, name, index):
        profile, sizes = self.header["profiles"][index], self.header.get("sizes", {})

        def at(place):
            return tuple(
                axis if isinstance(axis, int) else sizes.get(axis) or profile[axis][place]
                for axis in self.inputs[name].shape
            )

        return [at(0), at(1), at(2)]

    def get_device_memory_size_for_profile_v2(self, index):
        return SCRATCH * (index + 1)

    def create_runtime_config(self):
        assert self.runtime.module.__name__ == "tensorrt_rtx"
        return RuntimeConfig()

    def create_execution_context(self, how=ExecutionContextAllocationStrategy.STATIC):
        if how is ExecutionContextAllocationStrategy.STATIC:
            context = Context(self, how)
            context.profile, context.shapes = 0, {name: one.shape for name, one in self.inputs.items()}
            memory = self.runtime.driver.own_memory(SCRATCH)
            context.scratch = (memory.ctypes.data, SCRATCH)
            return context
        if isinstance(how, RuntimeConfig):
            assert how.strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        else:
            assert how is ExecutionContextAllocationStrategy.USER_MANAGED
        return Context(self, how)


class RuntimeConfig:
    def __init__(self):
        self.strategy, self.cache, self.cuda_graph_strategy = None, None, CudaGraphStrategy.DISABLED

    def set_execution_context_allocation_strategy(self, strategy):
        self.strategy = strategy

    def create_runtime_cache(self):
        return RuntimeCache()

    def set_runtime_cache(self, cache):
        self.cache = cache
        return True


class RuntimeCache:
    def __init__(self):
        self.content = b"compiled"

    def serialize(self):
        return self.content

    def deserialize(self, content):
        self.content = bytes(content)


class Context:
    def __init__(self, engine, how):
        self.engine, self.how = engine, how
        self.driver, self.logger = engine.runtime.driver, engine.runtime.logger
        self.profile = None
        self.shapes, self.addresses = {}, {}
        self.scratch = None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_device_memory(self, address, size):
        self.scratch = (address, size)

    def set_tensor_address(self, name, address):
        if name not in self.engine.names:
            return False
        if name not in self.engine.header.get("host", ()):
            assert address % 256 == 0
        self.addresses[name] = address
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self.engine.get_tensor_profile_shape(name, self.profile)
        if len(shape) != len(low) or any(not a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.logger.log(
                Severity.ERROR, f"IExecutionContext::setInputShape: {name} {shape} not in {low}..{high}"
            )
            return False
        self.shapes[name] = tuple(shape)
        return True

    def _axes(self):
        axes = dict(self.engine.header.get("sizes", {}))
        for name, shape in self.shapes.items():
            axes.update(
                {axis: size for axis, size in zip(self.engine.inputs[name].shape, shape, strict=True)}
            )
        return axes

    def get_tensor_shape(self, name):
        if name in self.shapes:
            return self.shapes[name]
        axes = self._axes()
        if name == "embeddings" and "pixel_values" in self.shapes:
            return (self.shapes["pixel_values"][0] // 4, self.engine.outputs[name].shape[1])
        if name == "embeddings" and self.engine.header.get("padded"):
            return (self.shapes["mel"][0], 50, self.engine.outputs[name].shape[1])
        shape = [axes.get(axis, axis) for axis in self.engine.outputs[name].shape]
        return tuple(axis if isinstance(axis, int) else -1 for axis in shape)

    def execute_async_v3(self, stream):
        header = self.engine.header
        if set(self.shapes) != set(self.engine.inputs) or set(self.addresses) != set(self.engine.names):
            self.logger.log(Severity.ERROR, "not all tensors have a shape and an address")
            return False
        needed = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert self.scratch is not None and self.scratch[1] >= needed
        self.driver.block(*self.scratch)
        if header.get("unstreamable") and self.driver._recording:
            self.driver._break()
            self.logger.log(Severity.ERROR, "operation not permitted when stream is capturing")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        shapes |= {name: self.get_tensor_shape(name) for name in self.engine.outputs}
        # What lies on the host is read now, the rest when the stream comes to it.
        host = {}
        for name in header.get("host", ()):
            size = int(np.prod(shapes[name])) * np.dtype(KINDS[self.engine._tensor(name).type][1]).itemsize
            host[name] = bytes(self.driver.pinned[addresses[name]][:size])
        self.driver.enqueue(stream, lambda: self._pass(shapes, addresses, host))
        return True

    def _pass(self, shapes, addresses, host):
        """The graph on device memory, in place: an output and an input at one address are one tensor."""
        import onnxruntime

        def tensor(name):
            kind = np.dtype(KINDS[self.engine._tensor(name).type][1])
            if name in host:
                return np.frombuffer(host[name], kind).reshape(shapes[name])
            size = int(np.prod(shapes[name])) * kind.itemsize
            return self.driver.block(addresses[name], size).view(kind).reshape(shapes[name])

        engine, values = self.engine, {}
        engine.runtime.module.passes.append((self.profile, dict(shapes)))
        binding = engine.session.io_binding()
        for name in engine.names:
            if engine.header.get("padded") and name in engine.outputs:
                if name == "embeddings":
                    binding.bind_output(name)
                continue
            if addresses[name] not in values:
                values[addresses[name]] = onnxruntime.OrtValue.ortvalue_from_numpy(tensor(name))
            bind = binding.bind_ortvalue_input if name in engine.inputs else binding.bind_ortvalue_output
            bind(name, values[addresses[name]])
        engine.session.run_with_iobinding(binding)
        if engine.header.get("padded"):
            rows = binding.get_outputs()[0].numpy()
            self._pad(rows, tensor("lengths"), tensor("embeddings"), tensor("tokens"))

    @staticmethod
    def _pad(rows, lengths, out, tokens):
        from crab_edge.features import audio_token_count

        begin = 0
        tokens[:] = [audio_token_count(int(length)) for length in lengths]
        for chunk, count in zip(out, tokens, strict=True):
            chunk[:count] = rows[begin : begin + count]
            begin += count
        assert begin == len(rows)
