"""`crab-edge ask --router`: where the traces go and what is refused before anything runs."""

import json

import numpy as np
import pytest

from crab_edge.router import RouterTrace
from tests.fake_bundle import FakeEngine, write_fake_bundle

AVE = "Therefore, the events and time range are <event>dog, (2 7)</event>"


class EvenTracer:
    layers = ("layers.0.mlp.up_proj",)

    def __call__(self, embeds, position_ids):
        return np.full((1, len(embeds), 2), 0.5, np.float32)

    def close(self):
        pass


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    adapter = {"rank": 32, "experts": 2, "alpha": 64, "adapted_linears": 1}
    return write_fake_bundle(tmp_path_factory.mktemp("adapted") / "bundle", adapter=adapter)


class TracingEngine(FakeEngine):
    def tracer(self):
        return EvenTracer()


@pytest.fixture
def tracing(cli):
    # A class of its own: a protocol remembers which classes it has seen a method on.
    cli.engine = TracingEngine


def test_one_answer_goes_to_the_file(cli, clips, adapted, tracing, tmp_path):
    path = tmp_path / "trace.npz"
    ran = cli("ask", clips["av"], "--task", "ave", "--router", path, "--bundle", adapted, answers_=AVE)
    assert ran.code == 0 and f"router trace: {path}" in ran.out
    trace = RouterTrace.load_npz(path)
    assert "".join(trace.tokens).endswith(AVE) and set(trace.modality) == {"text", "video", "audio", "answer"}


def test_a_streamed_question_too_and_json_keeps_its_lines(cli, clips, adapted, tracing, tmp_path):
    path = tmp_path / "trace.jsonl"
    question = ("ask", clips["av"], "Is there a dog?", "--router", path, "--bundle", adapted)
    assert cli(*question, answers_="<answer>yes</answer>").code == 0
    lines = path.read_text().splitlines()
    (row,) = cli(*question, "--json").rows()
    assert row["router"]["mean_by_modality"]["answer"] == [0.5, 0.5]
    assert row["router"]["tokens"] == len(lines) - 1
    assert json.loads(lines[0])["type"] == "router"


def test_several_answers_go_to_files_of_their_own(cli, clips, adapted, tracing, tmp_path):
    ran = cli(
        *("ask", clips["av"], "--task", "ave,avcap", "--router", tmp_path / "t.jsonl", "--bundle", adapted),
        answers_=AVE,
    )
    assert ran.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.avcap.jsonl", "t.ave.jsonl"]


@pytest.mark.parametrize(("name", "words"), [("t.csv", ".npz or .jsonl"), ("no/t.npz", "doesn't exist")])
def test_places_are_checked_before_anything_runs(cli, clips, adapted, tracing, tmp_path, name, words):
    ran = cli("ask", clips["av"], "--task", "ave", "--router", tmp_path / name, "--bundle", adapted)
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1
    assert cli.engines == [] and list(tmp_path.iterdir()) == []


def test_a_bundle_without_adapter(cli, clips, tracing, tmp_path):
    ran = cli("ask", clips["av"], "--task", "ave", "--router", tmp_path / "t.npz")
    assert ran.code == 2 and "no router to trace" in ran.err and ran.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
