"""The arithmetic of `crab_edge.sizes` against files that the exporter wrote, byte by byte."""

import numpy as np
import onnx
import pytest
from crab_edge_export import export_bundle

from crab_edge.bundle import Bundle
from crab_edge.shape import read_shape
from crab_edge.sizes import data_bytes, of_manifest, parts, recipe_for, tensors
from tests.tiny_model import make_tiny_model_dir

CASES = {
    "w4": {},
    "unfolded": {"experts": "unfolded8"},
    "plane": {"experts": "plane4", "block": 16},
    "w8": {"bits": 8},
    "float": {"bits": 32},
}


def stored(path):
    """Weights of a graph by name: bytes. Constants and what has no name of a module are left out."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return {
        t.name: int(np.prod(t.dims)) * np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)).itemsize
        for t in graph.initializer
        if not t.name.startswith("constant.")
    }


@pytest.fixture(scope="module")
def zero_towers(tmp_path_factory):
    return make_tiny_model_dir(tmp_path_factory.mktemp("zero"), towers=False)


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_and_every_file(tiny, zero_towers, tmp_path, monkeypatch, case):
    monkeypatch.setattr("crab_edge_export.writing.EXTERNAL_PARAMETERS", 0)
    # Index constants of 1 KiB and more would lie in the data file too; the tiny audio encoder has one.
    base, adapter = zero_towers if case == "w4" else (tiny.base, tiny.adapter)
    options = {"method": "rtn"} | CASES[case]
    bundle = Bundle.open(export_bundle(base, adapter, tmp_path / "out", **options))
    shape, recipe = of_manifest(bundle.manifest)
    assert shape.adapter.towers == (case != "w4")
    expected = tensors(shape, recipe)
    for name in ("decoder", "vision", "audio"):
        sizes = {tensor.name: tensor.size for tensor in expected[name]}
        assert sizes == stored(bundle.graph(name))
        if name != "audio":
            data = bundle.path / f"{name}.onnx.data"
            assert data.stat().st_size == data_bytes(expected[name])
    embedding = sum(tensor.size for tensor in expected["embedding"])
    assert (bundle.path / "embedding.bin").stat().st_size == embedding
    predicted = sum(size for kinds in parts(shape, recipe).values() for size in kinds.values())
    graphs = sum(sum(stored(bundle.graph(name)).values()) for name in ("decoder", "vision", "audio"))
    assert predicted == embedding + graphs


def test_the_audio_file_too(tiny, tmp_path, monkeypatch):
    """Its constants of 1 KiB and more are pages of their own."""
    monkeypatch.setattr("crab_edge_export.writing.EXTERNAL_PARAMETERS", 0)
    bundle = Bundle.open(export_bundle(tiny.base, tiny.adapter, tmp_path / "out", method="rtn"))
    graph = onnx.load(str(bundle.graph("audio")), load_external_data=False).graph
    pages = sum(t.name.startswith("constant.") and bool(t.external_data) for t in graph.initializer)
    shape, recipe = of_manifest(bundle.manifest)
    data = (bundle.path / "audio.onnx.data").stat().st_size
    assert data == data_bytes(tensors(shape, recipe)["audio"]) + 4096 * pages


def test_a_directory_says_what_the_bundle_says(tiny, tiny_bundle):
    shape = read_shape(tiny.base, tiny.adapter)
    from dataclasses import replace

    known, recipe = of_manifest(Bundle.open(tiny_bundle).manifest)
    assert replace(shape, name="") == replace(known, name="")
    assert recipe == recipe_for(shape, 4, 32)
