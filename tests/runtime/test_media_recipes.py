"""What the model sees and hears by recipe: pairs of clips as one, a part of a sound, the start of a clip."""

import sys
import types

import numpy as np
import pytest

from crab_edge.bundle import Bundle
from crab_edge.clip import Clip
from crab_edge.errors import DependencyError, InputError, TaskError
from crab_edge.resolved import Spent, resolve
from crab_edge.results import Box, Choice, Mask, Points
from crab_edge.session import Model
from crab_edge.tasks.recipes import IMAGE_AUDIO_5TH, TWO_AUDIOS, TWO_VIDEOS, VIDEO_4
from tests import media
from tests.fake_bundle import FakeEngine, write_fake_bundle

AVS = "The object making the sound in the video is dog. Its bounding box is [0,0,112,112] and its points are "
AVS += "[56,56],[1,1],[100,100]."


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return Bundle.open(write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    ramp = (np.arange(5 * 16000) // 16000).astype(np.float32) / 10 + 0.05
    return {
        "one": media.video(folder / "one.mp4", seconds=4, fps=4),
        "two": media.video(folder / "two.mp4", seconds=3, fps=4, sound=False),
        "high": media.sound(folder / "high.wav", media.tone(3.0, hertz=880.0)),
        "low": media.sound(folder / "low.wav", media.tone(2.0, hertz=220.0)),
        "steps": media.sound(folder / "steps.wav", ramp),
        "second": media.sound(folder / "second.wav", media.tone(1.0)),
        "still": media.picture(folder / "still.png", width=448, height=112),
    }


@pytest.fixture
def opened(bundle, files):
    """opened(text, (name, kind), ...) -> (session, engine)"""

    def make(text, *entries):
        engine = FakeEngine(bundle, text)
        return Model(bundle, engine).open([(files[name], kind) for name, kind in entries]), engine

    return make


TWO_CLIPS = (("one", "video"), ("two", "video"), ("high", "audio"))


def test_two_videos_are_shown_as_one_after_the_sound(opened, bundle):
    session, engine = opened("<answer>the second video</answer>", *TWO_CLIPS)
    answer = session.ask(task="a2v")
    assert answer.parsed == (Choice("2"),) and answer.notices == ()
    assert engine.vision_calls == [10 * 256] and engine.audio_calls == [300]
    _, prefix, positions = engine.forwards[0]
    video = np.flatnonzero((prefix == 1001).all(axis=1))
    audio = np.flatnonzero((prefix == 2001).all(axis=1))
    assert len(video) == 640 and len(audio) == 75 and audio[-1] < video[0]
    assert positions[0, video].max() - positions[0, video].min() == 450
    lead = bundle.embedding.rows(np.array(bundle.prompt.encode("user\nThese are two videos and an audio:")))
    np.testing.assert_array_equal(prefix[audio[0] - 1 - len(lead) : audio[0] - 1], lead)


def test_the_first_video_comes_first(files):
    with Clip.open([(files["one"], "video"), (files["two"], "video"), files["high"]]) as clip:
        video = resolve(clip, TWO_VIDEOS, None, Spent()).parts[1]
        frames = video.data()
        np.testing.assert_array_equal(frames[:10], clip.videos[0].frames(10))
        np.testing.assert_array_equal(frames[10:], clip.videos[1].frames(10))


def test_two_sounds_are_heard_as_one(opened, files):
    entries = (("two", "video"), ("high", "audio"), ("low", "audio"))
    session, engine = opened("<answer>one</answer>", *entries)
    assert session.ask(task="v2a").parsed == (Choice("1"),)
    assert engine.vision_calls == [5 * 256] and engine.audio_calls == [500]
    shown = resolve(session.clip, TWO_AUDIOS, None, Spent())
    assert shown.lead == "This is a video and two audio clips:"
    assert [part.kind for part in shown.parts] == ["video", "audio"]
    waves = [audio.waveform() for audio in session.clip.audios]
    np.testing.assert_array_equal(shown.parts[1].data, np.concatenate(waves))


def test_pairs_apply_to_pairs_alone(opened):
    session, _ = opened("", *TWO_CLIPS)
    assert [task.name for task in session.applicable()] == ["a2v"]
    session, _ = opened("", ("one", "video"), ("high", "audio"))
    assert not {"a2v", "v2a"} & {task.name for task in session.applicable()}
    with pytest.raises(TaskError, match="task a2v needs two videos and audio; the clip has video and audio"):
        session.ask(task="a2v")
    session, _ = opened("", ("one", "video"), ("high", "audio"), ("low", "audio"))
    with pytest.raises(TaskError, match="task avcap takes 1 audio stream, but 2 were given"):
        session.ask(task="avcap")


def test_faces_are_four_frames_and_four_seconds(opened):
    session, engine = opened("<answer>joy</answer>", ("one", "video"), ("high", "audio"))
    assert session.ask(task="meld").parsed == (Choice("joy"),)
    assert engine.vision_calls == [2 * 256] and engine.audio_calls == [400]
    wave = resolve(session.clip, VIDEO_4, None, Spent()).parts[1].data
    assert len(wave) == 64_000 and not wave[48_000:].any()


def test_a_picture_hears_its_part_of_the_sound(opened, files):
    session, engine = opened("woof", ("still", "image"), ("steps", "audio"))
    answer = session.ask(task="ms3", frame=3, grammar=False)
    assert engine.audio_calls == [100] and not answer.notices
    wave = resolve(session.clip, IMAGE_AUDIO_5TH, None, Spent(), 3).parts[1].data
    np.testing.assert_allclose(wave, 0.35, atol=1e-3)
    assert "hears one of 5 parts of the sound, here the first" in session.ask(task="ms3").notices[0]
    with pytest.raises(TaskError, match="frame 5: the sound is divided in 5 parts; expected 0 to 4"):
        session.ask(task="s4", frame=5)
    engine.audio_calls.clear()
    assert session.ask(
        "The Dog", task="ref_avs", frame=9, grammar=False
    ).notices == () and engine.audio_calls == [50]


def test_about_a_second_of_sound_is_heard_whole(opened):
    session, engine = opened("woof", ("still", "image"), ("second", "audio"))
    assert session.ask(task="s4", grammar=False).notices == () and engine.audio_calls == [100]


def test_segmentation_ends_in_a_mask_of_the_picture(opened, monkeypatch):
    masks = types.ModuleType("crab_edge.masks")
    masks.segment = lambda picture, box, points: Mask("dog", *picture.shape[:2], (7,), "stand-in")
    monkeypatch.setitem(sys.modules, "crab_edge.masks", masks)
    session, _ = opened(AVS, ("still", "image"), ("second", "audio"))
    answer = session.ask(task="s4")
    assert answer.parsed == (
        Box("dog", 0, 0, 224, 56),
        Points("dog", ((112, 28), (2, 0.5), (200, 50))),
        Mask("dog", 112, 448, (7,), "stand-in"),
    )

    def fail(picture, box, points):
        raise DependencyError("no tool for masks")

    masks.segment = fail
    answer = session.ask(task="s4")
    assert len(answer.parsed) == 2 and answer.notices == ("no tool for masks",)


def test_without_a_question_equal_questions_are_asked_once(opened):
    session, _ = opened("<answer>x</answer>", ("one", None))
    names = [answer.task for answer in session.ask()]
    assert names == ["ks", "avcap", "meld", "ave", "avvp"]


def test_a_pair_names_its_kind(files):
    with Clip.open([(files["one"], "video"), (files["one"], "audio"), (files["two"], None)]) as clip:
        assert (len(clip.videos), len(clip.audios)) == (2, 1)
    with pytest.raises(InputError, match="unknown kind 'smell'"):
        Clip.open([(files["one"], "smell")])


def test_pictures_keep_their_own_size(files):
    with Clip.open([files["still"]]) as clip:
        picture = clip.images[0].original()
        assert picture.shape == (112, 448, 3) and picture.dtype == np.uint8
