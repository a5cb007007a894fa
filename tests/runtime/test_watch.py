"""Watch mode: files are taken once, when they have stopped growing."""

import os
import threading
from pathlib import Path

import pytest

from crab_edge.inputs import find_media
from crab_edge.watch import TEMPORARY, Settled, watch

NOW = 1_000_000.0


@pytest.fixture
def look(tmp_path):
    """look(seconds since the start) -> names of the files that came to rest."""
    settled = Settled(settle_s=5)

    def at(seconds):
        return [path.name for path in settled.look(find_media([tmp_path]), 50 + seconds, NOW + seconds)]

    return at


def write(path: Path, content: bytes, changed: float) -> Path:
    path.write_bytes(content)
    os.utime(path, (NOW + changed, NOW + changed))
    return path


def test_a_growing_file_is_waited_for(look, tmp_path):
    for second in range(10):
        write(tmp_path / "a.mp4", b"x" * (second + 1), second)
        assert look(second) == []
    assert look(12) == []
    assert look(14) == ["a.mp4"] and look(15) == look(60) == []


def test_writing_without_growing_counts_as_change(look, tmp_path):
    write(tmp_path / "a.mp4", b"xx", 0)
    assert look(0) == look(4) == []
    write(tmp_path / "a.mp4", b"yy", 4.5)
    assert look(5) == look(9) == [] and look(10) == ["a.mp4"]


def test_old_files_are_taken_at_once_but_only_at_the_start(look, tmp_path):
    write(tmp_path / "old.mp4", b"x", -100)
    write(tmp_path / "new.mp4", b"x", -1)
    assert look(0) == ["old.mp4"]
    write(tmp_path / "moved_in.mp4", b"x", -100)
    assert look(3) == [] and look(4) == ["new.mp4"] and look(8) == ["moved_in.mp4"]


def test_a_clock_that_lags_behind_does_not_hurry(look, tmp_path):
    write(tmp_path / "future.mp4", b"x", 1000)
    assert look(0) == look(4) == [] and look(5) == ["future.mp4"]


def test_empty_and_temporary_names_are_left(look, tmp_path):
    write(tmp_path / "empty.mp4", b"", -100)
    for suffix in TEMPORARY:
        write(tmp_path / f"a.mp4{suffix}", b"\0\0\0\x18ftypisom", -100)
    assert look(0) == look(100) == []
    (tmp_path / "a.mp4.part").rename(tmp_path / "a.mp4")
    assert look(101) == [] and look(106) == ["a.mp4"]


def test_a_file_that_changes_later_comes_again(look, tmp_path):
    write(tmp_path / "a.mp4", b"x", -100)
    assert look(0) == ["a.mp4"]
    write(tmp_path / "a.mp4", b"xyz", 1)
    assert look(1) == [] and look(6) == ["a.mp4"]
    (tmp_path / "a.mp4").unlink()
    assert look(7) == []
    write(tmp_path / "a.mp4", b"xyz", 8)
    assert look(8) == [] and look(13) == ["a.mp4"]


def test_watching_ends_with_the_event(tmp_path):
    stop = threading.Event()
    files = watch(lambda: find_media([tmp_path]), stop, settle_s=0, poll_s=0.01)
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert next(files).name == "a.mp4"
    threading.Timer(0.1, stop.set).start()
    assert list(files) == []
