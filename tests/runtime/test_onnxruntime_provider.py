"""ONNX Runtime's providers as far as a CPU shows them: what is asked for runs, or an error says what is
missing.
"""

import types
from pathlib import Path

import numpy as np
import pytest

from crab_edge import engines
from crab_edge.bundle import Bundle, default_bundle
from crab_edge.engines import _cuda
from crab_edge.engines import _onnxruntime_provider as providers
from crab_edge.engines import onnxruntime as module
from crab_edge.errors import DependencyError, DeviceError, EngineError, InputError
from crab_edge.session import load
from tests import fake_cuda

pytest.importorskip("onnxruntime")
CUDA, RTX = providers.PROVIDERS["cuda"], providers.PROVIDERS["tensorrt-rtx"]


@pytest.fixture(scope="module")
def bundle():
    return Bundle.open(default_bundle())


def runtime(*available, version="1.24.0"):
    """The module `onnxruntime` as far as `check` looks at it."""
    return types.SimpleNamespace(
        __version__=version, get_available_providers=lambda: [*available, providers.CPU]
    )


class Session:
    """A session that put its nodes where a test says: provider -> kinds of nodes."""

    def __init__(self, active, nodes=None):
        self._active, self.fallback = active, True
        if nodes is not None:
            self.get_provider_graph_assignment_info = lambda: [
                types.SimpleNamespace(
                    ep_name=name,
                    get_nodes=lambda kinds=kinds: [types.SimpleNamespace(op_type=kind) for kind in kinds],
                )
                for name, kinds in nodes.items()
            ]

    def get_providers(self):
        return self._active

    def disable_fallback(self):
        self.fallback = False


def test_the_cpu_by_name_is_the_default(bundle):
    for engine in (
        engines.create("onnxruntime:cpu", bundle, threads=1),
        load(bundle, "onnxruntime", provider="cpu", threads=1).engine,
        engines.create("auto", bundle, threads=1),
    ):
        assert engine.describe()["provider"] == "CPUExecutionProvider"


def test_names_that_do_not_exist_or_differ(bundle):
    with pytest.raises(InputError, match="'rocm' is unknown; choose one of: cpu, cuda, tensorrt-rtx"):
        engines.create("onnxruntime:rocm", bundle)
    with pytest.raises(InputError, match="differ; give one"):
        load(bundle, "onnxruntime:cpu", provider="cuda")
    with pytest.raises(InputError, match="engine tensorrt has no option provider"):
        engines_tensorrt_with_provider(bundle)


def engines_tensorrt_with_provider(bundle):
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(engines, "_installed", lambda name: True)
        load(bundle, "tensorrt", provider="cuda")


def test_cuda_without_its_package(bundle, monkeypatch):
    monkeypatch.setattr(providers, "installed", lambda: {"onnxruntime": "1.32.0"})
    with pytest.raises(
        DependencyError, match=r"no CUDAExecutionProvider; run `pip uninstall.*crab-edge\[gpu\]"
    ):
        providers.check(CUDA, runtime())


def test_two_packages_that_overwrite_each_other(monkeypatch):
    monkeypatch.setattr(
        providers, "installed", lambda: {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    )
    with pytest.raises(DependencyError, match=r"onnxruntime 1.32.0 and onnxruntime-gpu 1.31.1 are both"):
        providers.check(CUDA, runtime(CUDA.package))


def test_cuda_without_a_gpu(monkeypatch):
    monkeypatch.setattr(providers, "installed", lambda: {"onnxruntime-gpu": "1.31.1"})
    with fake_cuda.installed(monkeypatch, gpus=[]), pytest.raises(DeviceError, match="finds no GPU"):
        providers.check(CUDA, runtime(CUDA.package))
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    monkeypatch.undo()
    monkeypatch.setattr(providers, "installed", lambda: {"onnxruntime-gpu": "1.31.1"})
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    _cuda.driver.cache_clear()
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        providers.check(CUDA, runtime(CUDA.package))


def test_cuda_libraries_are_preloaded_where_a_gpu_is(monkeypatch):
    monkeypatch.setattr(providers, "installed", lambda: {"onnxruntime-gpu": "1.31.1"})
    loaded = []
    here = runtime(CUDA.package)
    here.preload_dlls = lambda: loaded.append(True)
    with fake_cuda.installed(monkeypatch):
        providers.check(CUDA, here)
    assert loaded == [True]


def test_the_plugin_is_named(monkeypatch):
    monkeypatch.setattr(providers, "PLUGIN", "a_plugin_that_is_nowhere")
    monkeypatch.setattr(providers, "installed", lambda: {"onnxruntime": "1.32.0"})
    with pytest.raises(DependencyError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        providers.check(RTX, runtime())


@pytest.mark.parametrize(
    ("provider", "session", "error", "words"),
    [
        (
            CUDA,
            Session([providers.CPU], {}),
            DeviceError,
            r"asked for and CPUExecutionProvider runs: its CUDA",
        ),
        (CUDA, Session([CUDA.package, providers.CPU]), DependencyError, "can't be read"),
        (
            CUDA,
            Session(
                [CUDA.package, providers.CPU],
                {providers.CPU: ["GroupQueryAttention"] * 6 + ["Shape"], CUDA.package: ["MatMulNBits"]},
            ),
            EngineError,
            r"doesn't take 6 of its nodes.*6 GroupQueryAttention.*--kv float16",
        ),
        (
            RTX,
            Session([RTX.package, providers.CPU], {providers.CPU: ["MatMulNBits"]}),
            EngineError,
            r"1 MatMulNBits.*--target rtx.*--engine tensorrt",
        ),
    ],
)
def test_a_provider_that_does_not_run_is_an_error(provider, session, error, words):
    with pytest.raises(error, match=words):
        providers.assert_runs(provider, session, Path("decoder.onnx"))
    assert not session.fallback


def test_shapes_may_be_computed_on_the_cpu():
    nodes = {providers.CPU: ["Shape", "Gather"], CUDA.package: ["MatMulNBits", "GroupQueryAttention"]}
    providers.assert_runs(CUDA, Session([CUDA.package, providers.CPU], nodes), Path("decoder.onnx"))


def test_where_nodes_run_is_read_from_onnx_runtime(bundle):
    """On the real library: every node of a graph is counted, under the provider that took it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(
        str(bundle.graph("decoder")), options, providers=["CPUExecutionProvider"]
    )
    strays = providers._strays(session)
    assert strays["GroupQueryAttention"] == 6 and strays["MatMulNBits"] > 20
    assert not set(strays) & {"Reshape", "Concat", "Split"}


def test_a_cache_on_a_device(bundle, monkeypatch):
    """The way of all devices, with the CPU as one: the cache is ONNX Runtime's, and growing keeps its
    content.
    """

    class Elsewhere(providers.Provider):
        on_cpu = property(lambda self: False)

    monkeypatch.setitem(providers.PROVIDERS, "elsewhere", Elsewhere("elsewhere", providers.CPU, "cpu"))
    monkeypatch.setattr(providers, "check", lambda *_: None)
    monkeypatch.setattr(providers, "options_for", lambda *_: [providers.CPU])
    monkeypatch.setattr(providers, "assert_runs", lambda *_: None)
    monkeypatch.setattr(module, "FIRST_CAPACITY", 16)
    there = engines.create("onnxruntime:elsewhere", bundle, threads=1, low_memory=False)
    here = engines.create("onnxruntime", bundle, threads=1)
    random = np.random.default_rng(0)
    embeds = bundle.embedding.rows(random.integers(0, 2048, 40))[None]
    positions = np.broadcast_to(np.arange(40), (3, 1, 40)).copy()
    for begin, end in ((0, 10), (10, 11), (11, 12), (12, 30), (30, 31), (31, 40)):
        part = slice(begin, end)
        found = there.forward(embeds[:, part], positions[..., part]).copy()
        np.testing.assert_array_equal(found, here.forward(embeds[:, part], positions[..., part]))
    assert there._cache.capacity == 64 and there._cache._buffers == []
    with pytest.raises(InputError, match="routers are traced on the CPU"):
        there.tracer()


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("BFCArena: Failed to allocate memory for requested buffer of size 123", DeviceError),
        ("CUDA error 209: no kernel image is available for execution on the device", DeviceError),
        ("something else", EngineError),
    ],
)
def test_what_onnx_runtime_says_on_a_gpu(said, error):
    assert type(providers.refused(CUDA, "the decoder graph failed", said)) is error
    assert (
        type(providers.refused(providers.PROVIDERS["cpu"], "the decoder graph failed", said)) is EngineError
    )
