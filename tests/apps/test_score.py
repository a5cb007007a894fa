"""`crab-edge score`: lines as Crab+'s inference writes them, and as others might."""

import json

import numpy as np
import pytest
import typer
from crab_edge_apps import _official as official
from crab_edge_apps import _results_table as results_table
from crab_edge_apps import score as verb
from PIL import Image
from typer.testing import CliRunner

from crab_edge import tasks
from crab_edge.errors import InputError, TaskError
from crab_edge.results import Box, Choice, Event


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def figures(report):
    return {line.figure.name: line.figure.value for score in report.scores for line in score.lines}


AVE = "Therefore, the events and time range are <event>dog, (0 5)</event>"


def test_lines_with_the_records_own_fields(tmp_path):
    rows = [{"event": "dog", "vid": "a", "start_time": 0, "end_time": 5, "predict": AVE}]
    rows += [{"event": "cat", "vid": "b", "start_time": 0, "end_time": 5, "predict": "woof"}]
    report = verb.run([write(tmp_path / "inference_ave.jsonl", rows)])
    # All ten segments of the first clip, the second's five of background.
    assert figures(report) == {"segment accuracy": 75.0}
    score = report.scores[0]
    assert (score.task, score.split, score.n, score.unparsable) == ("ave", "test", 2, 50.0)
    assert report.bundle == "inference_ave.jsonl" and score.seconds_per_sample == 0.0


def test_lines_of_crabs_inference(tmp_path):
    ave = [
        {"task_name": "ave", "output": f"event:{label} start_time:0 end_time:5", "predict": AVE}
        for label in ("dog", "dog", "Male speech, man speaking")
    ]
    report = verb.run([write(tmp_path / "predictions.jsonl", ave)])
    # Equal lines are two clips here: they hold nothing but the reference.
    assert report.scores[0].n == 3
    assert figures(report) == {"segment accuracy": pytest.approx(100 * (10 + 10 + 5) / 30)}

    said = "The sounding object is bus. Its coordinates are <obj>(0,0)(112,112)</obj>."
    arig = [
        {"task_name": "arig", "frame_path": f"/d/AVUIE_2/arig/{i}.jpg", "idx": i, "tot": 5, "output": out}
        | {"predict": said}
        for i, out in enumerate([said, said.replace("(0,0)(112,112)", "(1000,1000)(1000,1000)")])
    ]
    report = verb.run([write(tmp_path / "arig.jsonl", arig)])
    assert report.scores[0].n == 1 and figures(report)["cIoU (share IoU >= 0.5)"] == 100.0
    assert report.notes == ["arig: 1 records have nothing to find and aren't scored"]

    kind = '["Audio", "Counting"]'
    avqa = [
        {"vid": "v", "qid": i, "type": kind, "task_name": "avqa", "output": "two", "predict": text}
        for i, text in enumerate(["<answer>2</answer>", "<answer>three</answer>", "two"])
    ]
    report = verb.run([write(tmp_path / "avqa.jsonl", avqa)])
    assert figures(report)["audio counting"] == pytest.approx(100 / 3)

    heard = "<audio_event>Dog,(0 4)</audio_event>"
    avvp = [{"task_name": "avvp", "output": heard, "predict": heard}]
    assert figures(verb.run([write(tmp_path / "avvp.jsonl", avvp)]))["segment Type@AV"] == 100.0


def test_a_file_of_several_tasks(tmp_path):
    rows = [
        {"task_name": "avvp", "output": "<audio_event>Dog,(0 4)</audio_event>", "predict": ""},
        {"task_name": "ave", "output": "event:dog start_time:0 end_time:5", "predict": AVE},
    ]
    report = verb.run([write(tmp_path / "all.jsonl", rows)])
    assert [score.task for score in report.scores] == ["avvp", "ave"]


def test_a_second_run_appended_its_lines(tmp_path):
    row = {"event": "dog", "vid": "a", "start_time": 0, "end_time": 5}
    rows = [{**row, "predict": "woof"}, {**row, "vid": "b", "predict": "woof"}, {**row, "predict": AVE}]
    report = verb.run([write(tmp_path / "x.jsonl", rows)], "ave")
    assert report.scores[0].n == 2 and figures(report)["segment accuracy"] == 75.0
    assert report.notes == ["ave: 1 lines were said twice; the last one counts"]


def test_records_come_from_the_test_list(tmp_path):
    data = tmp_path / "AVUIE_2"
    (data / "ave").mkdir(parents=True)
    records = [
        {"event": "dog", "vid": name, "video_path": f"ave/video/{name}.mp4", "start_time": 0, "end_time": 5}
        for name in "abc"
    ]
    (data / "ave" / "test.json").write_text(json.dumps(records))
    rows = [
        {"vid": "a", "video_path": "/their/ave/video/a.mp4", "predict": AVE},
        {"vid": "b", "predict": "?"},
    ]
    path = write(tmp_path / "inference_ave.jsonl", rows)
    report = verb.run([path], data=data)
    assert report.scores[0].n == 2 and figures(report)["segment accuracy"] == 75.0
    assert report.notes == ["ave: 1 of the list's 3 records have no prediction"]
    with pytest.raises(InputError, match=r"line 1: a record lacks the field event; .* with --data"):
        verb.run([path])
    write(path, [{"vid": "z", "predict": AVE}])
    with pytest.raises(InputError, match="line 1: a record lacks the field event"):
        verb.run([path], data=data)


def test_fields_under_other_names():
    given = {"vid": "v", "qid": 3, "image_path": "x/1.jpg", "idx": 2, "output": "no", "predict": "yes"}
    fields = official.fields_of(given)
    assert (fields["video_id"], fields["question_id"], fields["frame_idx"]) == ("v", 3, 2)
    assert fields["visual_path"] == "x/1.jpg" and fields["answer"] == "no" and "predict" not in fields
    instruction = "Please answer the question based on the options: What?, options:['dog', 'cat']"
    assert official.fields_of({"instruction": instruction})["multi_choice"] == "['dog', 'cat']"
    assert official.fields_of({"answer": "kept", "output": "other"})["answer"] == "kept"


def test_truths_of_references():
    def truth(name, output):
        task = tasks.get(name)
        return official._truth(task, official.fields_of({"output": output}), official._Join(None, task, ""))[
            0
        ]

    assert truth("avqa", "Two") == (Choice("two"),)
    assert truth("ave", "event:dog start_time:1 end_time:3") == (Event("dog", 1, 3, "audio-visual"),)
    box = "The sounding object is bus. Its coordinates are <obj>(1,2)(30,40)</obj>."
    assert truth("arig", box) == (Box("bus", 1, 2, 30, 40),)
    with pytest.raises(InputError, match="--data"):
        truth("ave", "nothing like it")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"predict": "x"}\n{"vid": 1}\n', "line 2 has no field predict"),
        ('{"predict": "x"\n', "line 1 isn't JSON"),
        ("[1]\n", "line 1 has no field predict"),
        ("\n\n", "holds no predictions"),
        ('{"predict": "x"}\n', "line 1 doesn't say its task; name it with --task"),
    ],
)
def test_files_that_cant_be_read(tmp_path, text, said):
    path = tmp_path / "some.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        verb.run([path], "ave" if "task" not in said else None)


def test_wrong_arguments(tmp_path):
    with pytest.raises(InputError, match="can't be read"):
        verb.run([tmp_path / "none.jsonl"], "ave")
    path = write(tmp_path / "x.jsonl", [{"predict": "?"}])
    with pytest.raises(TaskError, match="unknown task 'ava'"):
        verb.run([path], "ava")
    with pytest.raises(InputError, match="no such folder"):
        verb.run([path], "ave", tmp_path / "nothing")


@pytest.mark.parametrize(
    ("file", "task", "split"),
    [("inference_ave.jsonl", "ave", "test"), ("inference_ave_unseen.jsonl", "ave", "test_unseen")],
)
def test_names_say_task_and_list(tmp_path, file, task, split):
    row = {"event": "dog", "vid": "a", "start_time": 0, "end_time": 5, "predict": AVE}
    [score] = verb.run([write(tmp_path / file, [row])]).scores
    assert (score.task, score.split) == (task, split)


def test_the_verb_prints_a_table(tmp_path):
    app = typer.Typer()
    app.command()(verb.score)
    row = {"event": "dog", "vid": "a", "start_time": 0, "end_time": 5, "predict": AVE}
    path = write(tmp_path / "inference_ave.jsonl", [row])
    result = CliRunner().invoke(app, [str(path), "--markdown", str(tmp_path / "t.md")])
    assert result.exit_code == 0 and "segment accuracy" in result.stdout
    last = next(line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| ave"))
    # Nobody took the time.
    assert last.endswith("| 0.0 % |  |")
    found = json.loads(CliRunner().invoke(app, [str(path), "--json"]).stdout)
    assert found["bundle"] == "inference_ave.jsonl" and found["lists"][0]["n"] == 1


def test_files_keep_their_order_and_names(tmp_path):
    row = {"event": "dog", "vid": "a", "start_time": 0, "end_time": 5, "predict": AVE}
    paths = [write(tmp_path / f"{name}.jsonl", [row, row]) for name in "ba"]
    report = verb.run(paths, "ave")
    assert report.bundle == "b.jsonl, a.jsonl" and len(report.scores) == 2
    assert report.notes[0] == "b.jsonl ave: 1 lines were said twice; the last one counts"
    assert "segment accuracy" in results_table.markdown(report)


# What Crab+'s inference writes: its metadata, a right answer, and a figure that is then 100.
_THU = "Please answer the question based on the options: What is it?, options:['dog', 'cat', 'cow', 'bus']"
OFFICIAL = {
    "a2v": ({"output": "<answer>1</answer>."}, "The first. <answer>one</answer>", "accuracy"),
    "v2a": ({"output": "<answer>2</answer>."}, "<answer>2</answer>.", "accuracy"),
    "ks": ({"output": "<answer>playing violin</answer>"}, "<answer> playing violin </answer>", "accuracy"),
    "ucf": ({"output": "<answer>applyeyemakeup</answer>"}, "<answer>applyeyemakeup</answer>", "accuracy"),
    "meld": ({"output": "<answer>joy</answer>."}, "<answer>joy</answer>", "weighted F1"),
    "cremad": ({"output": "<answer>sad</answer>."}, "<answer>Sad</answer>", "accuracy"),
    "mafw": ({"output": "<answer>anger</answer>."}, "<answer>anger</answer>", "UAR"),
    "dfew": ({"output": "<answer>happy</answer>."}, "<answer>happy</answer>", "WAR"),
    "avqa": (
        {"vid": "1", "qid": 2, "type": '["Audio", "Counting"]', "output": "two"},
        "<answer>2</answer>",
        "audio",
    ),
    "avqa_thu": (
        {"vid": "1", "instruction": _THU, "name": "n", "type": "Which", "relation": "Both", "output": 1},
        "<answer>cat</answer>",
        "accuracy",
    ),
    "ave": ({"output": "event:dog start_time:0 end_time:5"}, AVE, "segment accuracy"),
    "avvp": (
        {"output": "<audio_event>Dog,(0 4)</audio_event>"},
        "<audio_event>Dog,(0 4)</audio_event>",
        "segment A",
    ),
    "arig": (
        {"frame_path": "/d/1.jpg", "idx": 1, "tot": 5}
        | {"output": "The sounding object is bus. Its coordinates are <obj>(9,9)(112,112)</obj>."},
        "The sounding object is bus. Its coordinates are <obj>(9,9)(112,112)</obj>.",
        "AUC",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_form_that_crabs_inference_writes(name, tmp_path):
    fields, text, figure = OFFICIAL[name]
    path = write(tmp_path / f"inference_{name}.jsonl", [{**fields, "task_name": name, "predict": text}])
    report = verb.run([path])
    assert report.scores[0].n == 1 and not report.notes and report.scores[0].unparsable == 0.0
    assert figures(report)[figure] == pytest.approx(100.0)


@pytest.mark.parametrize("name", ["s4", "ms3", "ref_avs"])
def test_masks_for_what_crabs_inference_writes(name, tmp_path):
    """The authors' paths lead to frames and masks in the folder given; the reference is no mask by itself."""
    pytest.importorskip("cv2")
    there = "test/v" if name != "ref_avs" else "media/v"
    inside = np.zeros((224, 224), bool)
    inside[20:80, 20:80] = True
    folder = tmp_path / "AVUIE_2" / name
    truth = f"{there}/labels_rgb/3.png" if name != "ref_avs" else "gt_mask/v/fid_7/00003.png"
    for place, picture in (
        (f"{there}/frames/3.jpg", np.where(inside[:, :, None], (200, 20, 20), (20, 120, 30))),
        (truth, np.where(inside[:, :, None], (0, 128, 0), 0)),
    ):
        (folder / place).parent.mkdir(parents=True)
        Image.fromarray(picture.astype(np.uint8)).save(folder / place)
    row = {"task_name": name, "image_path": f"/theirs/AVUIE_2/{name}/{there}/frames/3.jpg", "idx": 3}
    said = "The object making the sound in the video is dog. [15,15,90,90] [50,50],[40,40],[60,60]"
    row |= {"a_obj": "dog", "output": "The object making the sound in the video is dog."}
    rows = [{**row, "predict": said}, {**row, "idx": 4, "predict": "no idea"}]
    if name == "ref_avs":
        row |= {"vid": "v", "uid": "u", "fid": 7, "output": "the red square", "split": "test_s"}
        rows = [{**row, "predict": f"<answer>true</answer> {said}"}]
        rows.append({**row, "split": "test_n", "predict": "<answer>false</answer>"})
    report = verb.run([write(tmp_path / "p.jsonl", rows)], data=tmp_path / "AVUIE_2")
    found = figures(report)
    if name == "ref_avs":
        assert found["seen J (valid only)"] > 80 and found["null S, lower is better (valid only)"] == 0.0
        assert found["valid answers"] == 100.0
    else:
        assert found["J (valid only)"] > 80 and found["valid answers"] == 50.0
        assert found["J (invalid = 0)"] == pytest.approx(found["J (valid only)"] / 2)
    assert report.scores[0].mask_tools == ("grabcut",)
