"""`crab-edge analyze`: rows, error rows, going on after a stop, and what refuses to start."""

import json
import shutil

import jsonschema
import pytest

from crab_edge.batch import Request, find_media
from crab_edge.rows import schema
from tests import media

CAPTION = "a dog"


@pytest.fixture
def folder(tmp_path, clips):
    """Three clips in two folders, one broken, one that isn't media at all."""
    root = tmp_path / "in"
    (root / "deep" / ".hidden").mkdir(parents=True)
    shutil.copy(clips["av"], root / "b.mp4")
    shutil.copy(clips["mute"], root / "deep" / "a.mp4")
    media.truncated(clips["av"], root / "deep" / "broken.mp4")
    shutil.copy(clips["sound"], root / "no_suffix")
    shutil.copy(clips["sound"], root / "deep" / ".hidden" / "x.wav")
    (root / "notes.txt").write_text("not media")
    return root


def rows(out):
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_finds_media(folder, tmp_path):
    found = [path.relative_to(folder).as_posix() for path in find_media([folder])]
    assert found == ["b.mp4", "no_suffix", "deep/a.mp4", "deep/broken.mp4"]
    assert list(find_media([folder / "notes.txt"])) == [folder / "notes.txt"], "what is named is taken"
    assert list(find_media([tmp_path / "nowhere"])) == [tmp_path / "nowhere"]


def test_one_row_for_each_clip_and_task(cli, folder, tmp_path):
    out = tmp_path / "out"
    ran = cli("analyze", folder, "--task", "avcap,ave", "--out", out, answers_=CAPTION)
    assert ran.code == 0, ran.err
    validator = jsonschema.Draft202012Validator(schema())
    for row in rows(out):
        validator.validate(row)
    found = {(row["media"][0].split("/in/")[1], row["task"]): row for row in rows(out)}
    assert len(found) == len(rows(out)) == 8
    good = found["b.mp4", "avcap"]
    assert good["raw"] == CAPTION and good["parsed"] == [{"type": "caption", "text": CAPTION}]
    assert good["duration_s"] == pytest.approx(8, abs=0.1) and good["bundle"].startswith("fake/w4@")
    assert len(good["sha256"]) == 64 and good["version"] == 3 and good["engine"] == {"name": "fake"}
    broken = found["deep/broken.mp4", "ave"]["error"]
    assert (
        broken["type"] == "MediaError" and "broken.mp4" in broken["message"] and "\n" not in broken["message"]
    )
    assert found["deep/a.mp4", "ave"]["error"]["type"] == "TaskError"
    assert found["deep/a.mp4", "avcap"]["raw"] == CAPTION
    assert "4 files x 2 tasks" in ran.out and "2 x MediaError" in ran.out and "rows.jsonl" in ran.out


def test_tasks_of_one_recipe_share_prefix_and_encoders(cli, clips, tmp_path):
    cli("analyze", clips["av"], "--task", "avcap,ave,avvp", "--out", tmp_path, answers_=CAPTION)
    (engine,) = cli.engines
    assert len(engine.vision_calls) == len(engine.audio_calls) == 1


def test_a_second_run_adds_only_what_is_missing(cli, folder, tmp_path):
    out = tmp_path / "out"
    cli("analyze", folder / "b.mp4", "--task", "avcap", "--out", out, answers_=CAPTION)
    before = (out / "rows.jsonl").read_bytes()
    ran = cli("analyze", folder, "--task", "avcap", "--out", out)
    assert ran.code == 0 and "1 rows already there" in ran.out
    assert (out / "rows.jsonl").read_bytes().startswith(before) and len(rows(out)) == 4
    whole = (out / "rows.jsonl").read_bytes()
    ran = cli("analyze", folder, "--task", "avcap", "--out", out)
    assert ran.code == 0 and (out / "rows.jsonl").read_bytes() == whole
    assert cli.engines[-1].forwards == []


def test_a_row_cut_by_a_kill_is_written_again(cli, folder, tmp_path):
    out = tmp_path / "out"
    cli("analyze", folder, "--task", "avcap", "--out", out, answers_=CAPTION)
    path = out / "rows.jsonl"
    whole = path.read_bytes()
    for cut in (1, 30, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert cli("analyze", folder, "--task", "avcap", "--out", out).code == 0
        again = rows(out)
        assert sorted(row["media"] for row in again) == sorted(
            json.loads(x)["media"] for x in whole.splitlines()
        )
        assert [row.get("raw") for row in again] == [json.loads(x).get("raw") for x in whole.splitlines()]


def test_another_task_bundle_or_question_makes_new_rows(cli, clips, tmp_path):
    def run(*more):
        assert (
            cli("analyze", clips["av"], "--out", tmp_path, *more, answers_="<answer>yes</answer>").code == 0
        )
        return len(rows(tmp_path))

    assert run("--task", "avqa", "--question", "Is there a dog?") == 1
    assert run("--task", "avqa", "--question", "Is there a cat?") == 2
    assert run("--task", "avqa", "--question", "Is there a dog?") == 2
    assert run("--task", "ave", "--question", "Is there a cow?") == 3
    assert run("--task", "ave") == 3, "a question changes nothing for a task that takes none"


def test_a_copy_is_another_clip_and_a_moved_file_is_not(cli, clips, tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    shutil.copy(clips["av"], root / "a.mp4")
    shutil.copy(clips["av"], root / "b.mp4")
    for count in (2, 2):
        assert cli("analyze", root, "--task", "avcap", "--out", tmp_path, answers_=CAPTION).code == 0
        assert len(rows(tmp_path)) == count
    (root / "a.mp4").rename(root / "c.mp4")
    assert cli("analyze", root, "--task", "avcap", "--out", tmp_path).code == 0
    assert len(rows(tmp_path)) == 2
    shutil.copy(clips["av"], root / "d.mp4")
    assert cli("analyze", root, "--task", "avcap", "--out", tmp_path).code == 0
    assert [row["media"][0][-5:] for row in rows(tmp_path)] == ["a.mp4", "b.mp4", "d.mp4"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--task", "dance"], "unknown task 'dance'"),
        (["--task", "avqa"], "needs a question"),
        (["--task", ","], "at least one task"),
        (["--task", "avcap", "--bundle", "nowhere"], "nowhere"),
    ],
)
def test_refuses_before_it_starts(cli, clips, tmp_path, more, words):
    out = tmp_path / "out"
    ran = cli("analyze", clips["av"], "--out", out, *more)
    assert ran.code == 2 and words in ran.err and ran.err.count("\n") == 1
    assert not out.exists()


def test_nothing_to_read(cli, tmp_path, folder):
    (tmp_path / "empty").mkdir()
    ran = cli("analyze", tmp_path / "empty", "--task", "avcap", "--out", tmp_path / "out")
    assert ran.code == 2 and "no media files" in ran.err
    ran = cli(
        "analyze", tmp_path / "gone.mp4", folder / "notes.txt", "--task", "avcap", "--out", tmp_path / "out"
    )
    assert ran.code == 2 and "none of the 2 files could be read" in ran.err
    whole = (tmp_path / "out" / "rows.jsonl").read_bytes()
    for more in ([], ["--retry-errors"]):
        ran = cli(
            *("analyze", tmp_path / "gone.mp4", folder / "notes.txt", *more),
            *("--task", "avcap", "--out", tmp_path / "out"),
        )
        assert ran.code == 2 and "none of the 2 files could be read" in ran.err, "every time"
        assert (tmp_path / "out" / "rows.jsonl").read_bytes() == whole
    assert [row["error"]["type"] for row in rows(tmp_path / "out")] == ["MediaError"] * 2
    assert "gone.mp4" in rows(tmp_path / "out")[0]["error"]["message"]
    options = ["--task", "avcap", "--out", tmp_path / "out"]
    for _ in range(2):
        ran = cli("analyze", tmp_path / "gone.mp4", folder / "b.mp4", *options, answers_=CAPTION)
        assert ran.code == 0, ran.err


def test_a_file_that_could_be_opened_counts(cli, clips, tmp_path):
    """Its task doesn't apply: an error row, but no mistyped path."""
    for _ in range(2):
        ran = cli("analyze", clips["mute"], "--task", "ave", "--out", tmp_path)
        assert ran.code == 0 and "error" in rows(tmp_path)[0], ran.err


def test_two_runs_do_not_share_an_output(cli, clips, tmp_path):
    from crab_edge_apps._rows import RowFile

    with RowFile(tmp_path, bundle="b", engine={}, request=Request(("avcap",))):
        ran = cli("analyze", clips["av"], "--task", "avcap", "--out", tmp_path)
    assert ran.code == 2 and "another run" in ran.err


def test_a_file_that_is_not_ours_is_left_alone(cli, clips, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"my": "data"}\n')
    ran = cli("analyze", clips["av"], "--task", "avcap", "--out", tmp_path)
    assert ran.code == 2 and "line 1" in ran.err
    assert (tmp_path / "rows.jsonl").read_text() == '{"my": "data"}\n'


def test_one_failing_answer_costs_one_row(cli, clips, tmp_path, monkeypatch):
    from crab_edge.session import Session

    real = Session._window

    def window(self, asked, *rest):
        if asked.task.name == "ave":
            raise RuntimeError("no luck")
        return real(self, asked, *rest)

    monkeypatch.setattr(Session, "_window", window)
    ran = cli("analyze", clips["av"], "--task", "avcap,ave,avvp", "--out", tmp_path, answers_=CAPTION)
    assert ran.code == 0
    assert [row.get("error", {}).get("type") for row in rows(tmp_path)] == [None, "RuntimeError", None]


def test_python_api_is_lazy(fake_bundle, clips):
    import crab_edge
    from crab_edge.errors import TaskError
    from tests.fake_bundle import FakeEngine

    model = crab_edge.load(fake_bundle, FakeEngine(crab_edge.session.Bundle.open(fake_bundle), CAPTION))
    with pytest.raises(TaskError, match="unknown task"):
        model.analyze([clips["av"]], ["dance"])
    found = model.analyze([clips["av"]] * 50, ["avcap"])
    assert next(found).answer.raw == CAPTION
    assert next(found).answer.raw == CAPTION
    found.close()


def test_annotated_videos_of_a_run_are_no_clips(tmp_path):
    from crab_edge_apps.analyze import _Files

    (tmp_path / "results" / "video").mkdir(parents=True)
    for name in ("clip.mp4", "results/video/clip.12345678.ave.mp4"):
        (tmp_path / name).write_bytes(b"\0\0\0\x18ftypmp42")
    found = _Files([str(tmp_path)], [], tmp_path / "results").listed()
    assert [path.name for path in found] == ["clip.mp4"]
    assert len(_Files([str(tmp_path)], [], tmp_path / "elsewhere").listed()) == 2
