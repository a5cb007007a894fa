"""Batches: one decode a clip, one prefix a media recipe, bounded reading ahead, flat memory, laziness."""

import gc
import pickle
import shutil
import threading
import weakref
from collections import Counter

import numpy as np
import pytest

from crab_edge.batch import LocalProducer, Request, identify
from crab_edge.bundle import Bundle
from crab_edge.clip import Clip
from crab_edge.errors import InputError, MediaError, TaskError
from crab_edge.media_audio import AudioTrack
from crab_edge.media_video import VideoTrack
from crab_edge.session import Model, Session
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

SAME_RECIPE = ["avcap", "ave", "avvp"]
QUESTION = "Is there a dog?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake"))


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    return {
        "av": media.video(folder / "av.mp4", seconds=8, fps=4),
        "mute": media.video(folder / "mute.mp4", seconds=3, fps=4, sound=False),
        "long": media.video(folder / "long.mp4", seconds=125, fps=1, width=32, height=32),
        "webm": media.video(folder / "a.webm", seconds=2, fps=4, sound=False),
        "still": media.picture(folder / "still.png"),
        "sound": media.sound(folder / "sound.wav", media.tone(1.0)),
    }


@pytest.fixture
def model(bundle):
    return Model(bundle, FakeEngine(bundle, "a dog"))


@pytest.fixture
def counted(monkeypatch):
    """How often files are hashed, frames converted, sound decoded, clips opened."""
    from crab_edge import batch, media_audio, media_video

    counts: Counter[str] = Counter()

    def count(owner, name, label):
        real = getattr(owner, name)

        def wrapped(*args, **kwargs):
            counts[label] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    count(media_video, "_picture", "frames")
    count(media_audio._SoundReader, "read", "sounds")
    count(media_audio._SoundReader, "_open", "sound files")
    count(Clip, "_add", "clips")
    count(batch, "file_sha256", "hashes")
    count(VideoTrack, "_load", "loads")
    return counts


def test_one_decode_and_one_prefix_for_tasks_of_one_recipe(model, clips, counted):
    found = list(model.analyze([clips["av"]], SAME_RECIPE, grammar=False))
    assert [row.answer.raw for row in found] == ["a dog"] * 3
    assert counted["clips"] == counted["hashes"] == counted["sounds"] == 1 and counted["frames"] == 10
    engine = model.engine
    assert len(engine.vision_calls) == len(engine.audio_calls) == 1
    assert [length for length, *_ in engine.forwards].count(0) == 1, "one prefix"
    assert [row.answer.timings.cached_tokens > 0 for row in found] == [False, True, True]


def test_each_recipe_has_one_prefix_and_all_share_the_decode(model, clips, counted):
    """Of a short clip, ten frames and all of the sound are one prefix, whichever recipe asks for them."""
    names = ["avcap", "meld", "ks", "dfew", "ave", "avqa"]
    found = list(model.analyze([clips["av"]], names, question=QUESTION))
    assert [row.task for row in found] == names and not any(row.error for row in found)
    assert counted["clips"] == counted["sounds"] == 1
    total = Clip.open([clips["av"]]).videos[0].n_frames
    wanted = {int(i) for n in (10, 4) for i in np.round(np.linspace(0, total - 1, n))}
    assert counted["frames"] == len(wanted), "no frame twice"
    assert [length for length, *_ in model.engine.forwards].count(0) == 2, "ten frames, four frames"
    assert len(model.engine.vision_calls) == len(model.engine.audio_calls) == 2


def test_a_long_clip_goes_once_through_its_sound(model, clips, counted):
    """Tasks share the windows, also where the sound is decoded window by window."""
    (caption, *_rest) = list(model.analyze([clips["long"]], SAME_RECIPE))
    assert len(caption.answer.parsed) == 13
    assert counted["sounds"] == 13 and counted["sound files"] <= 2
    assert counted["frames"] == 125 and len(model.engine.vision_calls) == 13


def test_overlapping_windows_go_once_through_the_sound(model, clips, counted):
    list(model.analyze([clips["long"]], SAME_RECIPE, stride_s=5))
    assert counted["sounds"] == len(Clip.open([clips["long"]]).windows(10, 5)) == 24
    assert counted["sound files"] <= 2 + 1


def test_longer_windows_reach_the_decoder_and_the_model(model, clips, counted):
    """125 s in windows of 40 s, one every 30 s."""
    (row, _) = list(model.analyze([clips["long"]], ["avcap", "ave"], stride_s=30, window_s=40))
    starts = [caption.window for caption in row.answer.parsed]
    assert [start for start, _ in starts] == [0, 30, 60, 90] and starts[0] == (0, 40)
    assert model.engine.vision_calls == [20 * 256] * 4
    assert counted["frames"] == 125 and counted["sounds"] == 4, "no frame and no sound twice"


def test_the_stride_changes_nothing_for_short_clips(bundle, clips):
    def run(stride):
        model = Model(bundle, FakeEngine(bundle, "<event>dog, (2 7)</event>"))
        return [row.answer.parsed for row in model.analyze([clips["av"]], ["ave"], stride_s=stride)]

    assert run(None) == run(10) == run(3)


def test_reading_ahead_is_bounded(model, clips, monkeypatch):
    prepared, seen = [], threading.Semaphore(0)
    real = Session.prepare

    def prepare(self, names):
        real(self, names)
        prepared.append(self)
        seen.release()

    monkeypatch.setattr(Session, "prepare", prepare)
    found = model.analyze([clips["mute"]] * 20, ["avcap"], ahead=2)
    next(found)
    for _ in range(4):  # the clip at hand, two in the queue, one waiting for room
        assert seen.acquire(timeout=20)
    assert not seen.acquire(timeout=0.3) and len(prepared) == 4
    next(found)
    assert seen.acquire(timeout=20)
    found.close()
    assert len(prepared) < 8 and not [t for t in threading.enumerate() if t.name == "decode-ahead"]


def test_nothing_of_a_clip_survives_it(model, clips, monkeypatch, tmp_path):
    """Over hundreds of clips no more than a handful is alive at any time, and none afterwards."""
    alive: dict[type, weakref.WeakSet] = {
        kind: weakref.WeakSet() for kind in (Clip, Session, VideoTrack, AudioTrack)
    }
    for kind, kept in alive.items():
        real = kind.__init__

        def init(self, *args, _real=real, _kept=kept, **kwargs):
            _kept.add(self)
            _real(self, *args, **kwargs)

        monkeypatch.setattr(kind, "__init__", init)
    broken = media.truncated(clips["mute"], tmp_path / "broken.mp4", 0.9)
    damaged = media.truncated(clips["webm"], tmp_path / "damaged.webm", 0.6)
    files = [clips["still"], broken, clips["sound"], damaged] * 100
    gc.disable()  # what needs the collector would pile up between its runs
    try:
        most: Counter[type] = Counter()
        count = errors = 0
        for row in model.analyze(files, ["avcap"]):
            count += 1
            errors += row.error is not None
            for kind, kept in alive.items():
                most[kind] = max(most[kind], len(kept))
            model.engine.forwards.clear()
        left = {kind: len(kept) for kind, kept in alive.items()}
    finally:
        gc.enable()
    assert (
        count == 400
        and errors >= 100
        and 1 <= most[Clip] <= 6
        and most[Session] <= 6
        and most[AudioTrack] <= 6
    )
    assert set(left.values()) == {0}, left


def test_rows_hold_no_media_and_can_be_pickled(model, clips):
    found = list(model.analyze([clips["av"], "gone.mp4"], ["ave"]))
    assert pickle.loads(pickle.dumps(found)) == found
    assert len(pickle.dumps(found)) < 4000
    assert found[1].error.type == "MediaError" and "no such file" in found[1].error.message


def test_the_python_api_takes_the_same_inputs(model, clips, tmp_path):
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips["mute"], tmp_path / name)
    (tmp_path / "list.txt").write_text(f"{tmp_path}/b.mp4\n")
    names = lambda paths: [row.media[0].rsplit("/", 1)[1] for row in model.analyze(paths, ["avcap"])]  # noqa: E731
    assert names(tmp_path) == names(str(tmp_path)) == names([f"{tmp_path}/*.mp4"]) == ["a.mp4", "b.mp4"]
    assert names([f"@{tmp_path}/list.txt"]) == ["b.mp4"]


def test_wrong_requests_are_refused_before_anything_is_read(model):
    for tasks, options, error in (
        (["dance"], {}, TaskError),
        ([], {}, InputError),
        (["avqa"], {}, TaskError),
        (["ave"], {"stride_s": 11}, InputError),
        (["ave"], {"stride_s": 21, "window_s": 20}, InputError),
        (["ave"], {"window_s": 5}, InputError),
    ):
        with pytest.raises(error):
            model.analyze(["nowhere.mp4"], tasks, **options)


def test_an_error_while_files_are_listed_ends_the_run(model, clips, tmp_path):
    found = model.analyze([clips["mute"], str(tmp_path / "*.xyz")], ["avcap"])
    assert next(found).answer.raw == "a dog"
    with pytest.raises(InputError, match="no file matches"):
        next(found)


def test_stop_finishes_the_clip_at_hand(model, clips):
    stop = threading.Event()
    seen = []
    for row in model.analyze([clips["av"]] * 50, SAME_RECIPE, stop=stop):
        seen.append(row.task)
        stop.set()
    assert seen == SAME_RECIPE


def test_a_clip_that_vanishes_midway(model, clips, tmp_path, monkeypatch):
    """Gone between its hash and its decode, or between its decode and its later windows."""
    early, late = (
        shutil.copy(clips["mute"], tmp_path / "early.mp4"),
        shutil.copy(clips["long"], tmp_path / "late.mp4"),
    )
    real = Clip.open.__func__

    def vanish(cls, paths, **options):
        if paths[0].name == "early.mp4":
            paths[0].unlink()
        clip = real(cls, paths, **options)
        if paths[0].name == "late.mp4":
            clip.close()
            paths[0].unlink()
        return clip

    monkeypatch.setattr(Clip, "open", classmethod(vanish))
    rows = list(model.analyze([early, late, clips["av"]], ["avcap"]))
    assert [row.error and row.error.type for row in rows] == ["MediaError", "MediaError", None]
    assert rows[0].sha256 and rows[1].sha256
    assert "early.mp4" in rows[0].error.message and "late.mp4" in rows[1].error.message


def test_a_clip_that_changes_while_it_is_read(model, clips, tmp_path, monkeypatch):
    path = shutil.copy(clips["mute"], tmp_path / "growing.mp4")
    real = Session.prepare

    def prepare(self, names):
        real(self, names)
        with open(path, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr(Session, "prepare", prepare)
    (row,) = model.analyze([path], ["avcap"])
    assert row.error.type == "MediaError" and "changed while it was read" in row.error.message


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.mp4")
    for path in (tmp_path / "pipe.mp4", tmp_path, tmp_path / "gone.mp4"):
        with pytest.raises(MediaError, match=path.name):
            identify(path)


def test_a_producer_gives_the_clip_along(model, clips):
    producer = LocalProducer(model)
    assert producer.bundle.startswith("fake/w4@") and producer.engine == {"name": "fake"}
    asked = []
    rows = producer.produce(
        [clips["av"]],
        Request(("avcap", "ave")),
        lambda *key: asked.append(key) or key[2] == "ave",
        threading.Event(),
    )
    ((row, clip),) = rows
    assert clip.videos[0].width == 64 and row.task == "avcap"
    assert asked == [(row.sha256, str(clips["av"]), "avcap"), (row.sha256, str(clips["av"]), "ave")]
