"""`crab-edge evaluate` with a model that answers from a script: tables, resuming, failures, comparisons."""

import dataclasses
import json
import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from crab_edge_apps import _predictions as predictions
from crab_edge_apps import _results_table as results_table
from crab_edge_apps import evaluate as verb
from crab_edge_apps import score as score_verb
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import crab_edge
from crab_edge import masks, tasks
from crab_edge.errors import CheckError, DependencyError, EngineError, InputError, MediaError, TaskError
from crab_edge.results import Answer, Box, Choice, Event, MaskFile, Points, Timings, Unparsed
from crab_edge.tasks import Bar, MediaContext


class FakeModel:
    """Answers with `say(clip's name, task, question)`; a clip called bad can't be opened."""

    def __init__(self, say, identity="fake/w4@0123"):
        self.say = say
        self.bundle = SimpleNamespace(identity=identity)
        self.asked = []
        self.opened = []
        self.duration_s = 10.0
        self.windows = 1

    def open(self, *media, kinds=None):
        assert {Path(path) for path in media} == set(kinds)
        self.opened.append([kinds[path] for path in media])
        name = Path(media[0]).stem
        if name == "bad":
            raise MediaError(f"{media[0]}: truncated")
        return SimpleNamespace(
            clip=SimpleNamespace(duration_s=self.duration_s, windows=lambda: [None] * self.windows),
            ask=lambda question, task, frame=None: self._ask(name, question, task),
        )

    def _ask(self, name, question, task):
        self.asked.append((name, task, question))
        raw = self.say(name, task, question)
        parsed = tasks.get(task).parse(raw, MediaContext(duration_s=self.duration_s))
        return Answer(task, raw, parsed, Timings())


def ave(name, label="dog", **more):
    return {"event": label, "vid": name, "start_time": 0, "end_time": 10, **more}


def write_lists(data, lists):
    for place, records in lists.items():
        folder = data / place.split("/")[0]
        for kind in ("video", "audio", "image"):
            (folder / kind).mkdir(parents=True, exist_ok=True)
        for record in records:
            name = record.get("vid", "x")
            for file in (f"video/{name}.mp4", f"audio/{name}.wav", f"image/{name}.png"):
                (folder / file).write_bytes(b"")
        (data / f"{place}.json").write_text(json.dumps(records))
    return data


def arig(name, label="dog"):
    media = {"visual_path": f"image/{name}.png", "audio_path": f"{name}.wav"}
    return {**media, "vid": name, "a_obj": label, "top_left": [0, 0], "bottom_right": [112, 112]}


def avqa(name, question, answer, kind):
    return {"video_id": name, "vid": name, "question": question, "answer": answer, "type": kind}


def say_dog(name, task, question):
    if task == "arig":
        return "The sounding object is dog. Its coordinates are <obj>(0,0)(112,100)</obj>."
    if task == "avqa":
        return "<answer>yes</answer>"
    return "<event>dog, (0 10)</event>"


@pytest.fixture
def data(tmp_path):
    existential = '["Audio-Visual", "Existential"]'
    lists = {
        "ave/test": [
            ave("a", scene={"objects": 1, "silent": False}),
            ave("b", scene={"objects": 2, "silent": True}),
            ave("c", "cat", scene={"objects": 1, "silent": True}),
        ],
        "arig/test": [arig("a"), arig("b")],
        "arig/test_unseen": [arig("c"), arig("d", "cat")],
        "avqa/test": [
            avqa("a", "Is there a dog?", "yes", existential),
            avqa("a", "Is there a cat?", "no", existential),
            avqa("a", "How many?", "two", '["Audio", "Counting"]'),
        ],
    }
    return write_lists(tmp_path / "AVUIE_2", lists)


@pytest.fixture
def model(monkeypatch):
    return install(monkeypatch, FakeModel(say_dog))


def install(monkeypatch, *models):
    waiting = list(models)
    loaded = []

    def load(bundle=None, engine="auto"):
        loaded.append(bundle)
        return waiting[len(loaded) - 1] if len(loaded) <= len(waiting) else waiting[-1]

    monkeypatch.setattr(crab_edge, "load", load, raising=False)
    models[0].loaded = loaded
    return models[0]


def lines_of(report):
    return {(s.task, s.split, line.figure.name): line for s in report.scores for line in s.lines}


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
    folder = tmp_path / "out" / "fake_w4@0123"
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
    path = tmp_path / "fake_w4@0123" / "inference_ave.jsonl"
    with path.open("a") as file:
        file.write('{"vid": "b", "predict": "<ev')  # the kill came in the middle of a line
    model = install(monkeypatch, FakeModel(say_dog))
    report = verb.run(None, data, ["ave"], out=tmp_path)
    assert [name for name, _, _ in model.asked] == ["b", "c"]
    assert [json.loads(line)["vid"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert report.scores[0].n == 3
    verb.run(None, data, ["ave"], out=tmp_path)
    assert len(model.asked) == 2


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
    rows = (tmp_path / "fake_w4@0123" / "inference_ave.jsonl").read_text().splitlines()
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
    row = json.loads((tmp_path / "fake_w4@0123" / "inference_ave.jsonl").read_text())
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

SEEN = "[10,10,100,100] [50,50]"


def outlines(text, context):
    """Box and point of "[x1,y1,x2,y2] [x,y]"."""
    numbers = [int(number) for number in re.findall(r"\d+", text)]
    if len(numbers) != 6:
        return (Unparsed("no box and point"),)
    return (Box("dog", *numbers[:4]), Points("dog", (tuple(numbers[4:]),)))


@pytest.fixture
def mask_task():
    yield tasks.register(
        dataclasses.replace(
            tasks.get("arig"),
            name="cut_out",
            parse=outlines,
            render=lambda results, context=None: SEEN,
            truth=lambda record: (MaskFile("dog", Path(record["mask"])),),
            metric="avs",
            bars={},
        )
    )
    tasks.unregister("cut_out")


@pytest.fixture
def mask_data(tmp_path):
    """Three pictures of a red square on green, [20, 80) in both directions of 224, stored at 112 and 224."""
    names = {"a": 224, "b": 112, "c": 224}
    records = [
        {
            "vid": name,
            "visual_path": f"image/{name}.png",
            "audio_path": f"{name}.wav",
            "mask": f"mask/{name}.png",
        }
        for name in names
    ]
    data = write_lists(tmp_path / "AVUIE_2", {"cut_out/test": records})
    (data / "cut_out" / "mask").mkdir()
    for name, side in names.items():
        inside = np.zeros((224, 224), bool)
        inside[20:80, 20:80] = True
        picture = np.where(inside[:, :, None], (200, 20, 20), (20, 120, 30)).astype(np.uint8)
        Image.fromarray(picture).resize((side, side), 0).save(data / "cut_out" / "image" / f"{name}.png")
        Image.fromarray(inside.astype(np.uint8) * 255).save(data / "cut_out" / "mask" / f"{name}.png")
    return data


def test_masks_are_made_and_compared(mask_task, mask_data, monkeypatch, tmp_path):
    pytest.importorskip("cv2")
    monkeypatch.delenv(masks.WEIGHTS_VARIABLE, raising=False)
    install(monkeypatch, FakeModel(lambda name, task, question: "nothing" if name == "c" else SEEN))
    report = verb.run(None, mask_data, ["cut_out"], out=tmp_path)
    found = {name: line.figure.value for (_, _, name), line in lines_of(report).items()}
    assert found["J (valid only)"] > 80
    assert found["J (invalid = 0)"] == pytest.approx(2 / 3 * found["J (valid only)"])
    assert report.scores[0].mask_tools == ("grabcut",)
    assert "cut_out test: masks made by grabcut" in results_table._notes(report)
    # The lines hold box and points alone, the pictures are found again in the data folder.
    [path] = tmp_path.glob("fake*/inference_cut_out.jsonl")
    again = score_verb.run([path], data=mask_data)
    assert [line.figure for line in again.scores[0].lines] == [line.figure for line in report.scores[0].lines]
    with pytest.raises(InputError, match="can't be read"):
        score_verb.run([path])


def test_masks_of_the_answer_are_kept(mask_task, mask_data, monkeypatch, tmp_path):
    full = masks.from_bits(np.ones((50, 60), bool), "dog", "sam2")

    class Cutter(FakeModel):
        def _ask(self, *asked):
            answer = super()._ask(*asked)
            return dataclasses.replace(answer, parsed=(*answer.parsed, full))

    monkeypatch.setattr(masks, "choose", lambda: ("sam2", None))
    install(monkeypatch, Cutter(lambda name, task, question: SEEN))
    report = verb.run(None, mask_data, ["cut_out"], out=tmp_path)
    assert report.scores[0].mask_tools == ("sam2",)
    value = lines_of(report)["cut_out", "test", "J (valid only)"].figure.value
    assert value == pytest.approx(100 * 60 * 60 / 224**2)
    [path] = tmp_path.glob("fake*/inference_cut_out.jsonl")
    row = json.loads(path.read_text().splitlines()[0])
    assert row["crab_edge"]["masks"] == [{"type": "mask", **dataclasses.asdict(full), "counts": [0, 3000]}]
    # Nothing has to be segmented again, so that no tool and no pictures are needed.
    monkeypatch.setattr(masks, "choose", lambda: pytest.fail("no mask is to be made"))
    assert score_verb.run([path], data=mask_data).scores[0].lines[0].figure.value == pytest.approx(value)


def test_masks_that_cant_be_made_stop_the_run_before_it_begins(mask_task, mask_data, model, monkeypatch):
    def missing():
        raise DependencyError("masks need OpenCV")

    monkeypatch.setattr(masks, "choose", missing)
    with pytest.raises(DependencyError):
        verb.run(None, mask_data, ["cut_out"])
    assert not model.opened


# The verb


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
