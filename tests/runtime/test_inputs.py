"""Which files are meant by names, folders, patterns and lists."""

import io
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from crab_edge.errors import InputError
from crab_edge.inputs import find_media, read_list

MP4 = b"\0\0\0\x18ftypisom"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder with media by suffix and by content, hidden ones and others; it is the current one."""
    for name in ("a.mp4", "b.WAV", "deep/c.mp4", "deep/er/d.png", ".e.mp4", ".hidden/f.mp4", "notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "deep" / "no_suffix").write_bytes(MP4)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def found(*paths, **options):
    return [path.as_posix() for path in find_media(paths, **options)]


def test_folders_and_files(tree):
    assert (
        found(".") == found(Path(".")) == ["a.mp4", "b.WAV", "deep/c.mp4", "deep/no_suffix", "deep/er/d.png"]
    )
    assert found("notes.txt", "gone.mp4", ".e.mp4") == ["notes.txt", "gone.mp4", ".e.mp4"]


def test_patterns(tree):
    assert found("*.mp4") == ["a.mp4"]
    assert found("deep/*.mp4", "[ab].*") == ["deep/c.mp4", "a.mp4", "b.WAV"]
    assert found("**/*.mp4") == ["a.mp4", "deep/c.mp4"]
    assert found("dee?") == ["deep/c.mp4", "deep/no_suffix", "deep/er/d.png"], (
        "a folder that matches is searched"
    )
    assert sorted(found("deep/**")) == ["deep/c.mp4", "deep/er/d.png", "deep/no_suffix"], "each once"
    assert found(str(tree / "*.mp4")) == [(tree / "a.mp4").as_posix()]
    with pytest.raises(InputError, match="no file matches"):
        found("*.mkv")
    assert found("*.mkv", strict=False) == []


def test_what_is_really_called_so_goes_first(tree):
    for name in ("what?[1].mp4", "@list.txt", "-rf.mp4", "~"):
        Path(name).write_bytes(MP4)
        assert found(name) == [name]
    assert found(Path("*.mp4")) == ["*.mp4"], "a Path is never a pattern"


def test_lists(tree):
    Path("list.txt").write_bytes(b"\xef\xbb\xbfa.mp4\r\n\ndeep\n#c *.mp4\ngone.mp4")
    expected = ["a.mp4", "deep/c.mp4", "deep/no_suffix", "deep/er/d.png", "#c *.mp4", "gone.mp4"]
    assert found("@list.txt") == expected
    assert found(*read_list("list.txt")) == expected
    Path("zero").write_bytes(b"two\nlines.mp4\0b.WAV\0")
    assert read_list("zero") == [Path("two\nlines.mp4"), Path("b.WAV")]
    Path("bytes").write_bytes(b"\xff\xfe.mp4\n")
    assert os.fsencode(read_list("bytes")[0]) == b"\xff\xfe.mp4"
    for name in ("nowhere.txt", "deep"):
        with pytest.raises(InputError, match=rf"{name}: the list can't be read"):
            found("@" + name)


def test_a_list_on_standard_input(tree, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a.mp4\nb.WAV\n")))
    assert found(*read_list("-")) == ["a.mp4", "b.WAV"]


def test_pipes_and_dangling_links_block_nobody(tree):
    os.mkfifo("deep/pipe")
    os.mkfifo("deep/pipe.mp4")
    os.symlink("nowhere", "deep/link.mp4")
    os.symlink("..", "deep/loop")
    assert found("deep") == [
        "deep/c.mp4",
        "deep/link.mp4",
        "deep/no_suffix",
        "deep/pipe.mp4",
        "deep/er/d.png",
    ]


@contextmanager
def unprivileged():
    """As a user whom permissions bind, if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_without_permission_is_named(tmp_path):
    from crab_edge.batch import identify
    from crab_edge.errors import MediaError

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "closed").mkdir()
        (root / "open.mp4").write_bytes(MP4)
        (root / "secret.mp4").write_bytes(MP4)
        (root / "closed" / "inside.mp4").write_bytes(MP4)
        root.chmod(0o755)
        (root / "closed").chmod(0)
        (root / "secret.mp4").chmod(0)
        with unprivileged():
            assert list(find_media([root])) == [root / "open.mp4", root / "secret.mp4", root / "closed"]
            assert list(find_media([root / "closed" / "inside.mp4"])) == [root / "closed" / "inside.mp4"]
            with pytest.raises(
                MediaError, match=r"closed: this folder can't be listed; check its permissions"
            ):
                identify(root / "closed")
            for path in (root / "secret.mp4", root / "closed" / "inside.mp4"):
                with pytest.raises(MediaError, match=rf"{path.name}: can't be read \(Permission denied\)"):
                    identify(path)
        (root / "closed").chmod(0o755)
