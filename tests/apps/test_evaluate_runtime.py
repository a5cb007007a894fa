"""`evaluate` over real media and real sessions; only the engine's words are made up."""

import json

import pytest
from crab_edge_apps import evaluate as verb

import crab_edge
from crab_edge.bundle import Bundle
from crab_edge.session import Model
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

EVENTS = "Therefore, the events and time range are <event>dog, (0 4)</event>"
BOX = "The sounding object is dog. Its coordinates are <obj>(0,0)(112,112)</obj>."


@pytest.fixture
def data(tmp_path):
    """AVE: two four-second videos that carry a sound of their own beside the list's; ARIG: a wide still."""
    ave, arig = tmp_path / "AVUIE_2" / "ave", tmp_path / "AVUIE_2" / "arig"
    for folder in (ave / "video", ave / "audio", arig / "image", arig / "audio"):
        folder.mkdir(parents=True)
    for name in "ab":
        media.video(ave / "video" / f"{name}.mp4", seconds=4, fps=4)
        media.sound(ave / "audio" / f"{name}.wav", media.tone(4.0))
    records = [{"event": "dog", "vid": name, "start_time": 0, "end_time": 2} for name in "ab"]
    (ave / "test.json").write_text(json.dumps(records))
    media.picture(arig / "image" / "1.png", width=448, height=112)
    media.sound(arig / "audio" / "1.wav", media.tone(2.0))
    record = {"visual_path": "image/1.png", "audio_path": "audio/1.wav", "a_obj": "dog"}
    (arig / "test.json").write_text(json.dumps([{**record, "top_left": [0, 0], "bottom_right": [112, 112]}]))
    return tmp_path / "AVUIE_2"


def test_lists_run_through_real_sessions(data, monkeypatch, tmp_path):
    bundle = Bundle.open(write_fake_bundle(tmp_path / "bundle"))
    model = Model(bundle, FakeEngine(bundle, [BOX, EVENTS, EVENTS]))
    monkeypatch.setattr(crab_edge, "load", lambda bundle=None, engine="auto": model, raising=False)
    report = verb.run(None, data, [], out=tmp_path / "out")
    figures = {(s.task, line.figure.name): line.figure.value for s in report.scores for line in s.lines}
    assert [score.errors for score in report.scores] == [0, 0]
    # Four segments a clip, of which the answer "0 to 4 s" gets two.
    assert figures["ave", "segment accuracy"] == 50.0
    # Boxes are scored in the model's frame, whatever the picture's size.
    assert figures["arig", "cIoU (share IoU >= 0.5)"] == 100.0
    assert report.bundle == bundle.identity
    [folder] = (tmp_path / "out").iterdir()
    row = json.loads((folder / "inference_ave.jsonl").read_text().splitlines()[0])
    assert row["predict"] == EVENTS and row["crab_edge"]["duration_s"] == pytest.approx(4.0, abs=0.1)
