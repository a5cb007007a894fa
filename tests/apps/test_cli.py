"""`crab-edge ask`, `verify` and the frame around all verbs, over a fake engine."""

import json
import subprocess
import sys

import pytest

from crab_edge import __version__
from tests.fake_bundle import write_fake_bundle

AVE = "Therefore, the events and time range are <event>dog, (2 7)</event>"


def test_version_and_help(cli):
    assert cli("--version").out == f"crab-edge {__version__}\n"
    shown = cli("--help")
    assert shown.code == 0
    for verb in ("ask", "analyze", "verify"):
        assert verb in shown.out


@pytest.mark.parametrize("verb", ["ask", "analyze", "verify"])
def test_help_of_a_verb(cli, verb):
    ran = cli(verb, "--help")
    assert (ran.code == 0 and "--bundle" in ran.out) or "BUNDLE" in ran.out


def test_help_is_cheap():
    code = "import sys; from crab_edge_apps.cli import run; run(['--help'])"
    code += "; print(*sys.modules, file=sys.stderr)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(ran.stderr.split())
    assert not loaded & {"numpy", "av", "onnxruntime", "torch", "pydantic", "tokenizers"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["dance"], "No such command 'dance'"),
        (["ask", "--bogus"], "--bogus"),
        (["ask", "--threads", "two", "x.mp4"], "--threads"),
        (["ask"], "no media given"),
    ],
)
def test_usage_errors(cli, arguments, words):
    ran = cli(*arguments)
    assert ran.code == 2 and ran.out == ""
    assert ran.err.startswith("crab-edge: error: ") and ran.err.count("\n") == 1 and words in ran.err


def test_unexpected_errors_are_one_line_and_name_the_way_to_the_traceback(cli, clips, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr("crab_edge.session.Session.ask", fail)
    ran = cli("ask", clips["av"])
    assert ran.code == 1 and ran.err.count("\n") == 1
    assert "unexpected ZeroDivisionError: oh no" in ran.err and "crab-edge --debug ask" in ran.err
    ran = cli("--debug", "ask", clips["av"], "--bundle", "nowhere")
    assert ran.code == 2 and "Traceback" in ran.err


def test_a_missing_package_names_its_extra(cli, clips, monkeypatch):
    def fail(*_, **__):
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")

    monkeypatch.setattr("crab_edge.session.Session.ask", fail)
    ran = cli("ask", clips["av"])
    assert ran.code == 2 and "needs torch" in ran.err and "crab-edge[train]" in ran.err


def test_interrupt(cli, clips, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("crab_edge.session.Session.ask", interrupt)
    ran = cli("ask", clips["av"])
    assert ran.code == 130 and "Traceback" not in ran.err


def test_every_applicable_task_is_printed(cli, clips):
    ran = cli("ask", clips["av"], answers_=AVE)
    assert ran.code == 0
    assert "av.mp4 (64x48, 4 fps, 8.0 s, with sound)" in ran.out
    for words in ("avcap", "avvp", "ave", "dog", "2.0 s", "7.0 s", "s in all", "fake/w4@"):
        assert words in ran.out
    assert "avqa" not in ran.out


def test_a_question_streams(cli, clips):
    ran = cli("ask", clips["av"], "Is there a dog?", answers_="<answer>yes</answer>")
    assert ran.code == 0 and ran.out.startswith("<answer>yes</answer>\n  yes\n") and ran.err == ""


def test_an_unfamiliar_question_gets_a_note(cli, clips):
    ran = cli("ask", clips["av"], "Who painted this?", answers_="<answer>yes</answer>")
    assert "note: unfamiliar question" in ran.err and "fake" in ran.err


def test_json_has_one_object_an_answer(cli, clips):
    rows = cli("ask", clips["av"], "--json", answers_=AVE).rows()
    assert {"ave", "avvp", "avcap"} <= {row["task"] for row in rows}
    (row,) = cli("ask", clips["av"], "--task", "ave", "--json").rows()
    assert row["parsed"] == [
        {"type": "event", "label": "dog", "start_s": 2.0, "end_s": 7.0, "modality": "audio-visual"}
    ]
    assert row["raw"] == AVE and row["media"] == [str(clips["av"])] and row["engine"] == {"name": "fake"}
    assert row["bundle"].startswith("fake/w4@") and row["timings"]["tokens"] > 0
    (row,) = cli("ask", clips["av"], "Who painted it?", "--json", answers_="<answer>me</answer>").rows()
    assert row["question"] == "Who painted it?" and "unfamiliar" in row["notices"][0]


def test_several_tasks_and_a_question(cli, clips):
    rows = cli("ask", clips["av"], "Is there a dog?", "-t", "ave,avqa", "-t", "avcap", "--json").rows()
    assert [(row["task"], row["question"]) for row in rows] == [
        ("ave", None),
        ("avqa", "Is there a dog?"),
        ("avcap", None),
    ]
    ran = cli("ask", clips["av"], "Is there a dog?", "-t", "ave,avcap")
    assert ran.code == 2 and "takes a question" in ran.err


def test_image_and_sound_with_markup_in_the_label(cli, clips):
    text = "The sounding object is [red]bus[/]. Its coordinates are <obj>(0,0)(112,224)</obj>."
    ran = cli("ask", clips["still"], clips["sound"], "--task", "arig", "--no-grammar", answers_=text)
    assert ran.code == 0 and "[red]bus[/]" in ran.out and "224" in ran.out


def test_forced_kinds(cli, clips):
    ran = cli("ask", "--video", clips["av"], "--audio", clips["sound"], "What is it?", answers_="x")
    assert ran.code == 0 and cli.engines[-1].audio_calls == [300]


def test_sample(cli, clips, monkeypatch, tmp_path):
    monkeypatch.setattr("crab_edge.bundle.sample_clip", lambda: clips["mute"])
    ran = cli("ask", "--sample", "--task", "avcap", answers_="a dog")
    assert ran.code == 0 and "a dog" in ran.out
    ran = cli("ask", "--sample", "Is there a dog?", answers_="<answer>no</answer>")
    assert ran.out.startswith("<answer>no</answer>")


def test_what_is_not_in_the_form_is_shown_raw(cli, clips):
    ran = cli("ask", clips["av"], "--task", "ave", "--no-grammar", answers_="I don't know")
    assert ran.code == 0 and "not in the task's form" in ran.out and "I don't know" in ran.out


def test_verify(cli, fake_bundle, tmp_path):
    ran = cli("verify", fake_bundle)
    assert (
        ran.code == 0
        and "intact" in ran.out
        and "decoder.onnx" in ran.out
        and "onnxruntime >=1.23" in ran.out
    )
    report = json.loads(cli("verify", fake_bundle, "--json").out)
    assert report["model"]["name"] == "fake" and report["identity"].startswith("fake/w4@")
    damaged = write_fake_bundle(tmp_path / "damaged")
    content = bytearray((damaged / "audio.onnx").read_bytes())
    content[3] ^= 1
    (damaged / "audio.onnx").write_bytes(content)
    ran = cli("verify", damaged)
    assert ran.code == 2 and "audio.onnx" in ran.err and ran.out == ""
