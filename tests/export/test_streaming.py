"""The float model layer by layer, the bundle in segments, and exports that were killed."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from crab_edge_export import export_bundle
from crab_edge_export.graph import GraphBuilder
from crab_edge_export.workspace import Workspace, place

from crab_edge.bundle import Bundle
from crab_edge.errors import CrabError, InputError, ModelError
from tests.tiny_model import make_tiny_model_dir


@pytest.fixture(scope="module")
def external():
    """Small models keep weights inside the graph; here they go to data files, as large ones' do."""
    import crab_edge_export.writing as writing

    before, writing.EXTERNAL_PARAMETERS = writing.EXTERNAL_PARAMETERS, 0
    yield
    writing.EXTERNAL_PARAMETERS = before


@pytest.fixture(scope="module")
def whole(tiny, external, tmp_path_factory):
    """A bundle made with the float model whole in memory."""
    out = tmp_path_factory.mktemp("whole") / "bundle"
    return Bundle.open(export_bundle(tiny.base, tiny.adapter, out, method="rtn", compare="answers"))


def hashes(bundle):
    return {name: info.sha256 for name, info in bundle.manifest.files.items()}


def test_layer_by_layer_is_the_float_model(tiny):
    from crab_edge_export.layered import LayeredEngine
    from crab_edge_export.weights import WeightStore

    rng = np.random.default_rng(0)
    with WeightStore(tiny.base, tiny.adapter) as weights:
        layered = LayeredEngine(tiny.config, weights)
        pixels = rng.standard_normal((512, 1176)).astype(np.float32)
        assert np.allclose(layered.vision(pixels), tiny.torch.vision(pixels), atol=1e-5)
        mel, lengths = rng.standard_normal((2, 32, 200)).astype(np.float32), np.array([200, 120])
        assert np.allclose(layered.audio(mel, lengths), tiny.torch.audio(mel, lengths), atol=1e-5)
        ids = np.array([5, 3, 5])
        assert np.array_equal(layered.embed(ids), tiny.torch.embed(ids))
        x = rng.standard_normal((30, 64)).astype(np.float32)
        positions = np.stack([np.arange(30) // 3, np.arange(30) % 7, np.arange(30) % 5])
        tiny.torch.rewind(0)
        expected = tiny.torch.forward(x[None], positions[:, None])
        tiny.torch.rewind(0)
        for i in range(2):
            with layered.layer(i) as run:
                x = run(x, positions)
        assert np.allclose(layered.logits(x[-1:])[0], expected, atol=1e-5)
        assert {p.device.type for p in layered.model.parameters()} == {"meta"}


def test_the_files_do_not_depend_on_how_the_model_is_compared(tiny, whole, external, tmp_path):
    path = export_bundle(tiny.base, tiny.adapter, tmp_path / "out", method="rtn", compare="layers")
    bundle = Bundle.open(path)
    assert hashes(bundle) == hashes(whole)
    parity = bundle.manifest.parity
    assert parity["compared"].startswith("layer by layer") and len(parity["layer_error"]) == 1
    assert 0 < parity["logits_error"]["mean"] < 0.3 and parity["positions"] > 10
    assert not place(path).exists()


def test_float_bundle_layer_by_layer(tiny, external, tmp_path):
    path = export_bundle(tiny.base, tiny.adapter, tmp_path / "out", bits=32, compare="layers")
    parity = Bundle.open(path).manifest.parity
    assert parity["greedy_agreement"] == parity["first_token_agreement"] == 1.0
    assert max(parity[f"{kind}_error"]["worst"] for kind in ("vision", "audio", "logits")) < 1e-4
    assert max(parity["layer_error"]) < 1e-4


def test_half_precision_cache_layer_by_layer(tiny, external, tmp_path):
    path = export_bundle(
        tiny.base, tiny.adapter, tmp_path / "out", bits=32, compare="layers", kv_dtype="float16"
    )
    parity = Bundle.open(path).manifest.parity
    assert 0 < parity["logits_error"]["worst"] < 5e-3


class Stopped(BaseException):
    pass


def stopping(at):
    """A progress callback that ends the export at its n-th call."""
    calls = [0]

    def progress(what, share):
        calls[0] += 1
        if calls[0] == at:
            raise Stopped
        assert 0 <= share <= 1

    return progress


@pytest.mark.parametrize("compare", ["answers", "layers"])
def test_stopped_exports_go_on(tiny, external, tmp_path, compare):
    options = {"method": "rtn", "compare": compare}
    reference = Bundle.open(export_bundle(tiny.base, tiny.adapter, tmp_path / "at_once", **options))
    out = tmp_path / "out"
    calls = []
    random = np.random.default_rng(0)
    for at in random.integers(2, 12, 5):
        with pytest.raises(Stopped):
            export_bundle(tiny.base, tiny.adapter, out, progress=stopping(at), **options)
        assert not out.exists()
        journal = json.loads((place(out) / "journal.json").read_text())
        calls.append(len(journal["steps"]))
        # What was being written when it ended may be torn.
        for data in (place(out) / "bundle").glob("*.data"):
            data.open("ab").write(b"torn")
    assert calls == sorted(calls) and calls[-1] > calls[0]
    resumed = Bundle.open(export_bundle(tiny.base, tiny.adapter, out, **options))
    assert hashes(resumed) == hashes(reference)
    ours, theirs = resumed.manifest.parity, reference.manifest.parity
    assert ours == theirs
    assert not place(out).exists()


def test_killed_exports_go_on(tiny, whole, external, tmp_path):
    """SIGKILL, in a process of its own, twice."""
    program = """
import os, signal, sys
import crab_edge_export.writing as writing
from crab_edge_export import export_bundle
writing.EXTERNAL_PARAMETERS = 0
calls = [0]
def progress(what, share):
    calls[0] += 1
    if calls[0] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
export_bundle(sys.argv[1], sys.argv[2], sys.argv[3], method="rtn", compare="answers", progress=progress)
"""
    out = tmp_path / "out"
    for at in (6, 14):
        arguments = [sys.executable, "-c", program, str(tiny.base), str(tiny.adapter), str(out), str(at)]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not out.exists() and place(out).is_dir()
    resumed = Bundle.open(export_bundle(tiny.base, tiny.adapter, out, method="rtn", compare="answers"))
    assert hashes(resumed) == hashes(whole)


def test_damaged_work_is_done_again(tiny, whole, external, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        export_bundle(tiny.base, tiny.adapter, out, method="rtn", compare="answers", progress=stopping(17))
    data = place(out) / "bundle" / "vision.onnx.data"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    (place(out) / "steps" / "audio.start.onnx").unlink()
    again = Bundle.open(export_bundle(tiny.base, tiny.adapter, out, method="rtn", compare="answers"))
    assert hashes(again) == hashes(whole)


def test_other_inputs_begin_anew(tiny, external, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped):
        export_bundle(tiny.base, tiny.adapter, out, method="rtn", progress=stopping(12))
    other, adapter = make_tiny_model_dir(tmp_path / "other", seed=3)
    seeded = Bundle.open(export_bundle(other, adapter, out, method="rtn"))
    once = Bundle.open(export_bundle(other, adapter, tmp_path / "once", method="rtn"))
    assert hashes(seeded) == hashes(once)


def test_calibrated_exports_go_on_layer_by_layer(tiny, external, tmp_path):
    from crab_edge.bundle import sample_clip

    options = {"compare": "layers", "calibration_media": [sample_clip()]}
    reference = Bundle.open(export_bundle(tiny.base, tiny.adapter, tmp_path / "at_once", **options))
    assert reference.manifest.parity["weights"]["4-bit"]["methods"] == {"gptq": 14}
    assert "rtn weighted by input energy" in reference.manifest.parity["weights"]["8-bit"]["methods"]
    out = tmp_path / "out"
    for at in (13, 9):
        with pytest.raises(Stopped):
            export_bundle(tiny.base, tiny.adapter, out, progress=stopping(at), **options)
    resumed = Bundle.open(export_bundle(tiny.base, tiny.adapter, out, **options))
    assert hashes(resumed) == hashes(reference)


def test_two_exports_of_one_bundle(tiny, tmp_path):
    out = tmp_path / "out"
    with Workspace(out, {}), pytest.raises(InputError, match="another export"):
        export_bundle(tiny.base, tiny.adapter, out)


def test_refused_before_it_starts(tiny, tmp_path, monkeypatch):
    import crab_edge_export.preflight as preflight

    monkeypatch.setattr(preflight, "available_bytes", lambda: 100_000_000)
    with pytest.raises(InputError, match=r"needs about \d+\.\d\d GB of memory, but 0\.10 GB"):
        export_bundle(tiny.base, tiny.adapter, tmp_path / "out")
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 1_000_000})
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"needs \d+\.\d\d GB of disk .*, but 0\.00 GB are free"):
        export_bundle(tiny.base, tiny.adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_old_bundle_and_the_work(tiny, whole, external, tmp_path, monkeypatch):
    import errno
    import shutil

    out = tmp_path / "out"
    shutil.copytree(whole.path, out)
    written = [0]
    original = GraphBuilder._write

    def full(self, value):
        written[0] += value.nbytes
        if written[0] > 150_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, value)

    monkeypatch.setattr(GraphBuilder, "_write", full)
    with pytest.raises(CrabError, match="the disk is full") as caught:
        export_bundle(tiny.base, tiny.adapter, out, method="rtn", overwrite=True)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert hashes(Bundle.open(out, full=True)) == hashes(whole)
    assert place(out).is_dir()
    monkeypatch.undo()
    again = Bundle.open(export_bundle(tiny.base, tiny.adapter, out, method="rtn", overwrite=True))
    assert hashes(again) == hashes(whole)


@pytest.mark.parametrize("compare", ["answers", "layers"])
def test_weights_that_are_not_finite(tiny, tmp_path, compare):
    import shutil

    from safetensors.numpy import load_file, save_file

    base = tmp_path / "base"
    shutil.copytree(tiny.base, base)
    weights = load_file(base / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight"))
    weights[name][0, 0] = np.nan
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="up_proj"):
        export_bundle(base, tiny.adapter, tmp_path / "out", compare=compare, method="rtn")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]
