"""Video tracks: the right frames, whatever the container, and no more decoding than needed."""

import dataclasses

import numpy as np
import pytest

import crab_edge.media_video as media_video
from crab_edge.clip import Clip, VideoTrack, Window
from crab_edge.errors import MediaError
from crab_edge.media_io import scan
from tests import media


def numbers(frames: np.ndarray) -> list[int]:
    return [media.frame_number(frame) for frame in frames]


def track(path, **options) -> VideoTrack:
    return Clip.open([path], **options).videos[0]


def reference(total: int, n: int) -> list[int]:
    """Crab+ reference, section 4."""
    return np.round(np.linspace(0, total - 1, n)).astype(int).tolist()


@pytest.mark.parametrize(
    ("name", "options"),
    [("v.mp4", {}), ("v.mp4", {"b_frames": 3}), ("v.mp4", {"codec": "libx265"}), ("v.mkv", {"b_frames": 2}),
     ("v.webm", {}), ("v.webm", {"codec": "libvpx"}), ("v.avi", {}), ("v.avi", {"b_frames": 2}),
     ("v.ts", {"b_frames": 2}), ("v.mov", {"codec": "prores_ks"}), ("v.gif", {}), ("v.flv", {}),
     ("v.mpg", {"codec": "mpeg2video", "audio_codec": "mp2", "b_frames": 2})],
)  # fmt: skip
@pytest.mark.parametrize("n", [10, 4])
def test_frames_are_the_references(tmp_path, name, options, n):
    video = track(media.video(tmp_path / name, seconds=3, fps=25, **options))
    assert (video.n_frames, video.width, video.height) == (75, 64, 48)
    assert video.fps == pytest.approx(25, rel=0.1) and video.duration_s == pytest.approx(3, abs=0.1)
    frames = video.frames(n)
    assert frames.shape == (n, 224, 224, 3) and frames.dtype == np.uint8
    assert numbers(frames) == reference(75, n)


def test_one_frame(tmp_path):
    video = track(media.video(tmp_path / "one.mp4", seconds=0.1, sound=False))
    assert video.n_frames == 1 and numbers(video.frames(10)) == [0] * 10
    assert video.duration_s == pytest.approx(0.1)


def test_4k(tmp_path):
    video = track(media.video(tmp_path / "4k.mp4", seconds=0.3, width=3840, height=2160, sound=False))
    assert (video.width, video.height) == (3840, 2160) and numbers(video.frames(4)) == [0, 1, 1, 2]


def test_odd_sizes_are_stretched(tmp_path):
    video = track(media.video(tmp_path / "thin.mp4", width=34, height=400, seconds=0.5))
    assert numbers(video.frames(4)) == reference(5, 4)


def test_variable_frame_rate(tmp_path):
    """Windows go by time, frames inside them by number."""
    times = [0, 0.1, 0.15, 0.9, 1.0, 3.0, 3.05]
    video = track(media.video(tmp_path / "vfr.mp4", times=times, sound=False))
    assert video.n_frames == 7 and numbers(video.frames(4)) == reference(7, 4)
    assert numbers(video.frames(2, Window(0.9, 3.02))) == [3, 5]
    # Nothing begins between 1.5 and 2.5 s: the frame of 1.0 s is on show.
    assert numbers(video.frames(4, Window(1.5, 2.5))) == [4] * 4


def test_windows_are_exact_and_end_exclusive(tmp_path):
    video = track(media.video(tmp_path / "v.mp4", seconds=6, fps=10, gop=7, b_frames=2, sound=False))
    for start in (0, 4, 2, 5, 0):
        assert numbers(video.frames(10, Window(start, start + 1))) == list(range(10 * start, 10 * start + 10))


def test_a_window_behind_the_end(tmp_path):
    video = track(media.video(tmp_path / "v.mp4", seconds=2, sound=media.tone(8)))
    assert video.visible(Window(1.9, 8)) and not video.visible(Window(2.5, 8))
    with pytest.raises(
        MediaError, match=r"v\.mp4: no picture between 2\.5 and 8 s, the video ends at 2\.0 s"
    ):
        video.frames(4, Window(2.5, 8))


class Counter:
    """Counts decoded frames."""

    def __init__(self, monkeypatch):
        self.frames = 0
        decode = media_video._FrameReader._decode

        def counted(reader, stream, sought=False):
            for frame in decode(reader, stream, sought):
                self.frames += 1
                yield frame

        monkeypatch.setattr(media_video._FrameReader, "_decode", counted)


def test_one_decode_serves_all_requests(tmp_path, monkeypatch):
    path = media.video(tmp_path / "v.mp4", seconds=4, fps=10, gop=40, sound=False)
    counter = Counter(monkeypatch)
    video = track(path)
    video.prefetch([(10, None), (4, None), (10, Window(0, 2))])
    assert counter.frames <= 40
    before = counter.frames
    assert numbers(video.frames(10)) == reference(40, 10)
    assert numbers(video.frames(4)) == reference(40, 4)
    assert numbers(video.frames(10, Window(0, 2))) == reference(20, 10)
    assert counter.frames == before


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi", "v.ts"])
def test_far_windows_are_sought(tmp_path, monkeypatch, name):
    """A window far in costs its own frames and those since a keyframe, in any order of asking."""
    path = media.video(tmp_path / name, seconds=60, fps=10, gop=20, sound=False)
    counter = Counter(monkeypatch)
    video = track(path)
    for start in (50, 20, 40, 0):
        counter.frames = 0
        assert numbers(video.frames(10, Window(start, start + 1))) == list(range(10 * start, 10 * start + 10))
        assert counter.frames <= 70


def test_where_nothing_can_be_sought_windows_go_on(tmp_path, monkeypatch):
    """VP8 hides frames in its packets, so it is counted by decoding and then read forward, once."""
    path = media.video(tmp_path / "v.webm", codec="libvpx", seconds=12, fps=10, sound=False)
    video = track(path)
    counter = Counter(monkeypatch)
    for start in range(12):
        assert numbers(video.frames(10, Window(start, start + 1))) == list(range(10 * start, 10 * start + 10))
    assert counter.frames <= 120


def test_wrong_timestamps_are_found_out(tmp_path):
    """If the packets foretell frames that don't come, the frames are counted by decoding."""
    path = media.video(tmp_path / "v.mp4", seconds=4, fps=10, sound=False)
    found = scan(path, frozenset({"video"}), None)
    lying = dataclasses.replace(found.video, pts=found.video.pts + 1)
    video = VideoTrack(found, lying)
    assert numbers(video.frames(10)) == reference(40, 10) and video.n_frames == 40


def test_the_cache_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(media_video, "_KEPT_FRAMES", 20)
    video = track(media.video(tmp_path / "v.mp4", seconds=10, fps=10, sound=False))
    for start in range(10):
        video.frames(10, Window(start, start + 1))
        assert len(video._cache) <= 20
    assert numbers(video.frames(30)) == reference(100, 30)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_metadata_is_applied(tmp_path, turns):
    path = media.video(tmp_path / "v.mp4", seconds=1, width=64, height=48, sound=False)
    plain, turned = track(path), track(media.rotated(path, tmp_path / "turned.mp4", turns))
    size = (64, 48) if turns == 2 else (48, 64)
    assert (turned.width, turned.height) == size
    expected = np.stack([np.rot90(frame, -turns) for frame in plain.frames(10)])
    difference = np.abs(turned.frames(10).astype(int) - expected)
    assert np.median(difference) <= 2 and (difference > 60).mean() < 0.05


def test_damaged_frames_are_an_error(tmp_path):
    path = media.video(tmp_path / "v.mp4", seconds=8, fps=10, width=320, height=240, sound=False, gop=4)
    content = bytearray(path.read_bytes())
    start, end = content.index(b"mdat") + 4, content.rindex(b"moov")
    content[(start + end) // 2 : end - 100] = b"\xff" * (end - 100 - (start + end) // 2)
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"v\.mp4: its video can't be decoded"):
        track(path).frames(10)


def test_colours_survive(tmp_path):
    """RGB order: a red frame is red."""
    import av

    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), (230, 20, 30), np.uint8), format="rgb24")
            frame.pts = i
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert np.abs(track(path).frames(1)[0].astype(int) - (230, 20, 30)).max() <= 6
