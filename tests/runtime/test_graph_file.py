"""Reading ONNX files without `onnx`, compared with `onnx`."""

import numpy as np
import pytest

from crab_edge.bundle import default_bundle
from crab_edge.graph_file import GraphFile, read_nodes

onnx = pytest.importorskip("onnx")


@pytest.mark.parametrize("name", ["decoder", "audio", "vision"])
def test_the_packaged_graphs_are_read_as_onnx_reads_them(name):
    path = default_bundle() / f"{name}.onnx"
    ours, theirs = GraphFile(path), onnx.load(str(path))
    assert ours.producer == f"{theirs.producer_name} {theirs.producer_version}"
    assert len(ours.nodes) == len(theirs.graph.node)
    for mine, node in zip(ours.nodes, theirs.graph.node, strict=True):
        assert (mine.kind, mine.domain, mine.name) == (node.op_type, node.domain, node.name)
        assert (mine.inputs, mine.outputs) == (tuple(node.input), tuple(node.output))
        assert mine.ints == {a.name: a.i for a in node.attribute if a.type == a.INT}
        assert mine.floats == {a.name: a.f for a in node.attribute if a.type == a.FLOAT}
    for tensor in theirs.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor)
        found = ours.weight(tensor.name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
    values = [onnx.numpy_helper.to_array(tensor) for tensor in theirs.graph.initializer]
    assert ours.n_bytes() == sum(value.nbytes for value in values)
    assert ours.n_bytes("uint8") == sum(value.nbytes for value in values if value.dtype == np.uint8)
    assert "lm_head.scales" in ours if name == "decoder" else "lm_head.scales" not in ours


@pytest.fixture
def external(tmp_path):
    """A model whose weight W [3, 4] lies 64 bytes into a data file, and its own weight v."""
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "m.data").write_bytes(bytes(64) + value.tobytes() + b"tail")
    tensor = onnx.TensorProto(name="W", data_type=1, dims=[3, 4], data_location=1)
    for key, entry in (("location", "m.data"), ("offset", 64), ("length", 48)):
        tensor.external_data.add(key=key, value=str(entry))
    node = onnx.helper.make_node("Gemm", ["x", "W", ""], ["y"], name="y", alpha=0.25, transB=-1)
    inner = onnx.numpy_helper.from_array(np.array([-7, 9], np.int64), "v")
    graph = onnx.helper.make_graph([node], "g", [], [], [tensor, inner])
    return graph, value, tmp_path / "m.onnx"


def write(graph, path):
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    return GraphFile(path)


def test_data_files(external):
    graph, value, path = external
    file = write(graph, path)
    assert file.nodes == read_nodes(path.read_bytes())
    assert file.nodes[0].ints == {"transB": -1} and file.nodes[0].floats == {"alpha": 0.25}
    assert file.nodes[0].inputs == ("x", "W", "")
    np.testing.assert_array_equal(file.weight("W"), value)
    np.testing.assert_array_equal(file.weight("v"), [-7, 9])
    # Written to memory, not to the file.
    file.weight("W")[0] = 5
    np.testing.assert_array_equal(GraphFile(path).weight("W"), value)
    with pytest.raises(ValueError, match="no weight u"):
        file.weight("u")


def test_files_that_are_no_models_or_cut_off(external):
    graph, _, path = external
    file = write(graph, path)
    data = path.with_name("m.data")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ValueError, match="W has 36 bytes, expected 48"):
        GraphFile(path).weight("W")
    data.unlink()
    with pytest.raises(FileNotFoundError):
        GraphFile(path).weight("W")
    whole = path.read_bytes()
    for broken in (b"", b"not a model", whole[:30], whole[:-3]):
        path.write_bytes(broken)
        with pytest.raises(ValueError):
            GraphFile(path)
    assert file.nodes[0].kind == "Gemm"


@pytest.mark.parametrize("location", ["../m.data", "/etc/passwd", "a/b", ""])
def test_weights_outside_the_folder_are_refused(external, location):
    graph, _, path = external
    graph.initializer[0].external_data[0].value = location
    with pytest.raises(ValueError, match="no place beside the model"):
        write(graph, path)


def test_types_that_no_exporter_writes(external):
    graph, _, path = external
    graph.initializer[0].data_type = 8
    with pytest.raises(ValueError, match="W is of type 8"):
        write(graph, path)
