"""`--no-grammar` on the command line: passed on, kept apart from answers without it, its cost measured."""

import json
from types import SimpleNamespace

from crab_edge_apps import _bench_grammar, _predictions, bench
from crab_edge_apps import evaluate as verb

import crab_edge
from crab_edge import tasks
from crab_edge.results import Answer, Timings


def test_answers_are_held_to_their_form(cli, clips, tmp_path):
    (row,) = cli("ask", clips["av"], "--task", "ave", "--json", "--no-grammar", answers_="a dog").rows()
    assert row["raw"] == "a dog" and row["parsed"][0]["type"] == "unparsed"
    (row,) = cli("ask", clips["av"], "--task", "ave", "--json").rows()
    assert row["raw"].startswith("a dog<event>") and {r["type"] for r in row["parsed"]} == {"event"}
    held = row["timings"]["held_tokens"]
    assert held > 0 and f"held to the task's form at {held} of" in row["notices"][-1]
    streamed = cli("ask", clips["av"], "Is there a dog?", answers_="yes")
    assert streamed.code == 0 and "yes<answer>" in streamed.out
    ran = cli("ask", clips["av"], "--task", "ave", "--max-tokens", "3")
    assert ran.code == 2 and "--max-tokens" in ran.err
    ran = cli("analyze", clips["av"], "--task", "avcap,ave", "--max-tokens", "3", "--out", tmp_path / "out")
    assert ran.code == 2 and "task ave takes" in ran.err and not (tmp_path / "out").exists()


def test_analyze_keeps_rows_with_and_without_apart(cli, clips, tmp_path):
    for flags, known in ((["--no-grammar"], 0), ([], 0), (["--grammar"], 1), (["--no-grammar"], 1)):
        ran = cli("analyze", clips["av"], "--task", "ave", "--out", tmp_path, *flags, answers_="a dog")
        assert ran.code == 0 and f"{known} rows already there" in ran.out
    plain, held = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert plain["grammar"] is False and held["grammar"] is True
    assert plain["raw"] == "a dog" and held["raw"].startswith("a dog<event>")


def test_evaluate_passes_it_on_into_a_folder_of_its_own(monkeypatch, tmp_path):
    asked = []

    def ask(question, task, **options):
        asked.append(options)
        return Answer(task, "", tasks.get(task).parse("<event>dog, (0 10)</event>"), Timings())

    session = SimpleNamespace(clip=SimpleNamespace(duration_s=10.0, windows=lambda: [None]), ask=ask)
    model = SimpleNamespace(
        bundle=SimpleNamespace(identity="fake@1"), open=lambda *_, **__: session, grammars=lambda: None
    )
    monkeypatch.setattr(crab_edge, "load", lambda *_, **__: model, raising=False)
    folder = tmp_path / "AVUIE_2" / "ave"
    for kind, suffix in (("video", "mp4"), ("audio", "wav")):
        (folder / kind).mkdir(parents=True)
        (folder / kind / f"a.{suffix}").write_bytes(b"")
    record = {"event": "dog", "vid": "a", "start_time": 0, "end_time": 10}
    (folder / "test.json").write_text(json.dumps([record]))
    for grammar in (True, False):
        report = verb.run(None, tmp_path / "AVUIE_2", ["ave"], out=tmp_path / "out", grammar=grammar)
        assert report.bundle == "fake@1" + ", not held to forms" * (not grammar)
    assert asked == [{"grammar": True}, {"grammar": False}]
    names = {path.parent.name for path in (tmp_path / "out").rglob(_predictions.file_name("ave", ""))}
    assert names == {"fake@1+grammar", "fake@1+free"}


def test_bench_times_every_task_with_a_grammar(fake_bundle, capsys):
    result = _bench_grammar.measure(fake_bundle, tokens=6)
    assert {row["task"] for row in result["tasks"]} == {t.name for t in tasks.all() if t.grammar.strip()}
    assert all(0 < row["tagged_s"] <= row["longest_s"] for row in result["tasks"]) and result["plain_s"] > 0
    (entry,) = bench._grammar(fake_bundle, as_json=True)
    assert entry["grammar"]["vocabulary"] == result["vocabulary"]
    _bench_grammar.show(result)
    said = capsys.readouterr().out
    assert "for each token" in said and "ave: free text" in said
