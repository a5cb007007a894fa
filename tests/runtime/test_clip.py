"""Opening media: kinds by content, windows, identity, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest

from crab_edge.clip import Clip, Window
from crab_edge.errors import InputError, MediaError
from tests import media


def kinds(clip: Clip) -> tuple[int, int, int]:
    return len(clip.videos), len(clip.images), len(clip.audios)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def film(folder):
    return media.video(folder / "film.mp4", seconds=2)


def test_import_is_cheap():
    """`crab_edge.clip` brings in neither PyAV nor Pillow nor soxr before a file is opened."""
    code = (
        "import sys, crab_edge.clip; print({'av', 'PIL', 'soxr', 'tokenizers'} & set(sys.modules) or 'none')"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "none"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((f"v.{suffix}", (1, 0, 1)) for suffix in ("mp4", "mkv", "webm", "avi", "mov", "ts", "flv")),
        *((f"s.{suffix}", (0, 0, 1)) for suffix in ("wav", "mp3", "flac", "ogg", "m4a")),
        *((f"p.{suffix}", (0, 1, 0)) for suffix in ("png", "jpg", "webp", "bmp", "gif", "tiff")),
        ("v.gif", (1, 0, 0)),
    ],
)
def test_kind_is_found_from_the_content_not_the_name(tmp_path, name, expected):
    make = {"v": media.video, "s": media.sound, "p": media.picture}[name[0]]
    disguised = tmp_path / "clip.dat"
    make(tmp_path / name).rename(disguised)
    with Clip.open([disguised]) as clip:
        assert kinds(clip) == expected and clip.notices == []


@pytest.mark.parametrize("name", ["song.mp3", "song.m4a"])
def test_a_cover_picture_is_no_video(tmp_path, name):
    assert kinds(Clip.open([media.sound(tmp_path / name, cover=True)])) == (0, 0, 1)


def test_several_files_in_order(tmp_path, film):
    picture = media.picture(tmp_path / "p.png")
    wav = media.sound(tmp_path / "s.wav", media.tone(3))
    clip = Clip.open([picture, str(film), wav])
    assert kinds(clip) == (1, 1, 2)
    assert [audio.path for audio in clip.audios] == [film, wav]
    assert clip.duration_s == pytest.approx(3.0)


def test_forced_kinds(tmp_path, film):
    gif = media.video(tmp_path / "v.gif")
    assert kinds(Clip.open([film], kinds={film: "video"})) == (1, 0, 0)
    assert kinds(Clip.open([film], kinds={film: "audio"})) == (0, 0, 1)
    assert kinds(Clip.open([gif], kinds={gif: "image"})) == (0, 1, 0)


def test_forced_kinds_that_the_file_lacks(tmp_path, film):
    wav, picture = media.sound(tmp_path / "s.wav"), media.picture(tmp_path / "p.png")
    for path, kind in (
        (wav, "video"),
        (wav, "image"),
        (film, "image"),
        (picture, "video"),
        (picture, "audio"),
    ):
        with pytest.raises(MediaError, match=path.name):
            Clip.open([path], kinds={path: kind})
    with pytest.raises(InputError, match="unknown kind 'film'"):
        Clip.open([film], kinds={film: "film"})


@pytest.mark.parametrize(
    ("duration", "ends"),
    [(0.1, [0.1]), (10.0, [10.0]), (10.99, [10.99]), (11.0, [11.0]), (11.5, [10, 11.5]), (21.0, [10, 21]),
     (25.0, [10, 20, 25])],
)  # fmt: skip
def test_windows(film, duration, ends, monkeypatch):
    clip = Clip.open([film])
    monkeypatch.setattr(Clip, "duration_s", duration)
    windows = clip.windows()
    assert [w.end_s for w in windows] == ends
    assert [w.start_s for w in windows] == [0, *ends[:-1]]


def test_a_still_has_one_empty_window(tmp_path):
    assert Clip.open([media.picture(tmp_path / "p.png")]).windows() == [Window(0.0, 0.0)]


def test_identity_follows_bytes_order_and_kinds(tmp_path, film):
    copy = tmp_path / "copy.bin"
    copy.write_bytes(film.read_bytes())
    wav = media.sound(tmp_path / "s.wav")
    base = Clip.open([film, wav]).sha256
    assert len(base) == 64 and base == Clip.open([copy, wav]).sha256
    others = [[wav, film], [film], [film, film]]
    assert base not in {Clip.open(paths).sha256 for paths in others}
    assert Clip.open([film]).sha256 != Clip.open([film], kinds={film: "video"}).sha256


def message(path, **options) -> str:
    """The error's text: one line, exit code 2, naming the file."""
    with pytest.raises(InputError) as caught:
        Clip.open([path], **options)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text and caught.value.exit_code == 2
    assert ";" in text  # says what to do
    return text


def test_missing_directory_empty_and_special_files(tmp_path):
    assert "no such file" in message(tmp_path / "nothing.mp4")
    assert "crab-edge analyze" in message(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "0 bytes" in message(tmp_path / "empty.mp4")
    import os

    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in message(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["x.mp4", "x.mp3", "x.wav", "x.bin", "x.jpg", "x.txt", "x.dat"])
def test_noise_isnt_media(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(np.random.default_rng(0).bytes(20000))
    message(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"hello\n" * 50),
        ("a.json", b"{}"),
        ("a.m3u8", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\na.ts\n"),
        ("a.mp4", b"ffconcat version 1.0\nfile '/etc/passwd'\n"),
        ("a.ans", b"\x1b[31mhello" * 50),
        ("a.py", b"import os"),
        ("a.svg", b"<?xml version='1.0'?><svg/>"),
        ("a.pdf", b"%PDF-1.7\n" + b"0" * 200),
        ("a.zip", b"PK\x03\x04" * 50),
        ("a.srt", b"1\n00:00:01,000 --> 00:00:02,000\nhello\n"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"0" * 50),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("line\nbreak.mp4", b"{}"),
    ],
)
def test_other_files_arent_media(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(MediaError) as caught:
        Clip.open([path])
    assert "\n" not in str(caught.value) and name.replace("\n", "\\n") in str(caught.value)


@pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "%03d.mp4", "-x.mp4", "ünï 🎻.mp4", "file.jpg"])
def test_odd_names(tmp_path, film, name):
    path = tmp_path / name
    path.write_bytes(film.read_bytes())
    assert kinds(Clip.open([path])) == (1, 0, 1)


@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
@pytest.mark.parametrize("name", ["front.mp4", "back.mp4", "v.mkv", "v.webm", "s.wav", "s.flac"])
def test_truncated(tmp_path, name, share):
    """Files whose header says how long they are: an error, nothing half-used."""
    if name.startswith("s"):
        whole = media.sound(tmp_path / name, media.tone(20))
    else:
        options = {"movflags": "faststart"} if name == "front.mp4" else None
        whole = media.video(tmp_path / name, seconds=20, gop=10, options=options)
    message(media.truncated(whole, tmp_path / f"cut{whole.suffix}", share))


def test_truncated_picture(tmp_path):
    whole = tmp_path / "whole.jpg"
    from PIL import Image

    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(whole)
    message(media.truncated(whole, tmp_path / "cut.jpg", 0.5))


def test_sound_of_zero_length(tmp_path):
    assert "0 samples" in message(media.sound(tmp_path / "zero.wav", np.zeros(0)))


@pytest.mark.parametrize("name", ["v.mkv", "v.avi"])
def test_an_empty_sound_track_beside_a_video_is_no_sound(tmp_path, name):
    clip = Clip.open([media.video(tmp_path / name, sound=False, empty_sound=True)])
    assert kinds(clip) == (1, 0, 0)
    assert len(clip.notices) == 1 and name in clip.notices[0] and "without sound" in clip.notices[0]


def test_too_long_names_analyze(tmp_path):
    path = media.sound(tmp_path / "long.wav", np.zeros(16000 * 70))
    assert "crab-edge analyze" in message(path, max_minutes=1)
    assert Clip.open([path], max_minutes=None).duration_s == pytest.approx(70)
    assert len(Clip.open([path]).windows()) == 7


def test_no_media():
    with pytest.raises(InputError, match="no media given"):
        Clip.open([])
