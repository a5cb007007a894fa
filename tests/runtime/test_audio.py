"""Sound tracks: 16 kHz mono on the clip's time line."""

import resource

import numpy as np
import pytest

import crab_edge.media_audio as media_audio
from crab_edge.clip import AudioTrack, Clip, Window
from crab_edge.errors import MediaError
from tests import media


def track(path, **options) -> AudioTrack:
    return Clip.open([path], **options).audios[0]


def chirp(seconds: float, rate: int) -> np.ndarray:
    """Tells every moment from every other."""
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * t + 20 * t**2))).astype(np.float32)


def test_wav_at_16_khz_is_untouched(tmp_path):
    wave = chirp(2.5, 16000)
    audio = track(media.sound(tmp_path / "s.wav", wave))
    assert audio.duration_s == 2.5 and audio.sample_rate == 16000
    ours = audio.waveform()
    assert ours.dtype == np.float32 and ours.shape == (40000,)
    np.testing.assert_allclose(ours, wave, atol=1.01 / 32768)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_resampled_as_the_references_loader_does(tmp_path, rate):
    """Channels averaged, soxr HQ, length rounded up."""
    import soxr

    wave = chirp(2.01, rate)
    audio = track(media.sound(tmp_path / "s.wav", wave, rate=rate, channels=2))
    rounded = np.round(wave * 32768).clip(-32768, 32767).astype(np.float32) / 32768
    expected = soxr.resample(rounded, rate, 16000, quality="HQ")
    ours = audio.waveform()
    assert ours.size == -(-wave.size * 16000 // rate)
    np.testing.assert_allclose(ours[: expected.size], expected[: ours.size], atol=1e-4)


def test_channels_are_averaged(tmp_path):
    import av

    path = tmp_path / "s.wav"
    left, right = media.tone(1, hertz=300), media.tone(1, hertz=700)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_f32le", rate=16000)
        stream.layout = "stereo"
        frame = av.AudioFrame.from_ndarray(
            np.stack([left, right], 1).reshape(1, -1), format="flt", layout="stereo"
        )
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    np.testing.assert_allclose(track(path).waveform(), (left + right) / 2, atol=1e-6)


@pytest.mark.parametrize("codec", ["pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le", "pcm_f64le"])
def test_sample_formats(tmp_path, codec):
    import av

    path = tmp_path / "s.wav"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=16000)
        stream.layout = "mono"
        media._encode(out, stream, media.tone(1.2), 16000, 0.0)
    np.testing.assert_allclose(
        track(path).waveform(), media.tone(1.2), atol=1 / 100 if codec == "pcm_u8" else 1e-4
    )


@pytest.mark.parametrize(
    "name", ["s.mp3", "s.m4a", "s.ogg", "s.flac", "v.mp4", "v.mkv", "v.ts", "v.avi", "v.webm"]
)
def test_codecs_start_on_time(tmp_path, name):
    """Encoder delay is trimmed where the container tells it: the click comes within 0.1 s of its place."""
    wave = np.zeros(32000, np.float32)
    wave[16000:16160] = 0.8
    make = media.sound if name[0] == "s" else lambda path, wave: media.video(path, sound=wave)
    ours = track(make(tmp_path / name, wave)).waveform()
    assert np.argmax(np.abs(ours)) == pytest.approx(16080, abs=1600)
    assert ours.size == pytest.approx(32000, abs=2100)


def test_short_sounds_are_padded_to_a_second(tmp_path):
    """Crab+ reference, section 4."""
    audio = track(media.sound(tmp_path / "s.wav", media.tone(0.3)))
    ours = audio.waveform()
    assert audio.duration_s == pytest.approx(0.3) and ours.size == 16000
    assert ours[:4800].any() and not ours[4800:].any()
    assert audio.waveform(Window(0.1, 0.2)).size == 16000


def test_windows_cut_the_whole(tmp_path):
    audio = track(media.sound(tmp_path / "s.wav", chirp(5, 44100), rate=44100))
    whole = audio.waveform()
    np.testing.assert_array_equal(audio.waveform(Window(1.5, 3.25)), whole[24000:52000])
    np.testing.assert_array_equal(audio.waveform(Window(3, 5)), whole[48000:])


@pytest.mark.parametrize(
    ("name", "rate"), [("s.wav", 44100), ("s.mp3", 44100), ("s.flac", 22050), ("v.mp4", 48000)]
)
def test_windows_of_a_long_track_equal_the_whole(tmp_path, name, rate, monkeypatch):
    """In any order: forward, back, far ahead (by seeking)."""
    wave = np.tile(chirp(3, rate), 14)
    make = (
        media.sound if name[0] == "s" else lambda path, wave, rate: media.video(path, sound=wave, rate=rate)
    )
    path = make(tmp_path / name, wave, rate=rate)
    whole = track(path).waveform()
    monkeypatch.setattr(media_audio, "_WHOLE_S", 5.0)
    monkeypatch.setattr(media_audio, "_WORTH_SEEKING_S", 8.0)
    audio = track(path)
    assert audio._whole is None
    assert audio.duration_s == pytest.approx(whole.size / 16000, abs=0.1)
    for start in (0, 4, 20, 34, 16.3, 0, 36):
        ours = audio.waveform(Window(start, start + 4))
        expected = whole[round(start * 16000) : round((start + 4) * 16000)]
        np.testing.assert_allclose(ours, expected, atol=2e-3)
    np.testing.assert_allclose(audio.waveform()[: whole.size], whole[: audio.waveform().size], atol=2e-3)


def test_the_memory_of_a_long_track_stays_flat(tmp_path, monkeypatch):
    path = media.sound(tmp_path / "s.wav", np.zeros(16000 * 600, np.float32))
    audio = track(path, max_minutes=None)
    audio.waveform(Window(0, 10))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(0, 600, 10):
        assert audio.waveform(Window(start, start + 10)).size == 160000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB; the track has 38,000


def test_a_window_behind_the_end(tmp_path):
    audio = track(media.video(tmp_path / "v.mp4", seconds=5, sound=media.tone(2)))
    assert audio.audible(Window(1, 4)) and not audio.audible(Window(2.5, 5))
    with pytest.raises(MediaError, match=r"v\.mp4: no sound between 2\.5 and 5 s"):
        audio.waveform(Window(2.5, 5))


def test_late_sound_keeps_its_place(tmp_path):
    """A track that starts a second after the picture is heard a second after it, and the user is told."""
    clip = Clip.open([media.video(tmp_path / "late.mkv", seconds=3, sound=media.tone(1), sound_from_s=1.5)])
    wave = clip.audios[0].waveform()
    assert np.flatnonzero(np.abs(wave) > 0.1)[0] == pytest.approx(1.5 * 16000, abs=1200)
    assert len(clip.notices) == 1 and "heard as silence" in clip.notices[0]


def test_a_gap_in_the_recording_keeps_its_place(tmp_path):
    from fractions import Fraction

    import av

    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=16000)
        stream.layout = "mono"
        for start in (0, 3):
            wave = np.full((1, 16000), 9000, np.int16)
            frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), start * 16000
            out.mux(stream.encode(frame))
    clip = Clip.open([path])
    wave = clip.audios[0].waveform()
    assert wave.size == 64000 and wave[:16000].all() and not wave[16000:48000].any() and wave[48000:].all()
    assert "2.00 s at 1.00 s" in clip.notices[0]


def test_a_few_damaged_packets_are_told_many_are_an_error(tmp_path):
    whole = media.sound(tmp_path / "s.mp3", media.tone(20))
    content = bytearray(whole.read_bytes())
    size = len(content)
    content[size // 2 : size // 2 + 100] = bytes(100)
    (tmp_path / "some.mp3").write_bytes(content)
    assert track(tmp_path / "some.mp3").duration_s == pytest.approx(20, abs=0.3)
    content[size // 4 :] = np.random.default_rng(0).bytes(size - size // 4)
    (tmp_path / "many.mp3").write_bytes(content)
    with pytest.raises(MediaError, match=r"many\.mp3"):
        track(tmp_path / "many.mp3").waveform()
