"""The graphs that engines are built from, in the runtime: prompt, cache, encoders and steps on a fake
TensorRT that runs the very ONNX files, in float16, give the packaged bundle's answers.
"""

import json
import shutil

import pytest

from crab_edge.bundle import Bundle, default_bundle, file_sha256, sample_clip
from crab_edge.engines import _tensorrt_probe
from crab_edge.manifest import MANIFEST_NAME, EngineInfo, Manifest
from crab_edge.session import load
from tests import fake_cuda, fake_tensorrt

pytest.importorskip("onnxruntime")
tensorrt_engines = pytest.importorskip("crab_edge_export.tensorrt_engines")

CAPACITY = 1024
VERSION = "1.7.1"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """The packaged bundle with an engine file for each graph as `export --target rtx` rewrites it."""
    from crab_edge_export.graph import GraphBuilder
    from crab_edge_export.tensorrt_graph import rewrite_audio, rewrite_decoder, rewrite_vision
    from crab_edge_export.tensorrt_products import Products
    from crab_edge_export.tensorrt_source import Source

    out = tmp_path_factory.mktemp("rewritten")
    folder = shutil.copytree(default_bundle(), out / "bundle")
    opened = Bundle.open(folder)
    content = json.loads((folder / MANIFEST_NAME).read_text())
    graphs = {}
    for name in ("decoder", "vision", "audio"):
        graph, source = GraphBuilder(name), Source(opened.graph(name))
        if name == "decoder":
            rewrite_decoder(source, graph, Products(), CAPACITY)
        else:
            {"vision": rewrite_vision, "audio": rewrite_audio}[name](source, graph, Products())
        graph.save(out / f"{name}.onnx")
        described = tensorrt_engines.describe(graph, name, f"{name}.engine", CAPACITY, "engines/rtx")
        graphs[name] = described
        file = folder / described.file
        bounds = [profile.axes for profile in described.profiles]
        fake_tensorrt.write_engine(file, out / f"{name}.onnx", bounds, version=VERSION, sm=[89])
        content["files"][described.file] = {"size": file.stat().st_size, "sha256": file_sha256(file)}
    info = EngineInfo(
        kind="rtx",
        library="tensorrt_rtx",
        version=VERSION,
        sm=[86, 89, 120],
        capacity=CAPACITY,
        graphs=graphs,
        built=True,
        build_command="crab-edge export --bundle BUNDLE --target rtx --out NEW_BUNDLE",
    )
    content["engines"] = {"rtx": info.model_dump(mode="json")}
    (folder / MANIFEST_NAME).write_text(Manifest.model_validate(content).to_text())
    return Bundle.open(folder)


def test_the_rewritten_graphs_answer_like_the_bundle(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_tensorrt_probe, "attempt", lambda *_: None)

    def answers(model):
        session = model.open(sample_clip())
        asked = ("Can you hear a dog?", "Where is the sounding object?")
        raw = [session.ask(question, max_new_tokens=12).raw for question in asked]
        return [*raw, session.ask(task="ave", max_new_tokens=40).raw]

    with fake_cuda.installed(monkeypatch) as driver:
        library = fake_tensorrt.installed(monkeypatch, driver, "tensorrt_rtx", VERSION)
        found = answers(load(bundle, "tensorrt:rtx"))
    assert found == answers(load(bundle, threads=1))
    assert {profile for profile, shapes in library.passes if "inputs_embeds" in shapes} == {0, 1}
