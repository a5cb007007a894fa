"""Engines that can't run here: each is refused with its reason and the way out, and no process is lost."""

import sys
from pathlib import Path

import pytest

from crab_edge import engines
from crab_edge.engines import _cuda, _tensorrt_probe
from crab_edge.engines import _tensorrt_check as checks
from crab_edge.errors import BundleError, DependencyError, DeviceError, EngineError, InputError
from crab_edge.session import load
from tests import fake_cuda, fake_tensorrt
from tests.tensorrt_bundle import BUILD, VERSION, add_engines

pytest.importorskip("onnxruntime")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return add_engines(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def driver(monkeypatch):
    with fake_cuda.installed(monkeypatch) as fake:
        yield fake


@pytest.fixture
def untried(monkeypatch):
    monkeypatch.setattr(_tensorrt_probe, "attempt", lambda *_: None)


def gpu(index=0, sm=89, name="RTX 4090"):
    return _cuda.Gpu(index, name, sm, 24 << 30, f"GPU-{index}", False)


def machine(gpus=None, driver=(13, 0), libraries=None):
    gpus = [gpu()] if gpus is None else gpus
    return checks.Machine(gpus, driver, {"tensorrt": VERSION} if libraries is None else libraries)


def changed(bundle, target="test", **changes):
    """The bundle with other fields in its engine's entry."""
    info = bundle.manifest.engines["test"].model_copy(update=changes)
    manifest = bundle.manifest.model_copy(update={"engines": {target: info}})
    return type(bundle)(bundle.path, manifest)


def test_an_engine_that_fits_is_chosen(bundle):
    assert checks.choose(bundle, None, machine())[0] == "test"
    assert checks.choose(bundle, "test", machine())[0] == "test"


@pytest.mark.parametrize(
    ("changes", "here", "error", "words"),
    [
        ({"version": "10.15.1"}, machine(), BundleError, ["10.15.1", VERSION, BUILD]),
        (
            {"library": "tensorrt_rtx", "kind": "rtx", "version": "1.6.0"},
            machine(libraries={"tensorrt_rtx": "1.7.1"}),
            BundleError,
            ["tensorrt_rtx 1.6.0", "1.7.1", BUILD],
        ),
        ({}, machine(libraries={}), DependencyError, ["tensorrt 10.16.2", "JetPack", "crab-edge[tensorrt]"]),
        (
            {},
            checks.Machine(
                [gpu()], (13, 0), {}, {"tensorrt": "libnvinfer.so.10: cannot open shared object file"}
            ),
            DependencyError,
            ["can't be imported", "libnvinfer.so.10", "crab-edge[tensorrt]"],
        ),
        (
            {"library": "tensorrt_rtx", "kind": "rtx"},
            machine(),
            DependencyError,
            ["tensorrt_rtx", "crab-edge[rtx]"],
        ),
        (
            {"sm": [87]},
            machine([gpu(sm=90, name="H100")]),
            BundleError,
            ["8.7", "H100", "9.0", "--target cuda-sm90"],
        ),
        (
            {"sm": [86]},
            machine([gpu(0, 89, "RTX 4090"), gpu(1, 86, "RTX 3090")]),
            DeviceError,
            ["GPU 0, RTX 4090, has 8.9", "GPU 1, RTX 3090, has 8.6", "CUDA_VISIBLE_DEVICES=GPU-1"],
        ),
        ({}, machine([]), DeviceError, ["needs a GPU", "nvidia-smi"]),
        ({"built": False}, machine(), InputError, ["isn't built yet", BUILD, "on the device"]),
        (
            {"plugins": {"crab::ILoRARoute": "0" * 64}, "library": "tensorrt_rtx", "version": "1.7.1"},
            machine(libraries={"tensorrt_rtx": "1.7.1"}),
            BundleError,
            ["crab::ILoRARoute", "tensorrt_rtx can't run"],
        ),
        (
            {"plugins": {"crab::ILoRARoute": "0" * 64}, "version": "10.3.0"},
            machine(libraries={"tensorrt": "10.3.0"}),
            BundleError,
            ["crab::ILoRARoute", "10.9", "10.3.0", "JetPack"],
        ),
        (
            {"plugins": {"crab::ILoRARoute": "0" * 64}},
            machine(driver=(12, 2)),
            DeviceError,
            ["crab::ILoRARoute", "CUDA 12.5", "supports 12.2"],
        ),
        (
            {"plugins": {f"kernel {i}": "0" * 64 for i in range(5)}, "sm": [110]},
            machine([gpu(sm=110, name="Thor")], driver=(12, 9)),
            DeviceError,
            ["kernel 0, kernel 1 and 3 more", "CUDA 13.0", "supports 12.9"],
        ),
    ],
)
def test_the_manifest_says_why_not(bundle, changes, here, error, words):
    with pytest.raises(error) as raised:
        checks.choose(changed(bundle, **changes), None, here)
    for word in words:
        assert word in str(raised.value)


def test_of_several_engines_the_one_for_this_card_speaks(bundle):
    infos = {
        "rtx": bundle.manifest.engines["test"].model_copy(update={"sm": [86]}),
        "own": bundle.manifest.engines["test"].model_copy(update={"built": False}),
    }
    both = type(bundle)(bundle.path, bundle.manifest.model_copy(update={"engines": infos}))
    with pytest.raises(InputError, match="target own: its engine isn't built"):
        checks.choose(both, None, machine())


def test_a_bundle_without_engines_and_an_unknown_target(bundle, driver, monkeypatch):
    fake_tensorrt.installed(monkeypatch, driver)
    with pytest.raises(
        InputError, match=r"no TensorRT engine; make one with `crab-edge export .*--target rtx"
    ):
        load(engine="tensorrt")
    with pytest.raises(InputError, match="no engine for target 'jetson'; the bundle has test"):
        engines.create("tensorrt:jetson", bundle)


def test_no_driver(bundle, monkeypatch):
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    _cuda.driver.cache_clear()
    fake_tensorrt.installed(monkeypatch, None)
    with pytest.raises(DeviceError, match="no NVIDIA driver on this machine"):
        engines.create("tensorrt", bundle)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"gpus": []}, "finds no GPU"),
        ({"missing": {"cuGraphInstantiateWithFlags"}}, "too old: it has no cuGraphInstantiateWithFlags"),
    ],
)
def test_a_driver_that_is_of_no_use(monkeypatch, how, words):
    with fake_cuda.installed(monkeypatch, **how), pytest.raises(DeviceError, match=words):
        _cuda.driver()


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (2, DeviceError, "out of device memory"),
        (222, DeviceError, "too old for the PTX"),
        (803, DeviceError, "kernel module are of different versions"),
        (1, EngineError, r"refused cuMemAlloc_v2: CUDA_ERROR_INVALID_VALUE; run `crab-edge doctor`"),
    ],
)
def test_what_the_driver_refuses(driver, code, error, words):
    device = _cuda.Device()
    driver.fail["cuMemAlloc_v2"] = code
    with pytest.raises(error, match=words):
        device.allocate(16)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        (
            (
                "The engine plan file is not compatible with this version of TensorRT, expecting library "
                "version 10.16"
            ),
            BundleError,
            "another release",
        ),
        (
            "generated on an incompatible device, expecting compute 8.9 got compute 8.6",
            BundleError,
            "another GPU",
        ),
        (
            "Plugin not found, are the plugin name, version, and namespace correct?",
            BundleError,
            "plugin that isn't in it",
        ),
        (
            "Cuda Runtime (the provided PTX was compiled with an unsupported toolchain.)",
            DeviceError,
            "driver is too old",
        ),
        ("Error Code 2: OutOfMemory (Requested size was 4294967296 bytes.)", DeviceError, "device memory"),
        (
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.",
            BundleError,
            "can't be read",
        ),
        ("something nobody has seen", EngineError, "crab-edge doctor"),
        ("", EngineError, "gave no reason"),
    ],
)
def test_what_the_library_says_becomes_a_typed_error(said, error, words):
    found = checks.explain("decoder.engine", said, BUILD)
    assert type(found) is error and words in str(found)
    assert "\n" not in str(found)


@pytest.mark.parametrize(
    ("misbehave", "error", "words"),
    [
        ({"version": "10.99.0"}, BundleError, "another release"),
        ({"sm": [75]}, BundleError, "another GPU"),
        ({"says": "Plugin not found: crab::ILoRARoute"}, BundleError, "plugin that isn't in it"),
        ({"profiles": [{"S": (1, 1, 8)}]}, BundleError, "1 profiles, expected 2"),
        ({"sizes": {"Smax": 512}}, BundleError, "past.0.key"),
    ],
)
def test_files_that_are_not_what_the_manifest_says(
    tmp_path, driver, untried, monkeypatch, misbehave, error, words
):
    fake_tensorrt.installed(monkeypatch, driver)
    bundle = add_engines(tmp_path / "bundle", misbehave={"decoder": misbehave})
    engine = engines.create("tensorrt", bundle)
    with pytest.raises(error, match=words) as raised:
        engine._file("decoder")
    assert BUILD in str(raised.value)


def test_too_little_device_memory_is_said_before_a_file_is_opened(bundle, driver, untried, monkeypatch):
    fake_tensorrt.installed(monkeypatch, driver)
    driver.gpus[0].memory = 60 << 20
    with pytest.raises(DeviceError, match=r"takes \d+ MB of device memory .* but 60 MB are free"):
        engines.create("tensorrt", bundle)


class Tried:
    """Runs the child over the fakes, and counts how often."""

    def __init__(self, monkeypatch):
        self.count = 0
        monkeypatch.setattr(_tensorrt_probe, "command", self)
        monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}:{':'.join(sys.path)}")

    def __call__(self, folder, target):
        self.count += 1
        return [sys.executable, str(REPOSITORY / "tests/runtime/tensorrt_child.py"), str(folder), target]


def test_files_are_tried_once_in_a_process_of_their_own(tmp_path, driver, monkeypatch):
    fake_tensorrt.installed(monkeypatch, driver)
    tried = Tried(monkeypatch)
    bundle = add_engines(tmp_path / "bundle")
    for _ in range(2):
        engines.create("tensorrt", bundle)
    assert tried.count == 1
    # Another driver, and it is a new question.
    driver.version = 13010
    engines.create("tensorrt", bundle)
    assert tried.count == 2


def test_a_file_that_ends_the_process(tmp_path, driver, monkeypatch):
    fake_tensorrt.installed(monkeypatch, driver)
    Tried(monkeypatch)
    bundle = add_engines(tmp_path / "bundle", misbehave={"vision": {"abort": True}})
    with pytest.raises(
        EngineError, match=r"opening the vision engine ended its process \(SIGABRT\); build it again"
    ):
        engines.create("tensorrt", bundle)


def test_an_error_of_the_child_keeps_its_type(tmp_path, driver, monkeypatch):
    fake_tensorrt.installed(monkeypatch, driver)
    Tried(monkeypatch)
    bundle = add_engines(tmp_path / "bundle", misbehave={"audio": {"says": "OutOfMemory"}})
    with pytest.raises(DeviceError, match="out of device memory"):
        engines.create("tensorrt", bundle)


def test_a_file_that_hangs(bundle, monkeypatch):
    monkeypatch.setattr(_tensorrt_probe, "LIMIT_S", 0.5)
    waiting = 'import time; print(\'{"stage": "opening the decoder engine"}\', flush=True); time.sleep(60)'
    monkeypatch.setattr(_tensorrt_probe, "command", lambda *_: [sys.executable, "-c", waiting])
    with pytest.raises(EngineError, match=r"opening the decoder engine took more than 0\.5 s"):
        _tensorrt_probe.attempt(bundle.path, "test", BUILD)


@pytest.mark.parametrize("name", ["tensorrt:", "onnxruntime:tpu", "auto:cuda", "magic:rtx"])
def test_variants_that_do_not_exist(bundle, name):
    with pytest.raises(InputError):
        engines.create(name, bundle)


def test_versions_are_compared_by_release():
    assert checks.same_release("10.16.2", "10.16.2.10") and checks.same_release("1.7.1.116", "1.7.1")
    assert not checks.same_release("10.16.2.10", "10.16.2.11")
    assert not checks.same_release("1.7.1", "1.7.0") and not checks.same_release("10.16", "10.16.2")


class TestRealLibrary:
    """TensorRT-RTX itself, which reads heads of engine files and refuses without a GPU too."""

    @pytest.fixture(scope="class")
    def library(self):
        return pytest.importorskip("tensorrt_rtx")

    def test_it_has_what_the_runtime_calls(self, library):
        """The fake's API is the real one's."""
        for mine, real in (
            (fake_tensorrt.Runtime, library.Runtime),
            (fake_tensorrt.CudaEngine, library.ICudaEngine),
            (fake_tensorrt.Context, library.IExecutionContext),
            (fake_tensorrt.RuntimeConfig, library.IRuntimeConfig),
            (fake_tensorrt.RuntimeCache, library.IRuntimeCache),
        ):
            names = [name for name in vars(mine) if not name.startswith("_")]
            assert names and not [name for name in names if not hasattr(real, name)]
        for name in ("num_io_tensors", "num_optimization_profiles"):
            assert hasattr(library.ICudaEngine, name)
        assert hasattr(library.IRuntimeConfig, "cuda_graph_strategy")
        for mine in (
            fake_tensorrt.DataType,
            fake_tensorrt.TensorIOMode,
            fake_tensorrt.TensorLocation,
            fake_tensorrt.CudaGraphStrategy,
            fake_tensorrt.ExecutionContextAllocationStrategy,
        ):
            assert set(mine.__members__) <= set(getattr(library, mine.__name__).__members__)

    def test_a_file_that_is_no_engine(self, library, tmp_path, driver, bundle):
        from crab_edge.engines._tensorrt_graph import EngineFile, Scratch

        path = tmp_path / "rtx" / "decoder.engine"
        path.parent.mkdir()
        path.write_bytes(b"no engine" * 100)
        device = _cuda.Device()
        spec = bundle.manifest.engines["test"].graphs["decoder"]
        with pytest.raises((BundleError, DeviceError), match=r"decoder\.engine: tensorrt_rtx can't open"):
            EngineFile(library, device, Scratch(device), path, spec, build_command=BUILD)
