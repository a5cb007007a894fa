"""`crab-edge evaluate` with a model that answers from a script: tables, resuming, failures, comparisons."""

import dataclasses
import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import typer
from crab_edge_apps import _predictions as predictions
from crab_edge_apps import _results_table as results_table
from crab_edge_apps import evaluate as verb
from crab_edge_apps import score as score_verb
from rich.console import Console
from typer.testing import CliRunner

from crab_edge import tasks
from crab_edge.errors import CheckError, EngineError, InputError, TaskError
from crab_edge.results import Choice, Event
from crab_edge.tasks import Bar
from tests.apps.scripted import (
    FakeModel,
    arig,
    ave,
    install,
    lines_of,
    say_dog,
    write_lists,
)


def test_figures_of_all_lists(data, model, tmp_path):
    report = verb.run(None, data, [], out=tmp_path / "out")
    found = lines_of(report)
    assert [(score.task, score.split) for score in report.scores] == [
        ("avqa", "test"),
        ("arig", "test"),
        ("arig", "test_unseen"),
        ("ave", "test"),
    ]
    assert found["ave", "test", "segment accuracy"].figure.value == pytest.approx(200 / 3)
    assert found["ave", "test", "segment accuracy"].met is True
    assert found["arig", "test_unseen", "label top-1"].figure.value == 50.0
    assert found["arig", "test_unseen", "label top-1"].bar.at_least == 30.0
    assert found["arig", "test", "label top-1"].bar.at_least == 60.0
    share = found["arig", "test", "cIoU (share IoU >= 0.5)"]
    # The best constant box is right everywhere, so that no box can be 25 points above it.
    assert (share.figure.value, share.figure.baseline, share.met) == (100.0, 100.0, False)
    assert found["avqa", "test", "existential"].figure.value == 50.0
    assert found["avqa", "test", "audio counting"].figure.value == 0.0
    assert report.absent == [name for name in tasks.names() if name not in ("ave", "arig", "avqa")]
    assert {"avcap", "avvp"} <= set(report.absent)
    assert report.bundle == "fake/w4@0123"
    assert report.mix == {"ave test": ["objects: 1 67 %, 2 33 %", "silent: no 33 %, yes 67 %"]}
    assert report.scores[0].unparsable == 0.0 and report.scores[0].n == 3


def test_sound_comes_from_its_own_file_and_one_clip_is_opened_once(data, model, tmp_path):
    verb.run(None, data, ["avqa"], out=tmp_path / "out")
    assert model.opened == [["video", "audio"]]
    assert model.asked[0] == ("a", "avqa", "Is there a dog?") and len(model.asked) == 3


def test_predictions_have_the_official_form(data, model, tmp_path):
    verb.run(None, data, ["arig"], out=tmp_path / "out")
    folder = tmp_path / "out" / "fake_w4@0123+grammar"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["inference_arig.jsonl", "inference_arig_unseen.jsonl"]
    rows = [json.loads(line) for line in (folder / "inference_arig.jsonl").read_text().splitlines()]
    own = rows[0].pop("crab_edge")
    assert rows[0] == {**arig("a"), "predict": say_dog("a", "arig", None)}
    assert own["key"].startswith("0-") and own["duration_s"] == 10.0 and own["seconds"] >= 0


def test_a_killed_run_goes_on_where_it_stopped(data, monkeypatch, tmp_path):
    def killed(name, task, question):
        if name == "b":
            raise KeyboardInterrupt
        return say_dog(name, task, question)

    install(monkeypatch, FakeModel(killed))
    with pytest.raises(KeyboardInterrupt):
        verb.run(None, data, ["ave"], out=tmp_path)
    path = tmp_path / "fake_w4@0123+grammar" / "inference_ave.jsonl"
    with path.open("a") as file:
        file.write('{"vid": "b", "predict": "<ev')  # the kill came in the middle of a line
    model = install(monkeypatch, FakeModel(say_dog))
    report = verb.run(None, data, ["ave"], out=tmp_path)
    assert [name for name, _, _ in model.asked] == ["b", "c"]
    assert [json.loads(line)["vid"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert report.scores[0].n == 3
    verb.run(None, data, ["ave"], out=tmp_path)
    assert len(model.asked) == 2


def test_a_full_disk_at_the_end_loses_no_prediction(data, model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        verb.run(None, data, ["ave"], out=tmp_path / "out")
    (path,) = (path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert len(path.read_text().splitlines()) == 3


def test_a_changed_record_is_asked_again(data, model, tmp_path):
    verb.run(None, data, ["ave"], out=tmp_path)
    write_lists(data, {"ave/test": [ave("a"), ave("b", "cow"), ave("c", "cat")]})
    asked = len(model.asked)
    report = verb.run(None, data, ["ave"], out=tmp_path, limit=2)
    assert [name for name, _, _ in model.asked[asked:]] == ["a", "b"]
    assert report.scores[0].n == 2


def test_limit_keeps_what_earlier_runs_said(data, model, tmp_path):
    verb.run(None, data, ["ave"], out=tmp_path)
    verb.run(None, data, ["ave"], out=tmp_path, limit=1)
    verb.run(None, data, ["ave"], out=tmp_path)
    assert len(model.asked) == 3


def test_a_bad_file_is_a_wrong_answer_and_tried_again(data, monkeypatch, tmp_path):
    write_lists(data, {"ave/test": [ave("a"), ave("bad"), ave("c")]})
    model = install(monkeypatch, FakeModel(say_dog))
    report = verb.run(None, data, ["ave"], out=tmp_path)
    score = report.scores[0]
    assert (score.n, score.errors) == (3, 1)
    assert score.lines[0].figure.value == pytest.approx(200 / 3)
    rows = (tmp_path / "fake_w4@0123+grammar" / "inference_ave.jsonl").read_text().splitlines()
    assert json.loads(rows[1])["crab_edge"]["error"].endswith("bad.mp4: truncated")
    verb.run(None, data, ["ave"], out=tmp_path)
    assert len(model.opened) == 4


def test_a_model_that_always_fails_stops_the_run(tmp_path, monkeypatch):
    data = write_lists(tmp_path / "data", {"ave/test": [ave("bad") for _ in range(30)]})
    model = install(monkeypatch, FakeModel(say_dog))
    with pytest.raises(EngineError, match=r"20 records in a row failed, the last with: .*truncated"):
        verb.run(None, data, ["ave"], out=tmp_path)
    assert len(model.opened) == 20


def test_two_runs_dont_write_one_file(data, model, tmp_path):
    [path] = [path for path in (data / "ave").glob("test*.json")]
    split = verb._read(data, ["ave"], None)[0][0][1]
    assert split.path == path
    target = tmp_path / "x.jsonl"
    with (
        predictions.PredictionFile(target, split).writing(),
        pytest.raises(InputError, match="another run"),
        predictions.PredictionFile(target, split).writing(),
    ):
        pass


def test_unparsable_answers_are_counted(data, monkeypatch, tmp_path):
    def woof(name, task, question):
        return "woof" if name == "b" else say_dog(name, task, question)

    install(monkeypatch, FakeModel(woof))
    score = verb.run(None, data, ["ave"], out=tmp_path).scores[0]
    assert score.unparsable == pytest.approx(100 / 3)


def test_short_clips_are_scored_over_their_own_seconds(tmp_path, monkeypatch):
    record = {**ave("a"), "end_time": 2}
    data = write_lists(tmp_path / "data", {"ave/test": [record]})
    model = FakeModel(say_dog)
    model.duration_s = 4.1
    install(monkeypatch, model)
    score = verb.run(None, data, ["ave"], out=tmp_path).scores[0]
    assert score.lines[0].figure.value == 50.0


def test_answers_of_several_windows_keep_their_results(tmp_path, monkeypatch):
    data = write_lists(tmp_path / "data", {"ave/test": [ave("a")]})
    model = FakeModel(say_dog)
    model.duration_s, model.windows = 25.0, 3
    install(monkeypatch, model)
    verb.run(None, data, ["ave"], out=tmp_path)
    row = json.loads((tmp_path / "fake_w4@0123+grammar" / "inference_ave.jsonl").read_text())
    assert row["crab_edge"]["parsed"][0]["label"] == "dog"
    split = verb._read(data, ["ave"], None)[0][0][1]
    [(_, prediction)] = predictions.collect(split, {split.records[0].key: row})
    assert prediction.parsed == (Event("dog", 0, 10, "audio-visual"),)


def test_comparison_pools_all_samples(data, monkeypatch, tmp_path):
    def worse(name, task, question):
        return "" if (name, task) == ("a", "ave") else say_dog(name, task, question)

    model = install(monkeypatch, FakeModel(worse), FakeModel(say_dog, "fake/float@9"))
    report = verb.run(Path("w4"), data, ["ave", "avqa"], out=tmp_path, against=Path("float"))
    assert model.loaded == [Path("w4"), Path("float")]
    assert report.against == "fake/float@9"
    assert list(report.differences) == ["ave test", "avqa test", "all"]
    pooled = report.differences["all"]
    assert pooled.n == 6 and pooled.points == pytest.approx(-100 / 6)
    assert pooled.low <= pooled.points <= pooled.high
    assert report.loss_met is False
    text = results_table.markdown(report)
    assert "- all: 33.33 against 50.00, difference -16.67 points (95 % interval" in text


def test_missing_media(data, model, tmp_path):
    (data / "ave" / "video" / "b.mp4").unlink()
    with pytest.raises(InputError, match="1 of 6 media files are missing"):
        verb.run(None, data, ["ave"], out=tmp_path)
    assert not model.opened
    report = verb.run(None, data, ["ave"], out=tmp_path, skip_missing=True)
    assert report.scores[0].n == 2 and report.missing == {"ave test": 1}


def test_wrong_arguments(data, model, tmp_path):
    with pytest.raises(
        InputError, match="no such folder; render test lists with crab-edge scenes render --out"
    ):
        verb.run(None, tmp_path / "nothing", [])
    with pytest.raises(TaskError, match="unknown task 'ava'"):
        verb.run(None, data, ["ava"])
    with pytest.raises(InputError, match=r"avcap: no test\*.json"):
        verb.run(None, data, ["avcap"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no test records"):
        verb.run(None, tmp_path / "empty", [])


def test_a_new_task_needs_one_declaration(tmp_path, monkeypatch):
    task = dataclasses.replace(
        tasks.get("ave"),
        name="mine",
        family="my own",
        instruction="Please identify the action taking place in the video.",
        parse=tasks.get("avqa").parse,
        render=tasks.get("avqa").render,
        truth=lambda record: (Choice(record["action"]),),
        metric="war-uar",
        bars={"UAR": Bar(at_least=60.0)},
    )
    tasks.register(task)
    try:
        records = [{"vid": name, "action": "bowling" if name == "a" else "skiing"} for name in "abc"]
        data = write_lists(tmp_path / "data", {"mine/test": records})
        model = install(monkeypatch, FakeModel(lambda name, task, question: "So <answer>Bowling</answer>."))
        report = verb.run(None, data, [], out=tmp_path)
        assert model.asked[0] == ("a", "mine", None)
        assert lines_of(report)["mine", "test", "WAR"].figure.value == pytest.approx(100 / 3)
        text = results_table.markdown(report)
        assert "| mine | test | WAR | 33.3 % |  | 66.7 % |" in text
        assert "|  |  | UAR | 50.0 % |  | 50.0 % | >= 60 (MISSED) |" in text
        # The predictions it wrote are scored the same by themselves.
        [path] = tmp_path.glob("fake*/inference_mine.jsonl")
        again = score_verb.run([path])
        assert [line.figure for line in again.scores[0].lines] == [
            line.figure for score in report.scores for line in score.lines
        ]
        shutil.rmtree(data / "mine")
        write_lists(data, {"ave/test": [ave("a")]})
        assert "mine" in verb.run(None, data, [], out=tmp_path).absent
    finally:
        tasks.unregister("mine")


Published = namedtuple("Published", "dataset figure value source")


def declared(name, published):
    """A task that declares what was published, whatever the others have."""
    values = {field.name: getattr(tasks.get("ave"), field.name) for field in dataclasses.fields(tasks.Task)}
    task = tasks.Task(**{**values, "name": name, "bars": {}})
    object.__setattr__(task, "published", published)
    return task


def test_published_figures_stand_beside_the_measured_ones(tmp_path, monkeypatch, data):
    known = (
        Published("AVE", "Segment-accuracy", 83.58, "paper"),
        Published("AVE", "not stated", 59.4, "paper"),
    )
    for name in ("mine", "theirs"):
        tasks.register(declared(name, known))
    try:
        write_lists(data, {"mine/test": [ave("a")], "mine/test_unseen": [ave("a")]})
        install(monkeypatch, FakeModel(say_dog))
        report = verb.run(None, data, ["mine", "theirs"], out=tmp_path)
        text = results_table.markdown(report)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert rows[2].startswith("| mine | test | segment accuracy | 100.0 % | 83.58 % | 100.0 % |")
        assert rows[3].startswith("|  |  | AVE: not stated |  | 59.40 % |  |")
        # The official list's figure isn't the other list's.
        assert rows[4].startswith("| mine | test_unseen | segment accuracy | 100.0 % |  | 100.0 % |")
        # Absent, but what there is to reach is shown.
        assert rows[5].startswith("| theirs | absent | AVE: Segment-accuracy |  | 83.58 % |")
        assert rows[6].startswith("|  |  | AVE: not stated |  | 59.40 % |")
        assert "published: the authors' figures on the data sets' own test lists" in text
        assert report.to_json()["lists"][0]["figures"][0]["published"] == 83.58
    finally:
        tasks.unregister("mine")
        tasks.unregister("theirs")


def test_absent_data_sets_are_shown(data, model, tmp_path):
    report = verb.run(None, data, ["ave", "avcap"], out=tmp_path)
    assert report.absent == ["avcap"]
    assert "| avcap | absent |" in results_table.markdown(report)
    console = Console(width=160, record=True)
    results_table.show(report, console)
    assert "absent" in console.export_text()


def test_the_baselines_of_a_list_take_one_line(data, model, tmp_path):
    report = verb.run(None, data, ["avqa", "arig"], out=tmp_path)
    notes = [note for note in results_table._notes(report) if "baseline" in note]
    assert notes == [
        "avqa test: baseline is the majority answer per type (2, no)",
        "arig test: baseline is the majority class (dog); best constant box (0,0)(112,112)",
        "arig test_unseen: baseline is the majority class (cat); best constant box (0,0)(112,112)",
    ]


# Masks


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(verb.evaluate)
    runner = CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


def test_without_data_the_verb_says_how_to_render(command):
    assert command("--render", 40).stdout == "crab-edge scenes render --out AVUIE_2 --count 40\n"
    result = command()
    assert isinstance(result.exception, InputError)
    assert "crab-edge scenes render --out AVUIE_2 --count 300" in str(result.exception)


def test_table_markdown_and_json(command, data, model, tmp_path):
    options = ("--data", data, "--out", tmp_path / "out", "--task", "ave,arig")
    result = command(*options, "--markdown", tmp_path / "table.md")
    assert result.exit_code == 0
    assert "segment accuracy" in result.stdout and "scenes of ave test: objects" in result.stdout
    text = (tmp_path / "table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| ave | test |"))
    assert row.startswith("| ave | test | segment accuracy | 66.7 % |")
    assert "| 66.7 % | >= 60 (met) | 3 | 2 | 0.0 % |" in row
    assert "best constant box (0,0)(112,112)" in text
    found = json.loads(command(*options, "--json").stdout)
    assert found["bundle"] == "fake/w4@0123"
    assert [entry["task"] for entry in found["lists"]] == ["ave", "arig", "arig"]
    assert found["lists"][0]["figures"][0]["met"] is True


def test_check_fails_below_a_bar(command, data, model, tmp_path):
    result = command(*("--data", data, "--out", tmp_path / "out", "--task", "arig", "--check"))
    assert isinstance(result.exception, CheckError) and result.exception.exit_code == 3
    expected = "arig test: cIoU (share IoU >= 0.5) is 100.0 %, expected >= 40, baseline + 25"
    assert str(result.exception) == expected
    options = ("--data", data, "--out", tmp_path / "out", "--task", "ave", "--check")
    assert command(*options).exit_code == 0


def test_check_fails_for_a_loss_against_the_other_bundle(command, data, monkeypatch, tmp_path):
    install(monkeypatch, FakeModel(lambda *asked: ""), FakeModel(say_dog, "fake/float@9"))
    result = command(*("--data", data, "--out", tmp_path, "--task", "ave", "--against", "float", "--check"))
    assert isinstance(result.exception, CheckError)
    expected = "fake/w4@0123 loses 66.67 points against fake/float@9, expected at most 1"
    assert str(result.exception) == expected


def test_scene_mix_of_several_kinds_of_values():
    scenes = [{"sides": [0.2 + 0.01 * i, 0.5], "class": f"c{i}", "n": i % 2, "odd": None} for i in range(20)]
    mix = results_table.scene_mix([*({"scene": scene} for scene in scenes), {"vid": "no scene"}])
    assert mix == ["sides: 0.2 to 0.5, median 0.5", "class: 20 different", "n: 0 50 %, 1 50 %"]
    assert results_table.scene_mix([{}]) == []


def test_the_table_fits_a_narrow_terminal(data, model, tmp_path):
    report = verb.run(None, data, ["ave"], out=tmp_path)
    console = Console(width=80, record=True)
    results_table.show(report, console)
    assert all(len(line) <= 80 for line in console.export_text().splitlines() if "│" in line)
