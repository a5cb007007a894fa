"""The sinks: what they hold equals the rows, names can't collide, hostile text can't do harm."""

import csv
import io
import json
import os
import threading

import numpy as np
import pytest
from crab_edge_apps._sinks import NAMES, open_sinks, to_csv, to_srt, to_vtt
from crab_edge_apps._sinks.files import file_name, safe
from PIL import Image

from crab_edge.bundle import file_sha256
from crab_edge.clip import Clip
from crab_edge.errors import CrabError, InputError
from crab_edge.results import Answer, Event, Timings
from tests import media

EVENT = {"type": "event", "label": "dog", "start_s": 1.5, "end_s": 3661.0, "modality": "audio"}


def row(path="a.mp4", task="ave", parsed=(EVENT,), **more):
    content = {"version": 3, "media": [str(path)], "sha256": "ab" * 32, "duration_s": 10.0, "bundle": "nano"}
    return content | {"task": task, "question": None, "raw": "text", "parsed": list(parsed)} | more


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_csv_has_a_line_for_each_result():
    box = {"type": "box", "label": "cat", "x1": 1.5, "y1": 2, "x2": 3, "y2": 4}
    mask = {"type": "mask", "label": "", "height": 1, "width": 3, "counts": [1, 2], "source": "grabcut"}
    points = {"type": "points", "label": "", "xy": [[1, 2.5], [3, 4]]}
    texts = [
        {"type": "choice", "value": "yes"},
        {"type": "caption", "text": "a dog"},
        {"type": "unparsed", "reason": "no"},
    ]
    found = read(to_csv([row(parsed=[EVENT, box, mask, points, *texts])]))
    assert [line["type"] for line in found] == "event box mask points choice caption unparsed".split()
    assert {line["media"] for line in found} == {"a.mp4"} and {line["raw"] for line in found} == {"text"}
    assert (found[0]["label"], found[0]["start_s"], found[0]["end_s"]) == ("dog", "1.5", "3661.0")
    assert [found[1][name] for name in ("x1", "y1", "x2", "y2")] == ["1.5", "2", "3", "4"]
    assert json.loads(found[2]["mask"]) == {"size": [1, 3], "counts": [1, 2], "source": "grabcut"}
    assert found[3]["points"] == "1 2.5; 3 4"
    assert [line["text"] for line in found[4:]] == ["yes", "a dog", "no"]


def test_csv_of_error_rows_of_empty_rows_and_of_answers():
    bad = row(parsed=(), error={"type": "MediaError", "message": "gone"})
    answer = Answer("ave", "raw", (Event("dog", 0, 1, "visual"),), Timings())
    lines = read(to_csv([bad, row(parsed=()), answer]))
    assert [line["error"] for line in lines] == ["MediaError: gone", "", ""]
    assert [line["label"] for line in lines] == ["", "", "dog"] and lines[2]["media"] == ""
    assert read(to_csv([])) == []


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", " =", "\n="])
def test_csv_runs_no_formula(start):
    hostile = f"{start}cmd|' /C calc'!A0"
    (line,) = read(to_csv([row(path=hostile, parsed=[EVENT | {"label": hostile}], raw=hostile)]))
    for name in ("media", "label", "raw"):
        assert line[name].startswith("'") or line[name][0] == "\\", line[name]
        assert "calc" in line[name]
    (line,) = read(to_csv([row(parsed=[EVENT | {"label": 'a,"b"\nc\x00\ud800'}])]))
    assert line["label"] == 'a,"b"\nc\\x00\\ud800'


def test_subtitles():
    events = [
        Event("cat", 4.0, 5.0, "visual"),
        Event("dog & co", 0.0004, 2.5, "audio-visual"),
        Event("", 3.0, 3.0, "audio"),
    ]
    assert to_srt([*events, {"type": "choice", "value": "x"}]) == (
        "1\n00:00:00,000 --> 00:00:02,500\ndog & co\n\n"
        "2\n00:00:03,000 --> 00:00:03,001\n(unnamed) (heard)\n\n"
        "3\n00:00:04,000 --> 00:00:05,000\ncat (seen)\n\n"
    )
    assert to_vtt(events[1:2]) == "WEBVTT\n\n00:00:00.000 --> 00:00:02.500\ndog &amp; co\n\n"
    twice = [Event("dog", 1, 2, way) for way in ("visual", "audio", "visual")]
    assert to_srt(twice) == "1\n00:00:01,000 --> 00:00:02,000\ndog\n\n"
    assert "01:01:01,000" in to_srt([EVENT]) and to_srt([]) == "" and to_vtt([]) == "WEBVTT\n\n"


@pytest.mark.parametrize(
    "label", ["a --> b", "<script>x</script>", "one\n\n2\n00:00", "{\\an8}up", "\x1b[2J"]
)
def test_subtitles_take_hostile_labels_as_text(label):
    for text, first in (
        (to_srt([EVENT | {"label": label}]), "1"),
        (to_vtt([EVENT | {"label": label}]), "WEBVTT"),
    ):
        lines = text.split("\n")
        assert (
            lines[0] == first
            and text.count("-->") == 1
            and text.count("\n\n") == text.strip().count("\n\n") + 1
        )
        assert not {"<", "\x1b"} & set(text) and (first != "1" or "{" not in text)


def test_names_are_safe_short_and_different():
    hostile = row(path="/x/" + "é" * 200 + ".mp4")
    assert len(os.fsencode(file_name(hostile, ".srt"))) < 120
    assert safe("../..") == "_" and safe("-rf ~") == "rf ~" and safe('a<b>:"c|d?*') == "a_b___c_d__"
    assert "/" not in safe("a/b\\c\n") and safe("") == "_" and safe("\udcff.") == "_"
    ways = [
        row(),
        row(task="avvp"),
        row(question="q"),
        row(bundle="b"),
        row(sha256="cd" * 32),
        row(grammar=True),
    ]
    assert len({file_name(one, "") for one in ways}) == len(ways)
    assert file_name(row("x/a.mp4"), "") == file_name(row("y/a.mp4"), "").replace("y", "x")


@pytest.fixture
def clip(tmp_path):
    return media.video(tmp_path / "clip.mp4", seconds=1, fps=4)


def test_sinks_hold_what_they_are_given(tmp_path, clip):
    rows = [
        row(clip, sha256=file_sha256(clip)),
        row(clip, "avqa", [{"type": "choice", "value": "yes"}], question="q", sha256=file_sha256(clip)),
        row(clip, "avcap", (), error={"type": "MediaError", "message": "gone"}),
    ]
    out = tmp_path / "out"
    with open_sinks(NAMES, out) as sinks, Clip.open([clip]) as opened:
        sinks.rebuild([])
        for one in rows:
            sinks.add(one, opened)
    assert (out / "rows.csv").read_text() == to_csv(rows).replace("\r\n", "\n")
    assert (out / "rows.csv").read_bytes() == to_csv(rows).encode()
    names = [name for name in files(out) if name != "rows.csv"]
    assert [name.split("/")[0] + name[-4:] for name in names] == [
        "srt.srt",
        "video.mp4",
        "video.mp4",
        "vtt.vtt",
    ]
    again = tmp_path / "again"
    with open_sinks(NAMES, again) as sinks:
        sinks.rebuild(rows)
    assert files(again) == files(out)
    for name in files(out):
        if not name.endswith(".mp4"):
            assert (again / name).read_bytes() == (out / name).read_bytes()


def test_a_resumed_run_makes_them_whole(tmp_path, clip):
    """Killed between a row and its sinks, within the CSV, with half a file left: `rebuild` mends it."""
    rows = [row(clip, task, sha256=file_sha256(clip)) for task in ("ave", "avvp", "unav")]
    out = tmp_path / "out"
    with open_sinks(NAMES, out) as sinks:
        sinks.rebuild(rows)
    whole = {name: (out / name).read_bytes() for name in files(out)}
    stamps = {path: path.stat().st_mtime_ns for path in (out / "video").iterdir()}
    (out / "rows.csv").write_bytes(whole["rows.csv"][:100] + b"\nextra,line\n")
    for name in list(whole)[1:3]:
        (out / name).unlink()
    (out / "srt" / ".crab-edge-x.part").write_bytes(b"half")
    with open_sinks(NAMES, out) as sinks:
        sinks.rebuild(iter(rows))
    assert set(files(out)) == set(whole)
    assert all((out / name).read_bytes() == whole[name] for name in whole if not name.endswith(".mp4"))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "none is drawn twice"


def test_pictures_and_media_that_are_gone(tmp_path):
    picture, sound = media.picture(tmp_path / "p.png", width=100, height=80), media.sound(tmp_path / "s.wav")
    box = {"type": "box", "label": "dog", "x1": 10, "y1": 30, "x2": 60, "y2": 70}
    notices = []
    with open_sinks(["video"], tmp_path / "out", notice=notices.append) as sinks:
        with Clip.open([picture, sound]) as both:
            sinks.add(row(picture, "arig", [box]), both)
        sinks.add(row(sound, "ave", sha256=file_sha256(sound)), None)
        assert not notices
        sinks.add(row(tmp_path / "gone.mp4"), None)
        sinks.add(row(picture, "s4", [box], sha256="0" * 64), None)
    (name,) = files(tmp_path / "out")
    drawn = np.asarray(Image.open(tmp_path / "out" / name).convert("RGB"))
    assert name.endswith(".arig.png") and drawn.shape == (80, 100, 3)
    assert (drawn != np.asarray(Image.open(picture).convert("RGB")))[30:70, 10:14].any()
    assert ["no such file" in notices[0], "changed since" in notices[1], len(notices)] == [True, True, 2]


def test_the_model_goes_on_while_videos_are_drawn(tmp_path, clip, monkeypatch):
    """Two may wait; the third waits until there is room, in the order they came."""
    began, go_on, order = threading.Event(), threading.Event(), []

    def draw(source, rows, out):
        began.set()
        assert go_on.wait(10)
        order.append(rows[0]["task"])
        out.touch()

    monkeypatch.setattr("crab_edge_apps._draw.annotate_video", draw)
    rows = [row(clip, task, sha256=file_sha256(clip)) for task in ("ave", "avvp", "unav")]
    with open_sinks(["video"], tmp_path) as sinks, Clip.open([clip]) as opened:
        sinks.add(rows[0], opened)
        sinks.add(rows[1], opened)
        assert began.wait(10) and not order
        third = threading.Thread(target=sinks.add, args=(rows[2], opened))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        go_on.set()
        third.join(10)
    assert order == ["ave", "avvp", "unav"] and len(files(tmp_path / "video")) == 3


def test_a_full_disk_while_drawing_ends_the_run(tmp_path, clip, monkeypatch):
    drawn = []

    def draw(source, rows, out):
        drawn.append(rows[0]["task"])
        raise CrabError(f"{out}: can't be written (No space left on device); make room")

    monkeypatch.setattr("crab_edge_apps._draw.annotate_video", draw)
    rows = [row(clip, task, sha256=file_sha256(clip)) for task in ("ave", "avvp", "unav", "avqa")]
    with pytest.raises(CrabError, match="No space left"), open_sinks(["video"], tmp_path) as sinks:
        for number, one in enumerate(rows):
            with Clip.open([clip]) as opened:
                sinks.add(one, opened)
            assert number < 3, "it is raised while the run goes on"
    with pytest.raises(CrabError, match="No space left"), open_sinks(["video"], tmp_path) as sinks:
        sinks.rebuild(rows[:1])  # or at the end
    assert drawn[-1] == "ave" and len(drawn) <= 4


def test_what_cannot_be_written_is_one_line(tmp_path, clip):
    with pytest.raises(InputError, match="unknown sink 'xml'; there are: csv, srt"):
        open_sinks(["csv", "xml"], tmp_path)
    (tmp_path / "out").write_bytes(b"a file")
    with pytest.raises(InputError, match="can't be made"), open_sinks(["csv"], tmp_path / "out") as sinks:
        sinks.rebuild([])


@pytest.mark.parametrize("name", ["csv", "srt"])
def test_a_full_disk_is_an_error_and_the_rest_stays(tmp_path, monkeypatch, name):
    with open_sinks([name], tmp_path) as sinks:
        sinks.rebuild([row()])
        before = {path: (tmp_path / path).read_bytes() for path in files(tmp_path)}

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("crab_edge_apps._sinks.files.tempfile.mkstemp", full)
        if name == "csv":
            monkeypatch.setattr("crab_edge_apps._sinks.table.lines", full)
        with pytest.raises(CrabError, match=r"No space left on device.*make room") as caught:
            sinks.add(row(task="avvp"))
        assert not isinstance(caught.value, InputError)
    assert {path: (tmp_path / path).read_bytes() for path in files(tmp_path)} == before
