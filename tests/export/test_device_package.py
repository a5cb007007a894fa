"""Engines built on another machine: what goes there, what comes back, and what a build that fails says."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from crab_edge_export import device_package
from crab_edge_export.engine_build import Job, build_apart
from crab_edge_export.graph import FLOAT16, GraphBuilder
from crab_edge_export.targets import target

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import BundleError, DependencyError, DeviceError, EngineError, InputError
from crab_edge.manifest import EngineGraph, EngineInfo
from tests.fake_bundle import write_fake_bundle
from tests.ilora.test_tensorrt_plugins import kernels

ORIN = "jetson-orin"
GRAPH = {
    "inputs": [{"name": "x", "dtype": "float16", "shape": [1, "S", 8]}],
    "outputs": [{"name": "y", "dtype": "float16", "shape": [1, "S", 4]}],
    "profiles": [
        {"name": "decode", "axes": {"S": (1, 1, 8)}},
        {"name": "prefill", "axes": {"S": (1, 64, 128)}},
    ],
}


def packaged(folder):
    """A bundle with the package of a target that isn't built."""
    plain = Bundle.open(write_fake_bundle(folder / "plain"))
    with BundleWriter(folder / "packaged") as writer:
        for name in plain.manifest.files:
            writer.path(name).write_bytes((plain.path / name).read_bytes())
        graphs = {}
        for part in ("decoder", "vision"):
            file = f"engines/{ORIN}/{part}.onnx"
            writer.path(file).write_bytes(part.encode())
            writer.path(f"{file}.data").write_bytes(b"weights")
            graphs[part] = {"file": file, **GRAPH}
        place = writer.path(f"engines/{ORIN}/build.json").parent
        digests = device_package.write(place, target(ORIN), {"decoder": 3, "vision": 0}, kernels(), 1 << 20)
        info = EngineInfo.model_validate(
            {
                "kind": "tensorrt", "library": "tensorrt", "version": "10.9", "sm": [87], "capacity": 64,
                "graphs": graphs, "built": False, "plugins": digests,
                "build_command": device_package.build_command(ORIN),
            }
        )  # fmt: skip
        return writer.commit(plain.manifest.model_copy(update={"engines": {ORIN: info}}))


@pytest.fixture
def jobs(monkeypatch):
    """Builds that succeed at once; what was to be built."""
    done = []

    def built(job):
        done.append(job)
        job.out.write_bytes(b"engine of " + job.source.read_bytes())
        return "10.16.1.11"

    monkeypatch.setattr(device_package, "build_apart", built)
    monkeypatch.setattr(device_package, "check_machine", lambda where, info: None)
    return done


def test_a_build_publishes_a_new_bundle_and_leaves_the_old_one(tmp_path, jobs):
    source = packaged(tmp_path)
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    lines = []
    out = device_package.build_engines(source, None, tmp_path / "built", report=lines.append)
    opened = Bundle.open(out, full=True)
    info = opened.manifest.engines[ORIN]
    assert info.built and info.version == "10.16.1.11"
    assert info.plugins == kernels().digests
    assert {name for name in opened.manifest.files if name.startswith("engines/")} == {
        f"engines/{ORIN}/decoder.engine",
        f"engines/{ORIN}/vision.engine",
    }
    assert (out / info.graphs["decoder"].file).read_bytes() == b"engine of decoder"
    assert {path: path.read_bytes() for path in source.rglob("*") if path.is_file()} == before
    assert len(lines) == 2
    # Only the decoder has plugins.
    by_name = {job.source.stem: job for job in jobs}
    assert (
        by_name["decoder"].kernels == source / "engines" / ORIN / "kernels"
        and by_name["decoder"].plugins == 3
    )
    assert by_name["vision"].kernels is None and by_name["vision"].sm == (87,)
    assert by_name["vision"].workspace == 1 << 20
    with pytest.raises(InputError, match="already exists"):
        device_package.build_engines(source, ORIN, out, report=lines.append)
    with pytest.raises(InputError, match="the engine for jetson-orin is built"):
        device_package.build_engines(out, ORIN, tmp_path / "again")
    with pytest.raises(InputError, match="wait to be built: jetson-orin"):
        device_package.build_engines(source, "rtx", tmp_path / "again")


def test_the_verb_refuses_a_bundle_that_waits_for_nothing(tmp_path, capsys):
    from crab_edge_apps.cli import run

    plain = write_fake_bundle(tmp_path / "plain")
    assert run(["build-engine", str(plain), "--out", str(tmp_path / "built")]) == 2
    assert "engines that wait to be built: none" in capsys.readouterr().err


def test_a_build_that_fails_publishes_nothing(tmp_path, jobs, monkeypatch):
    def fails(job):
        raise EngineError("no")

    monkeypatch.setattr(device_package, "build_apart", fails)
    with pytest.raises(EngineError):
        device_package.build_engines(packaged(tmp_path), ORIN, tmp_path / "built")
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("found", "gpus", "error", "message"),
    [
        ({}, [], DependencyError, r"needs tensorrt 10\.9 or newer, which isn't installed"),
        ({"tensorrt": "10.3.0"}, [], DependencyError, r"found 10\.3\.0.*JetPack 7\.2"),
        ({"tensorrt": "10.16.1"}, [], DeviceError, r"this one has no GPU"),
        ({"tensorrt": "10.16.1"}, [90], DeviceError, r"has Card of sm_90.*--target cuda-sm90"),
        ({"tensorrt": "10.16.1"}, [87], None, ""),
    ],
)
def test_the_machine_must_be_the_target_s(tmp_path, monkeypatch, found, gpus, error, message):
    from crab_edge.engines import _cuda, _tensorrt_check

    info = Bundle.open(packaged(tmp_path)).manifest.engines[ORIN]
    cards = [SimpleNamespace(sm=sm, name="Card") for sm in gpus]
    monkeypatch.setattr(_tensorrt_check, "installed", lambda: (found, {}))
    monkeypatch.setattr(_cuda, "driver", lambda: SimpleNamespace(gpus=lambda: cards))
    if error is None:
        device_package.check_machine(target(ORIN), info)
        return
    with pytest.raises(error, match=message):
        device_package.check_machine(target(ORIN), info)


def test_tensorrt_rtx_is_built_without_its_gpu(tmp_path, monkeypatch):
    from crab_edge.engines import _cuda, _tensorrt_check

    info = Bundle.open(packaged(tmp_path)).manifest.engines[ORIN]
    info = info.model_copy(update={"kind": "rtx", "library": "tensorrt_rtx", "version": "1.0", "sm": [89]})
    monkeypatch.setattr(_tensorrt_check, "installed", lambda: ({"tensorrt_rtx": "1.7.1"}, {}))
    monkeypatch.setattr(_cuda, "driver", lambda: pytest.fail("asked for a GPU"))
    device_package.check_machine(target("rtx-sm89"), info)
    monkeypatch.setattr(_tensorrt_check, "installed", lambda: ({}, {}))
    with pytest.raises(DependencyError, match=r"crab-edge\[rtx\]"):
        device_package.check_machine(target("rtx-sm89"), info)


def small_graph(path) -> None:
    graph = GraphBuilder("small")
    graph.input("x", FLOAT16, [1, "S", 8])
    graph.node("MatMul", ["x", graph.weight("w", np.ones((8, 4), np.float16))], "y")
    graph.output("y", FLOAT16, [1, "S", 4])
    graph.save(path)


def job(folder, **other) -> Job:
    graph = EngineGraph.model_validate({"file": "small.onnx", **GRAPH})
    given = {"library": "tensorrt_rtx", "sm": (86, 89), "workspace": 1 << 26, **other}
    return Job(source=folder / "small.onnx", out=folder / "small.engine", graph=graph, **given)


def test_the_building_machine_needs_no_torch_and_no_onnx():
    code = "import sys, crab_edge_export.device_package; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"torch", "onnx", "triton", "transformers", "tensorrt"}


def test_a_job_survives_its_trip_to_the_child(tmp_path):
    one = job(tmp_path, kernels=tmp_path / "kernels", plugins=2)
    assert Job.from_json(one.to_json()) == one


def test_one_builder_for_both_libraries(tmp_path):
    """TensorRT-RTX stands in for TensorRT: the same calls, as far as there are no plugins."""
    pytest.importorskip("tensorrt_rtx")
    small_graph(tmp_path / "small.onnx")
    version = build_apart(job(tmp_path))
    assert version.count(".") >= 2 and (tmp_path / "small.engine").stat().st_size > 1000
    with pytest.raises(BundleError, match=r"made plugins of 0 nodes, expected 3"):
        build_apart(job(tmp_path, plugins=3))
    # A parser that took the body of a cache update, which copies the cache.
    copying = job(tmp_path)
    aliased = copying.graph.model_copy(update={"aliases": {"present.0.key": "past.0.key"}})
    with pytest.raises(BundleError, match=rf"tensorrt_rtx {version} updates 0 of 1 cache tensors in place"):
        build_apart(dataclasses.replace(copying, graph=aliased))
    kernels().write(tmp_path / "kernels")
    with pytest.raises(DependencyError, match="TensorRT-RTX has no plugins"):
        build_apart(job(tmp_path, kernels=tmp_path / "kernels"))
    (tmp_path / "small.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"tensorrt_rtx doesn't take it"):
        build_apart(job(tmp_path))


def test_a_library_that_ends_the_process_is_an_error(tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "falls_over.py").write_text(
        "import os, sys\nprint('last words', file=sys.stderr)\nos.abort()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    with pytest.raises(EngineError, match=r"falls_over ended its process \(SIGABRT\).*last words"):
        build_apart(job(tmp_path, library="falls_over"))
    with pytest.raises(DependencyError, match="isn_t_there can't be imported"):
        build_apart(job(tmp_path, library="isn_t_there"))


def test_a_damaged_package_is_refused(tmp_path, jobs):
    source = packaged(tmp_path)
    path = source / "engines" / ORIN / "build.json"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Bundle.open(source).manifest.files[f"engines/{ORIN}/build.json"].sha256 == digest
    path.write_text("{}")
    with pytest.raises(BundleError):
        device_package.build_engines(source, ORIN, tmp_path / "built")
