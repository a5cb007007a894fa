"""`crab-edge analyze`: what it takes, what makes a row another one, errors tried again, sinks, summary."""

import json
import shutil
import sys
import types
from pathlib import Path

import pytest
from crab_edge_apps._batch_progress import Figures, Progress

from crab_edge.errors import CrabError
from crab_edge.results import Answer, Timings
from crab_edge.rows import Row, RowError, read_rows
from tests import media

CAPTION = "a dog"


@pytest.fixture
def folder(tmp_path, clips, monkeypatch):
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for name in ("a.mp4", "b.mp4", "deep/c.mp4"):
        shutil.copy(clips["mute"], root / name)
    monkeypatch.chdir(tmp_path)
    return root


@pytest.fixture
def named(cli, tmp_path):
    """named(words...) -> names of the files whose rows a run into a new folder writes."""
    count = iter(range(100))

    def run(*words):
        out = tmp_path / f"out{next(count)}"
        ran = cli("analyze", *words, "--task", "avcap", "--out", out, answers_=CAPTION)
        assert ran.code == 0, ran.err
        return [Path(row["media"][0]).name for row in read_rows(out)]

    return run


def test_patterns_and_lists(named, folder, tmp_path):
    (tmp_path / "list.txt").write_text("in/b.mp4\nin/deep\n")
    assert named("in/*.mp4") == ["a.mp4", "b.mp4"] and named("in/**/*.mp4") == ["a.mp4", "b.mp4", "c.mp4"]
    assert named("@list.txt") == named("--list", "list.txt") == ["b.mp4", "c.mp4"]
    assert named("in/a.mp4", "--list", "list.txt", "in", "./in/a.mp4") == ["a.mp4", "b.mp4", "c.mp4"], (
        "each once"
    )


def test_a_list_on_standard_input(named, folder, monkeypatch):
    import io

    for word in (["-"], ["--list", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"in/deep/c.mp4\nin/a.mp4\n")))
        assert named(*word) == ["c.mp4", "a.mp4"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["in/*.xyz"], "no file matches"),
        (["@nowhere.txt"], "list can't be read"),
        (["--list", "nowhere.txt"], "list can't be read"),
        ([], "no media given"),
        (["in", "--stride", "11"], "a stride of 11 s: expected 1 to 10 s"),
        (["in", "--stride", "31", "--window", "30"], "a stride of 31 s: expected 1 to 30 s"),
        (["in", "--window", "61"], "windows of 61 s"),
        (["in", "--window", "nan"], "windows of nan s"),
        (["in", "--sink", "gif"], "unknown sink 'gif'"),
        (["in", "--workers", "2"], "--workers is for --ray"),
    ],
)
def test_wrong_words_write_nothing(cli, folder, tmp_path, sinks, words, says):
    ran = cli("analyze", *words, "--task", "avcap", "--out", tmp_path / "out")
    assert ran.code == 2 and says in ran.err and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_asked_otherwise_is_another_row(cli, clips, tmp_path):
    def count(*more):
        ran = cli("analyze", clips["av"], "--task", "avcap", "--out", tmp_path, *more, answers_=CAPTION)
        assert ran.code == 0, ran.err
        return len(list(read_rows(tmp_path)))

    assert count() == count("--stride", "10") == 1, "10 s is the default"
    assert count("--stride", "5") == 2 and count("--stride", "5") == 2
    assert count("--max-tokens", "3") == 3 and count() == 3
    assert [row["max_new_tokens"] for row in read_rows(tmp_path)] == [512, 512, 3]
    assert count("--window", "60") == 4 and count("--window", "60", "--stride", "60") == 4
    asked = [(row["window_s"], row["stride_s"]) for row in read_rows(tmp_path)]
    assert asked == [(10, 10), (10, 5), (10, 10), (60, 60)]


def test_rows_of_another_version_are_left_alone(cli, clips, tmp_path):
    old = '{"version": 2, "media": ["a"], "task": "ave"}\n'
    (tmp_path / "rows.jsonl").write_text(old)
    ran = cli("analyze", clips["av"], "--task", "avcap", "--out", tmp_path)
    assert ran.code == 2 and "row version 2, expected 3" in ran.err
    assert (tmp_path / "rows.jsonl").read_text() == old


def test_errors_count_as_done_until_they_are_retried(cli, clips, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    shutil.copy(clips["mute"], folder / "good.mp4")
    (folder / "bad.mp4").write_bytes(b"")
    media.truncated(clips["mute"], folder / "cut.mp4")

    def run(*more):
        ran = cli("analyze", folder, "--task", "avcap,ave", "--out", out, *more, answers_=CAPTION)
        assert ran.code == 0, ran.err
        return ran.out

    assert "1 answer, 5 errors" in run()  # `ave` needs sound
    lines = (out / "rows.jsonl").read_bytes()
    assert "0 answers, 0 errors, 6 rows already there" in run() and (out / "rows.jsonl").read_bytes() == lines
    shutil.copy(clips["mute"], folder / "cut.mp4")
    assert "1 answer, 4 errors, 1 rows already there" in run("--retry-errors")
    written = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    assert written == list(read_rows(out)) and len(written) == 6, "the old error rows are gone"
    found = {(Path(row["media"][0]).name, row["task"]): row for row in written}
    assert (
        found["cut.mp4", "avcap"]["raw"] == CAPTION
        and found["bad.mp4", "ave"]["error"]["type"] == "MediaError"
    )
    assert found["cut.mp4", "ave"]["sha256"] == found["good.mp4", "ave"]["sha256"]


class StandInSinks:
    """What `open_sinks` gives, for these tests: notes what it is told, in `calls`."""

    def __init__(self, names, out):
        self.names, self.rows, self.calls, self.fail = names, [], [], None
        self.path = out / "rows.jsonl"

    def __enter__(self):
        self.calls.append("enter")
        return self

    def __exit__(self, *_):
        self.calls.append("exit")

    def rebuild(self, rows):
        self.rows = [row["media"][0] for row in rows]
        self.calls.append(("rebuild", len(self.rows)))

    def add(self, row, clip):
        last = json.loads(self.path.read_text().splitlines()[-1])
        assert last == json.loads(json.dumps(row)), "the row is in the file first"
        assert ("error" in row) or clip.videos[0].width == 64
        if self.fail:
            raise self.fail
        self.rows.append(row["media"][0])
        self.calls.append("add")


@pytest.fixture
def sinks(monkeypatch):
    """The sinks that were opened, in order; `failing` makes the next one fail."""
    opened, failing = [], []

    def open_sinks(names, out, notice):
        opened.append(StandInSinks(list(names), out))
        opened[-1].fail = failing.pop() if failing else None
        return opened[-1]

    module = types.ModuleType("crab_edge_apps._sinks")
    module.NAMES, module.DRAWN = ("csv", "srt", "vtt", "video"), "video"
    module.open_sinks = open_sinks
    monkeypatch.setitem(sys.modules, "crab_edge_apps._sinks", module)
    return types.SimpleNamespace(opened=opened, failing=failing)


def test_sinks_get_every_row_after_it_is_written(cli, folder, tmp_path, sinks):
    (folder / "d.mp4").write_bytes(b"")
    words = ["analyze", folder, "--task", "avcap", "--out", tmp_path / "out"]
    assert cli(*words, "--sink", "csv,jsonl", "--sink", "srt", answers_=CAPTION).code == 0
    (first,) = sinks.opened
    assert first.names == ["csv", "srt"] and first.calls == ["enter", ("rebuild", 0), *["add"] * 4, "exit"]
    assert cli(*words, "--sink", "csv").code == 0
    assert sinks.opened[1].calls == ["enter", ("rebuild", 4), "exit"], "an older run's rows are rebuilt"
    assert cli(*words, "--sink", "csv", "--retry-errors").code == 0
    assert sinks.opened[2].calls == ["enter", ("rebuild", 4), "add", ("rebuild", 4), "exit"]
    assert sorted(sinks.opened[2].rows) == sorted(first.rows), "without the old error row"
    assert cli(*words).code == 0 and len(sinks.opened) == 3


def test_a_sink_that_fails_costs_no_row(cli, folder, tmp_path, sinks):
    sinks.failing.append(CrabError("rows.csv: can't be written (No space left on device); make room"))
    words = ["analyze", folder, "--task", "avcap", "--out", tmp_path / "out", "--sink", "csv"]
    ran = cli(*words, answers_=CAPTION)
    assert ran.code == 1 and "No space left" in ran.err and ran.err.count("\n") == 1
    assert len(list(read_rows(tmp_path / "out"))) == 1 and sinks.opened[0].calls[-1] == "exit"
    assert cli(*words).code == 0
    assert sinks.opened[1].calls == ["enter", ("rebuild", 1), "add", "add", "exit"]


def test_an_error_ends_the_watch(cli, folder, tmp_path, sinks):
    sinks.failing.append(CrabError("rows.csv: can't be written; make room"))
    words = ["analyze", folder, "--task", "avcap", "--out", tmp_path / "out", "--sink", "csv"]
    ran = cli(*words, "--watch", "--settle", "0", answers_=CAPTION)
    assert ran.code == 1 and "make room" in ran.err and len(list(read_rows(tmp_path / "out"))) == 1


def test_a_clip_is_open_while_the_sinks_see_it(cli, clips, tmp_path, sinks, monkeypatch):
    shapes = []
    monkeypatch.setattr(
        StandInSinks, "add", lambda self, row, clip: shapes.append(clip.videos[0].frames(2).shape)
    )
    assert cli("analyze", clips["av"], "--task", "avcap,ave", "--out", tmp_path, "--sink", "video").code == 0
    assert shapes == [(2, 224, 224, 3)] * 2


def test_another_producer_answers_the_same_list(cli, folder, tmp_path, fake_bundle, monkeypatch, sinks):
    """What stands behind --ray is told everything, its rows are written here, and it is closed."""
    import crab_edge_apps

    told = {}

    class Elsewhere:
        bundle, engine = "far/w4@0", {"name": "far"}

        def produce(self, files, request, skip, stop):
            for path in files:
                names = [name for name in request.tasks if not skip("1" * 64, str(path), name)]
                yield from ((answer(str(path), 3.0, name), None) for name in names)

        def close(self):
            told["closed"] = True

    module = types.ModuleType("crab_edge_apps._ray")
    module.connect = lambda address, **options: told.update(options, address=address) or Elsewhere()
    monkeypatch.setitem(sys.modules, "crab_edge_apps._ray", module)
    monkeypatch.setattr(crab_edge_apps, "_ray", module, raising=False)
    words = ["analyze", folder, "--task", "avcap,ave", "--out", tmp_path / "out", "--ray", "head:6379"]
    ran = cli(*words, "--workers", "3", "--threads", "2", "--no-grammar")
    assert ran.code == 0 and "6 answers" in ran.out
    options = {"engine": "auto", "threads": 2, "workers": 3, "bundle": fake_bundle}
    request = told.pop("request")
    assert request.tasks == ("avcap", "ave") and not request.grammar
    assert told == options | {"address": "head:6379", "closed": True}
    assert {row["engine"]["name"] for row in read_rows(tmp_path / "out")} == {"far"} and not cli.engines


def answer(path, seconds, task="avcap"):
    return Row((path,), task, "0" * 64, seconds, Answer(task, "x", (), Timings()))


def test_figures_and_the_time_that_is_left():
    now = [100.0]
    figures = Figures(10, 2, clock=lambda: now[0])
    assert figures.left_s() is None and figures.line() == "0/20 rows"
    figures.known += 8
    now[0] += 30
    for path, seconds in (("a", 1800.0), ("b", 1800.0)):
        for task in ("avcap", "ave"):
            figures.count(answer(path, seconds, task))
    figures.count(Row(("c",), "ave", None, error=RowError("MediaError", "no")))
    assert figures.done == 5 and figures.left_s() == pytest.approx(7 * 30 / 5)
    assert figures.line() == "13/20 rows, 1 error, 120.0 x real time, 42.0 s left"
    assert figures.summary([Path("out/rows.jsonl")]) == [
        "10 files x 2 tasks: 4 answers, 1 error, 8 rows already there",
        "  1 x MediaError",
        "2 clips, 1.00 hours of media in 30.0 s, 120.0 x real time",
        "rows: out/rows.jsonl",
    ]


def test_without_a_terminal_a_line_now_and_then(capsys):
    now = [0.0]
    figures = Figures(100, 1, clock=lambda: now[0])
    with Progress(figures) as progress:
        for number in range(100):
            now[0] += 1
            figures.count(answer(str(number), 2.0))
            progress.update("x")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == "30/100 rows, 2.0 x real time, 1 min left"


def test_on_a_terminal_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    figures = Figures(2, 1)
    with Progress(figures) as progress:
        figures.count(answer("a", 2.0))
        progress.update("[bold]\x1b[31ma\nb.mp4")
        progress.say("[note]")
    shown = capsys.readouterr().err
    assert "1/2 rows" in shown and "[note]" in shown and r"[bold]\x1b[31ma\nb.mp4" in shown
