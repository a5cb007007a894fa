"""The real clips that developers keep beside the checkout."""

import numpy as np
import pytest

from crab_edge.clip import Clip
from crab_edge.features import FeatureConfig, audio_chunks, audio_token_count, log_mel, patches
from crab_edge.results import Box, Unparsed
from crab_edge.session import load

CFG = FeatureConfig()


def test_video_with_sound(samples_dir):
    (path,) = (samples_dir / "ave").glob("*.mp4")
    clip = Clip.open([path])
    video, audio = clip.videos[0], clip.audios[0]
    assert (video.width, video.height, video.n_frames) == (450, 360, 250)
    assert video.fps == pytest.approx(25) and clip.duration_s == pytest.approx(10.0, abs=0.02)
    assert len(clip.windows()) == 1 and clip.notices == []
    values, grid = patches(video.frames(10), CFG)
    assert grid == (5, 16, 16) and values.shape == (1280, 1176) and np.isfinite(values).all()
    mel = log_mel(audio.waveform(), CFG)
    assert mel.shape == (128, 1001) and audio_token_count(mel.shape[1]) == 250
    assert audio_chunks(mel, CFG)[1].tolist() == [200] * 5 + [1]


def test_frames_equal_a_plain_decode(samples_dir):
    """Every frame decoded in order, the reference's choice, Pillow's bicubic."""
    import av

    (path,) = (samples_dir / "ave").glob("*.mp4")
    with av.open(str(path)) as container:
        images = [frame.to_image() for frame in container.decode(video=0)]
    chosen = np.round(np.linspace(0, len(images) - 1, 10)).astype(int)
    expected = np.stack([np.asarray(images[i].resize((224, 224), 3)) for i in chosen])
    np.testing.assert_array_equal(Clip.open([path]).videos[0].frames(10), expected)


def test_the_mp3_holds_the_same_sound_as_the_mp4(samples_dir):
    (mp4,), (mp3,) = ((samples_dir / "ave").glob(f"*.{kind}") for kind in ("mp4", "mp3"))
    a, b = (Clip.open([path]).audios[0].waveform() for path in (mp4, mp3))
    assert a.size == b.size == 160125
    shifts = [np.corrcoef(a[2000:-2000], b[2000 + s : b.size - 2000 + s])[0, 1] for s in range(-300, 301, 10)]
    assert max(shifts) > 0.8


def test_image_and_sound(samples_dir):
    clip = Clip.open([samples_dir / "arig" / "1.jpg", samples_dir / "arig" / "audio.wav"])
    assert (clip.images[0].width, clip.images[0].height) == (1280, 720)
    wave = clip.audios[0].waveform()
    assert wave.size == 80320 and audio_token_count(log_mel(wave, CFG).shape[1]) == 125


@pytest.fixture(scope="module")
def packaged():
    pytest.importorskip("onnxruntime")
    return load(threads=2)


def test_the_packaged_model_answers_every_task_in_its_form(packaged, samples_dir):
    (path,) = (samples_dir / "ave").glob("*.mp4")
    session = packaged.open(path)
    with session.clip:
        answers = session.ask()
        assert {"ave", "avvp", "avcap"} <= {answer.task for answer in answers}
        for answer in [*answers, session.ask("Is there a violin?"), session.ask("What is that?")]:
            assert answer.parsed and not any(isinstance(r, Unparsed) for r in answer.parsed), answer.raw


def test_the_packaged_model_names_and_points_at_what_sounds(packaged, samples_dir):
    """Its own words leave out the name; held to the form, the answer has one and says that it was held."""
    folder = samples_dir / "arig"
    session = packaged.open(folder / "1.jpg", folder / "audio.wav")
    with session.clip:
        answer = session.ask(task="arig")
    (box,) = answer.parsed
    assert isinstance(box, Box) and box.label and answer.raw.startswith("The sounding object is ")
    assert 0 <= box.x1 < box.x2 <= 1280 and 0 <= box.y1 < box.y2 <= 720
    held = answer.timings.held_tokens
    assert held == 0 or f"held to the task's form at {held} of" in answer.notices[-1]
