"""`crab-edge doctor`: findings of processes that answer, refuse, abort and hang."""

import json
import sys

import numpy as np
import pytest

from crab_edge import doctor
from crab_edge.bundle import default_bundle, sample_clip
from crab_edge.doctor import probe
from crab_edge.errors import InputError
from tests import fake_cuda, fake_tensorrt

SAYS = "import json, os, sys, time\ndef say(**r): print(json.dumps(r), flush=True)\n"
WORKS = (
    "say(step='a'); print('noise'); say(facts={'version': '1.0'}); "
    "say(state='works', seconds=0.5, answer='yes')"
)
BEHAVIOURS = {
    "onnxruntime:cpu": f"{WORKS}; say(end=True)",
    "onnxruntime:cuda": "say(state='missing', problem='install it; run `pip install x`'); say(end=True)",
    "torch:cpu": "say(state='kernel only', step='asking crab-nano'); "
    "sys.stderr.write('why\\nso'); os.abort()",
    "torch:cuda": "say(step='running a product', facts={'version': '2.0'}); time.sleep(60)",
    "tensorrt:tensorrt": "sys.exit(7)",
}


@pytest.fixture
def behaving(monkeypatch):
    def command(engine, bundle, clip):
        return [sys.executable, "-c", SAYS + BEHAVIOURS[engine]]

    monkeypatch.setattr(doctor, "command", command)
    return command


def test_what_processes_do_becomes_findings(behaving):
    running = doctor.examine(list(BEHAVIOURS), default_bundle(), sample_clip(), limit_s=3)
    found = {one.engine: one for one in running}
    works = found["onnxruntime:cpu"]
    assert (works.state, works.seconds, works.answer) == ("works", 0.5, "yes")
    assert works.facts == {"version": "1.0"} and works.problem is None
    assert (
        found["onnxruntime:cuda"].state == "missing" and "pip install x" in found["onnxruntime:cuda"].problem
    )
    aborted = found["torch:cpu"]
    assert aborted.state == "kernel only"
    assert aborted.problem == "asking crab-nano ended its process (SIGABRT): why so"
    hung = found["torch:cuda"]
    assert hung.state == "fails" and hung.problem.startswith("running a product hung: stopped after")
    assert hung.facts == {"version": "2.0"}
    assert found["tensorrt:tensorrt"].problem == "starting ended its process (exit code 7)"


def test_names():
    assert doctor.chosen(None) == list(doctor.ENGINES)
    assert doctor.chosen("torch") == ["torch:cpu", "torch:cuda"]
    assert doctor.chosen("onnxruntime:cuda") == ["onnxruntime:cuda"]
    assert doctor.chosen("tensorrt_rtx") == ["tensorrt:tensorrt_rtx"]
    with pytest.raises(
        InputError, match="unknown engine 'tpu'; choose one of: onnxruntime, torch, tensorrt,"
    ):
        doctor.chosen("tpu")


def run(arguments, capsys):
    from crab_edge_apps.cli import run

    code = run(["doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_and_an_exit_code(behaving, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ENGINES", tuple(BEHAVIOURS)[:2])
    code, out, err = run([], capsys)
    assert code == 0 and not err
    assert "onnxruntime:cpu" in out and "'yes'" in out and "run `pip install x`" in out
    code, out, err = run(["--engine", "onnxruntime:cuda"], capsys)
    assert code == 3 and "no engine of onnxruntime:cuda runs crab-nano/" in err


def test_json(behaving, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "ENGINES", tuple(BEHAVIOURS)[:2])
    code, out, _ = run(["--json"], capsys)
    report = json.loads(out)
    assert code == 0 and report["bundle"].startswith("crab-nano/") and report["machine"]["python"]
    assert [one["state"] for one in report["engines"]] == ["works", "missing"]


def test_the_packaged_model_really_answers(capsys):
    """The whole of it, on the engine that is always here: a process, a kernel, a clip, a question."""
    pytest.importorskip("onnxruntime")
    code, out, _ = run(["--engine", "onnxruntime:cpu", "--json"], capsys)
    (finding,) = json.loads(out)["engines"]
    assert code == 0 and finding["state"] == "works"
    assert finding["answer"] and 0 < finding["seconds"] < 600 and "a product in" in finding["facts"]["kernel"]


def test_a_bundle_that_is_none(tmp_path, capsys):
    code, _, err = run([str(tmp_path)], capsys)
    assert code == 2 and "bundle.json is missing" in err


def test_the_product_is_a_real_model():
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(probe.product_model(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).random((64, 64), np.float32)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], x @ x, rtol=1e-5)


class Said(list):
    """What a probe reports, one dictionary a step."""

    def __call__(self, **report):
        self.append(report)

    def facts(self):
        return {name: text for report in self for name, text in report.get("facts", {}).items()}


def test_tensorrt_builds_and_runs_a_node(monkeypatch, tmp_path):
    """On the fakes: the engine that `doctor` builds is the product's ONNX file here."""
    pytest.importorskip("onnxruntime")
    said = Said()
    with fake_cuda.installed(monkeypatch) as driver:
        module = fake_tensorrt.installed(monkeypatch, driver, version="10.3.0")
        monkeypatch.setattr(probe, "_build", lambda *_: sum_engine(tmp_path, module))
        probe._tensorrt("tensorrt", said)
    assert "an engine of one node in" in said.facts()["kernel"] and "8.9" in said.facts()["device"]
    (note,) = [note for report in said for note in report.get("notes", [])]
    assert "10.3.0" in note and "10.15" in note and "--engine onnxruntime" in note


def sum_engine(folder, module):
    """The bytes of a fake engine of y = x + x."""
    onnx = pytest.importorskip("onnx")
    tensor = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64]) for name in "xy"]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["x", "x"], ["y"])], "sum", tensor[:1], tensor[1:]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, str(folder / "sum.onnx"))
    path = folder / "sum.engine"
    fake_tensorrt.write_engine(path, folder / "sum.onnx", [{}], version=module.__version__, sm=[89])
    return path.read_bytes()


def test_tensorrt_rtx_builds_without_a_gpu_and_says_what_it_lacks(monkeypatch):
    """The real library: it builds, and the missing driver is the finding."""
    pytest.importorskip("tensorrt_rtx")
    from crab_edge.engines import _cuda
    from crab_edge.errors import DeviceError

    said = Said()
    monkeypatch.setattr(_cuda, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    _cuda.driver.cache_clear()
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        probe._tensorrt("tensorrt_rtx", said)
    assert said.facts()["kernel"] == "an engine of one node was built"
