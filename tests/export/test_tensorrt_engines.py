"""`crab-edge export --target`: engines built here without a GPU, and packages for other machines."""

import json
import re
import shutil

import numpy as np
import onnx
import pytest
from crab_edge_apps.cli import run
from crab_edge_export import tensorrt_engines
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.tensorrt_engines import EngineOptions, add_engines, check_targets
from crab_edge_export.tensorrt_graph import rewrite_decoder
from crab_edge_export.tensorrt_products import Products
from crab_edge_export.tensorrt_source import Source
from crab_edge_export.tensorrt_weights import pack_int4

from crab_edge.bundle import Bundle, default_bundle
from crab_edge.errors import EngineError, InputError
from crab_edge.shape import KNOWN
from crab_edge.sizes import recipe_for
from tests.export.tensorrt import HalfDecoder


def int4_blobs(path):
    """Codes of every 4-bit weight of a file as TensorRT-RTX stores them: N before K, two in a byte."""
    for tensor in onnx.load(str(path)).graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT4:
            codes = onnx.numpy_helper.to_array(tensor).astype(np.int8)
            yield tensor.name, pack_int4(np.ascontiguousarray(codes.T)).tobytes()


@pytest.fixture(scope="module")
def nano(tmp_path_factory):
    """The packaged bundle with engines for three generations of GPUs, by the command line."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("engines") / "nano"
    command = ["export", "--bundle", str(default_bundle()), "--target", "rtx", "--capacity", "1024"]
    assert run([*command, "--out", str(out)]) == 0
    return Bundle.open(out, full=True)


def test_engines_of_the_packaged_bundle_build_without_a_gpu(nano):
    """One file for sm_86, 89 and 120; what is beside it is the bundle's, byte for byte."""
    engine = nano.manifest.engines["rtx"]
    assert engine.built and engine.kind == "rtx" and engine.library == "tensorrt_rtx"
    assert engine.sm == [86, 89, 120] and engine.capacity == 1024 and not engine.plugins
    assert {graph.file for graph in engine.graphs.values()} == {
        f"engines/rtx/{name}.engine" for name in ("decoder", "vision", "audio")
    }
    plain = Bundle.open(default_bundle()).manifest
    assert plain.files.items() <= nano.manifest.files.items()
    assert len(nano.manifest.files) == len(plain.files) + 3
    assert not plain.engines and plain.recipe == nano.manifest.recipe
    assert list(nano.path.parent.iterdir()) == [nano.path]


def test_the_manifest_says_what_a_runtime_binds(nano):
    model, decoder = nano.manifest.model, nano.manifest.engines["rtx"].graphs["decoder"]
    inputs = {one.name: one for one in decoder.inputs}
    assert inputs["seqlens_k"].dtype == "int32" and inputs["inputs_embeds"].dtype == "float32"
    assert inputs["past.0.key"].shape == [1, model.kv_heads, 1024, model.head_dim]
    assert inputs["past.0.key"].dtype == "float16"
    assert len(decoder.aliases) == 2 * model.layers
    assert decoder.aliases["present.5.value"] == "past.5.value"
    assert [one.name for one in decoder.profiles] == ["prefill", "decode"]
    assert decoder.profiles[0].axes["S"][2] == 512 and decoder.profiles[1].axes["S"] == (1, 1, 8)
    assert {one.name for one in nano.manifest.engines["rtx"].graphs["audio"].outputs} == {
        "embeddings",
        "tokens",
    }


def test_low_bit_weights_stay_low_bit_in_the_engine(nano, tmp_path):
    """Every low-bit weight's own bytes are in the engine file, so none was made wider."""
    graph = GraphBuilder("decoder")
    rewrite_decoder(Source(default_bundle() / "decoder.onnx"), graph, Products(), 1024)
    graph.save(tmp_path / "decoder.onnx")
    engine = (nano.path / "engines/rtx/decoder.engine").read_bytes()
    blobs = dict(int4_blobs(tmp_path / "decoder.onnx"))
    assert len(blobs) == 7 * nano.manifest.model.layers
    assert [name for name, blob in blobs.items() if blob not in engine] == []
    # 8 bits stay K before N; odd widths are padded in between.
    arrays = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(str(tmp_path / "decoder.onnx")).graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    }
    even = {name: codes for name, codes in arrays.items() if codes.shape[1] % 2 == 0}
    assert "lm_head.weight" in even and len(even) == nano.manifest.model.layers + 1
    assert [name for name, codes in even.items() if codes.tobytes() not in engine] == []


def test_the_layers_of_the_network(tmp_path):
    """The cache is updated in place, attention is a layer, products dequantise constants."""
    trt = pytest.importorskip("tensorrt_rtx")
    graph = GraphBuilder("decoder")
    rewrite_decoder(Source(default_bundle() / "decoder.onnx"), graph, Products(), 1024)
    graph.save(tmp_path / "decoder.onnx")
    builder = trt.Builder(log := trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(tmp_path / "decoder.onnx"))
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    count = {kind: sum(layer.type == kind for layer in layers) for kind in {layer.type for layer in layers}}
    model = Bundle.open(default_bundle()).manifest.model
    assert count[trt.LayerType.KV_CACHE_UPDATE] == 2 * model.layers
    assert count[trt.LayerType.ATTENTION_INPUT] == model.layers
    # Seven linears and four routers a layer, and the head.
    assert count[trt.LayerType.DEQUANTIZE] == 11 * model.layers + 1
    constants = [layer.get_output(0) for layer in layers if layer.type == trt.LayerType.CONSTANT]
    assert sum(tensor.dtype == trt.DataType.INT4 for tensor in constants) == 7 * model.layers
    assert sum(tensor.dtype == trt.DataType.INT8 for tensor in constants) == 4 * model.layers + 1
    assert not any(layer.type == trt.LayerType.SCATTER for layer in layers)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling kernels takes seconds each and is tested elsewhere; what was asked for is kept."""
    from crab_edge_export import plugin_compile

    from crab_edge.ilora.plugin_kernels import Kernels

    asked = []

    def compile_products(products, sm, progress):
        asked.append((sorted(one.name for one in products), sm))
        return Kernels([], {})

    monkeypatch.setattr(plugin_compile, "compile_products", compile_products)
    return asked


def test_a_target_of_another_machine_gets_everything_but_the_engine(
    tiny_bundle, tmp_path, uncompiled, capsys
):
    command = ["export", "--bundle", str(tiny_bundle), "--target", "jetson-orin", "--capacity", "256"]
    assert run([*command, "--out", str(tmp_path / "orin"), "--json"]) == 0
    said = capsys.readouterr()
    record = json.loads(said.out)["engines"]["jetson-orin"]
    assert not record["built"] and record["sm"] == [87]
    assert record["build_command"] in " ".join(said.err.split()) and "JetPack" in said.err
    bundle = Bundle.open(tmp_path / "orin", full=True)
    decoder = bundle.manifest.engines["jetson-orin"].graphs["decoder"]
    assert decoder.file == "engines/jetson-orin/decoder.onnx"
    # The 4-bit products are the plugin's there, and the same file runs in ONNX Runtime by their bodies.
    operators = {node.op_type for node in onnx.load(str(bundle.path / decoder.file)).graph.node}
    assert {"ILoRARoute", "ILoRALinear"} <= operators and "DequantizeLinear" not in operators
    ((names, sm),) = uncompiled
    assert sm == 87 and any(name.startswith("ILoRALinearBias") for name in names)
    assert (bundle.path / "engines/jetson-orin/build.json").is_file()


def test_what_waits_for_tensorrt_rtx_says_how_to_install_it(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_engines.Target, "builds_here", lambda self: False)
    said = []
    path = add_engines(tiny_bundle, tmp_path / "out", EngineOptions(("rtx",), 256), report=said.append)
    assert re.search(r"pip install 'crab-edge\[rtx\]'.*crab-edge build-engine BUNDLE --target rtx", said[-1])
    info = Bundle.open(path).manifest.engines["rtx"]
    assert not info.built and info.version == "1.0"


def test_the_plugins_file_gives_the_same_answer(tiny_bundle, tmp_path, uncompiled):
    """The file of a target with plugins and the one of TensorRT-RTX, both by their bodies."""
    path = add_engines(tiny_bundle, tmp_path / "thor", EngineOptions(("jetson-thor",), capacity=64))
    graph = GraphBuilder("decoder")
    rewrite_decoder(Source(tiny_bundle / "decoder.onnx"), graph, Products(), 64)
    graph.save(tmp_path / "decoder.onnx")
    embeds = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    positions = np.tile(np.arange(20), (3, 1))
    wanted = HalfDecoder(tmp_path / "decoder.onnx")(embeds, positions)
    got = HalfDecoder(path / "engines/jetson-thor/decoder.onnx")(embeds, positions)
    assert np.linalg.norm(got - wanted) < 5e-3 * np.linalg.norm(wanted)


def test_a_failed_build_leaves_nothing(tiny_bundle, tmp_path, monkeypatch):
    pytest.importorskip("tensorrt_rtx")

    def build_apart(job):
        raise EngineError("the builder ended")

    monkeypatch.setattr(tensorrt_engines, "build_apart", build_apart)
    with pytest.raises(EngineError):
        add_engines(tiny_bundle, tmp_path / "out", EngineOptions(("rtx",), capacity=256))
    assert list(tmp_path.iterdir()) == []


def test_engines_are_replaced_and_others_kept(tiny_bundle, tmp_path, uncompiled):
    first = add_engines(tiny_bundle, tmp_path / "a", EngineOptions(("jetson-orin", "jetson-thor"), 256))
    second = add_engines(first, tmp_path / "b", EngineOptions(("jetson-orin",), 512))
    engines = Bundle.open(second).manifest.engines
    assert engines["jetson-orin"].capacity == 512 and engines["jetson-thor"].capacity == 256
    assert Bundle.open(first).manifest.engines["jetson-orin"].capacity == 256


def test_unsuitable_settings_are_refused_by_name(tmp_path):
    shape = KNOWN["7b"]
    with pytest.raises(InputError, match="--capacity: expected 64 to 32768"):
        check_targets(EngineOptions(("rtx",), capacity=40000), recipe_for(shape, 4, 128), shape)
    with pytest.raises(InputError, match="256"):
        check_targets(EngineOptions(("rtx",)), recipe_for(shape, 4, 256, "unfolded8"), shape)
    with pytest.raises(InputError, match="no such target"):
        check_targets(EngineOptions(("jetson-nano",)), recipe_for(shape, 4, 128), shape)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bundle", "B"], "--bundle goes with --target"),
        (["--bundle", "B", "--target", "rtx", "--bits", "8"], "--bits doesn't go with --bundle"),
        (["--target", "rtx"], "needs --model DIR, or --bundle"),
        (["--model", "M", "--capacity", "512"], "--capacity goes with --target"),
        (["--model", "M", "--target", "rtx", "--int4", "maybe"], "--int4: expected dequantize or plugin"),
        (["--bundle", "B", "--target", "rtx"], "no such bundle folder"),
    ],
)
def test_options_that_do_not_go_together(options, said, tmp_path, capsys):
    assert run(["export", *options, "--out", str(tmp_path / "out")]) in (1, 2)
    assert said in capsys.readouterr().err


def test_memory_and_disk_are_asked_for_beforehand(tiny_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorrt_engines, "available_bytes", lambda: 1 << 20)
    if not tensorrt_engines.target("rtx").builds_here():
        pytest.skip("tensorrt_rtx isn't installed")
    with pytest.raises(InputError, match="GB of memory"):
        add_engines(tiny_bundle, tmp_path / "out", EngineOptions(("rtx",), 256))
    monkeypatch.setattr(tensorrt_engines, "available_bytes", lambda: None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(tensorrt_engines.shutil, "disk_usage", lambda path: usage._replace(free=1))
    with pytest.raises(InputError, match="GB of disk"):
        add_engines(tiny_bundle, tmp_path / "out", EngineOptions(("rtx",), 256))


def test_a_bundle_made_on_the_way_is_kept_when_its_engines_fail(
    tiny_bundle, tmp_path, uncompiled, monkeypatch
):
    """With --model the bundle without engines comes first; only a failure leaves it, and says where it is."""
    from crab_edge_apps import _engines

    def export(place):
        return shutil.copytree(tiny_bundle, place)

    wanted = EngineOptions(("jetson-orin",), 256)
    path = _engines.export_and_add(export, tmp_path / "a", wanted, overwrite=False)
    assert list(tmp_path.iterdir()) == [path] and "jetson-orin" in Bundle.open(path).manifest.engines

    def fails(*args, **kwargs):
        raise EngineError("no engine")

    monkeypatch.setattr(tensorrt_engines, "add_engines", fails)
    with pytest.raises(EngineError, match=r"--bundle \S+/\.b\.plain --target jetson-orin --out \S+/b"):
        _engines.export_and_add(export, tmp_path / "b", wanted, overwrite=False)
    assert Bundle.open(tmp_path / ".b.plain").manifest.engines == {}
