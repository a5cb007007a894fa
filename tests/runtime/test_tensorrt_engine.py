"""The TensorRT engine on a fake of the library that computes: it must answer what ONNX Runtime answers."""

import sys

import numpy as np
import pytest

from crab_edge import engines
from crab_edge.bundle import default_bundle, sample_clip
from crab_edge.engines import _tensorrt_probe
from crab_edge.errors import BundleError, DependencyError, DeviceError, EngineError, InputError
from crab_edge.session import Model, load
from tests import fake_cuda, fake_tensorrt
from tests.tensorrt_bundle import CAPACITY, VERSION, add_engines

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return add_engines(tmp_path_factory.mktemp("engines") / "bundle")


@pytest.fixture
def driver(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The process of its own has its own tests.
    monkeypatch.setattr(_tensorrt_probe, "attempt", lambda *_: None)
    with fake_cuda.installed(monkeypatch) as fake:
        yield fake


@pytest.fixture
def library(monkeypatch, driver):
    return fake_tensorrt.installed(monkeypatch, driver, version=VERSION)


@pytest.fixture
def engine(bundle, library):
    return engines.create("tensorrt", bundle)


@pytest.fixture(scope="module")
def reference():
    return engines.create("onnxruntime", load(default_bundle()).bundle, threads=1)


def made_up(bundle, count):
    random = np.random.default_rng(0)
    ids = random.integers(0, bundle.manifest.model.vocab_size, count)
    positions = np.stack([np.arange(count), np.arange(count) // 2, np.arange(count) % 7])[:, None]
    return bundle.embedding.rows(ids)[None], positions.astype(np.int64)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=2e-3 * np.abs(expected).max())


def test_a_session_gives_the_answers_of_onnx_runtime(bundle, library):
    """Prompt, encoders, cache, rewinding and steps: a whole clip, two questions, on two engines."""
    asked = ["Can you hear a dog?", "Where is the sounding object?"]
    answers = []
    for model in (load(bundle, "tensorrt"), load(bundle, threads=1)):
        session = model.open(sample_clip())
        answers.append([session.ask(question, max_new_tokens=16).raw for question in asked])
        assert session.ask(asked[0], max_new_tokens=16).timings.cached_tokens > 100
    assert answers[0] == answers[1]
    assert any(profile == 1 for profile, _ in library.passes)


def test_steps_are_captured_once_and_replayed(bundle, engine, driver, reference):
    embeds, positions = made_up(bundle, 40)
    reference.rewind(0)
    engine.forward(embeds[:, :20], positions[..., :20])
    reference.forward(embeds[:, :20], positions[..., :20])
    for at in range(20, 40):
        step = engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
        close(step, reference.forward(embeds[:, at : at + 1], positions[..., at : at + 1]))
    # The first step runs as it is, the second is recorded, and from then on one launch is a step.
    assert driver.launches == 19
    assert driver.calls.count("cuStreamBeginCapture_v2") == 1
    assert engine.describe()["cuda_graph"] == "yes" and engine.length == 40


def test_a_recorded_step_does_not_outlive_its_context_s_shapes(bundle, engine, driver, reference):
    """A context whose shapes changed mayn't run what was recorded of it before (NVIDIA: undefined)."""
    embeds, positions = made_up(bundle, 8)
    reference.rewind(0)
    for begin, end, launches in ((0, 1, 0), (1, 2, 1), (2, 3, 2), (3, 5, 2), (5, 6, 2), (6, 7, 3), (7, 8, 4)):
        part = slice(begin, end)
        step = engine.forward(embeds[:, part], positions[..., part])
        close(step, reference.forward(embeds[:, part], positions[..., part]))
        assert driver.launches == launches
    assert driver.calls.count("cuStreamBeginCapture_v2") == 2
    assert driver.calls.count("cuGraphExecDestroy") == 1


def test_a_long_prompt_goes_through_the_largest_profile_in_parts(bundle, engine, library, reference):
    embeds, positions = made_up(bundle, 600)
    reference.rewind(0)
    close(engine.forward(embeds, positions), reference.forward(embeds, positions))
    passes = [shapes["inputs_embeds"][1] for _, shapes in library.passes]
    assert passes == [256, 256, 88] and {index for index, _ in library.passes} == {1}
    assert engine.length == 600


def test_the_tightest_profile_is_taken(bundle, engine, library):
    embeds, positions = made_up(bundle, 30)
    for begin, end in ((0, 9), (9, 17), (17, 18)):
        engine.forward(embeds[:, begin:end], positions[..., begin:end])
    assert [index for index, _ in library.passes] == [1, 0, 0]


def test_rewinding_forgets(bundle, engine):
    embeds, positions = made_up(bundle, 60)
    expected = engine.forward(embeds[:, :40], positions[..., :40]).copy()
    engine.forward(embeds[:, 40:], positions[..., 40:])
    engine.rewind(25)
    close(engine.forward(embeds[:, 25:40], positions[..., 25:40]), expected)
    with pytest.raises(EngineError, match="can't rewind to 41"):
        engine.rewind(41)


def test_a_full_cache_is_refused_before_the_pass(bundle, engine, library):
    embeds, positions = made_up(bundle, 20)
    engine.forward(np.tile(embeds, (1, 51, 1)), np.tile(positions, (1, 1, 51)))
    assert engine.capacity == CAPACITY and engine.length == 1020
    ran = len(library.passes)
    with pytest.raises(EngineError, match=r"1040 tokens are more than the 1024 .* can't grow"):
        engine.forward(embeds, positions)
    assert engine.length == 1020 and len(library.passes) == ran


def test_a_prompt_that_the_cache_cannot_hold_is_an_input_error(bundle, engine):
    engine.capacity = 200
    session = Model(bundle, engine).open(sample_clip())
    with pytest.raises(InputError, match="the cache of engine tensorrt holds 200"):
        session.ask("Can you hear a dog?")


def test_an_answer_ends_where_the_cache_does(bundle, engine):
    session = Model(bundle, engine).open(sample_clip())
    prompt = session.ask("Can you hear a dog?", max_new_tokens=1, grammar=False).timings.prompt_tokens
    engine.capacity = prompt + 3
    session.ask("Can you hear a dog?", max_new_tokens=50, grammar=False)
    assert engine.length <= engine.capacity


def test_encoders_go_through_their_profiles_in_parts(bundle, engine, library, reference):
    random = np.random.default_rng(0)
    pixels = random.random((5 * 256, 1176), np.float32)
    close(engine.vision(pixels), reference.vision(pixels))
    assert [shapes["pixel_values"][0] for _, shapes in library.passes] == [512, 512, 256]
    library.passes.clear()
    chunks, lengths = random.random((5, 80, 200), np.float32), np.array([200, 200, 200, 200, 60])
    close(engine.audio(chunks, lengths), reference.audio(chunks, lengths))
    assert [shapes["mel"][0] for _, shapes in library.passes] == [3, 2]
    with pytest.raises(EngineError, match="multiple of 256"):
        engine.vision(pixels[:100])


def test_encoders_close_before_the_decoder_opens(bundle, library, driver):
    embeds, positions = made_up(bundle, 10)
    engine = engines.create("tensorrt", bundle, low_memory=True)
    engine.warm()
    engine.vision(np.zeros((256, 1176), np.float32))
    assert set(engine._files) == {"audio", "vision"}
    engine.forward(embeds, positions)
    assert set(engine._files) == {"decoder"}
    engine.close()
    assert driver.used == 0 and engine.length == 0


def test_where_memory_is_short_encoders_close_by_themselves(bundle, library, driver):
    held = sum(
        bundle.manifest.files[graph.file].size for graph in bundle.manifest.engines["test"].graphs.values()
    )
    cache = 2 * 6 * 2 * CAPACITY * 64 * 4
    driver.gpus[0].memory = int((held + cache) * 1.1) + (70 << 20)
    assert not engines.create("tensorrt", bundle).low_memory
    driver.gpus[0].memory = int((held + cache) * 1.1)
    with pytest.raises(DeviceError, match=r"takes .* MB of device memory"):
        engines.create("tensorrt", bundle)


def test_a_graph_that_cannot_be_captured_still_runs_and_is_told(tmp_path, library, reference):
    bundle = add_engines(tmp_path / "bundle", misbehave={"decoder": {"unstreamable": True}})
    engine = engines.create("tensorrt", bundle)
    embeds, positions = made_up(bundle, 4)
    reference.rewind(0)
    for at in range(4):
        step = engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
        close(step, reference.forward(embeds[:, at : at + 1], positions[..., at : at + 1]))
    assert engine.describe()["cuda_graph"].startswith("no (")


def test_tensorrt_rtx_captures_by_itself_and_keeps_its_kernels(tmp_path, monkeypatch, driver):
    fake_tensorrt.installed(monkeypatch, driver, "tensorrt_rtx", "1.7.1")
    bundle = add_engines(
        tmp_path / "bundle", "rtx", library="tensorrt_rtx", version="1.7.1", sm=(86, 89, 120)
    )
    engine = engines.create("tensorrt:rtx", bundle)
    embeds, positions = made_up(bundle, 3)
    for at in range(3):
        engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
    decoder = engine._files["decoder"].result()
    assert driver.launches == 0
    strategy = fake_tensorrt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    assert all(context.how.cuda_graph_strategy is strategy for context in decoder._contexts)
    assert len({id(context.how.cache) for context in decoder._contexts}) == 1
    # Before anyone closes it: a command that ends doesn't.
    (kernels,) = (tmp_path / "cache" / "crab-edge" / "kernels").iterdir()
    assert kernels.read_bytes() == b"compiled"
    written = kernels.stat().st_mtime_ns
    engine.close()
    assert kernels.stat().st_mtime_ns == written
    described = engine.describe()
    assert described["provider"] == "tensorrt_rtx" and described["target"] == "rtx"


def test_a_value_of_the_wrong_shape_never_reaches_the_library(bundle, engine, library):
    with pytest.raises(EngineError, match=r"expected \[1, S, H\]"):
        engine.forward(np.zeros((1, 2, 256), np.float32), np.zeros((3, 1, 3), np.int64))
    with pytest.raises(EngineError, match=r"inputs_embeds has shape \[1, 2, 8\]"):
        engine.forward(np.zeros((1, 2, 8), np.float32), np.zeros((3, 1, 2), np.int64))
    assert library.passes == [] and engine.length == 0


def test_an_engine_without_its_package(bundle, monkeypatch):
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    real = engines.importlib.util.find_spec
    monkeypatch.setattr(
        engines.importlib.util, "find_spec", lambda name: None if "tensorrt" in name else real(name)
    )
    with pytest.raises(DependencyError, match=r"crab-edge\[tensorrt\].*crab-edge\[rtx\]"):
        engines.create("tensorrt", bundle)
    assert "tensorrt" not in engines.available() and "tensorrt" in engines.names()


def test_a_file_that_is_not_the_manifests_engine(tmp_path, library):
    wrong = [{"S": (1, 1, 4)}, {"S": (1, 128, 256)}]
    bundle = add_engines(tmp_path / "bundle", misbehave={"decoder": {"profiles": wrong}})
    with pytest.raises(
        BundleError, match=r"profile decode takes S \(1, 1, 4\).*expected \(1, 1, 8\).*crab-edge"
    ):
        engines.create("tensorrt", bundle).forward(*made_up(bundle, 3))


def test_an_input_that_the_library_reads_on_the_host(tmp_path, library, driver, reference):
    bundle = add_engines(tmp_path / "bundle", misbehave={"decoder": {"host": ["seqlens_k"]}})
    engine = engines.create("tensorrt", bundle)
    embeds, positions = made_up(bundle, 6)
    reference.rewind(0)
    for at in range(6):
        step = engine.forward(embeds[:, at : at + 1], positions[..., at : at + 1])
        close(step, reference.forward(embeds[:, at : at + 1], positions[..., at : at + 1]))
    assert driver.launches == 0 and "seqlens_k is read by the CPU" in engine.describe()["cuda_graph"]
