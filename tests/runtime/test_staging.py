"""Output appears whole or not at all."""

import os

import pytest

from crab_edge.errors import InputError
from crab_edge.staging import check_space, staged_file, staged_folder


def test_a_folder_appears_when_the_block_ends(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with staged_folder(out) as folder:
        (folder / "x").write_text("1")
        assert not out.exists() and folder.parent == out.parent
    assert (out / "x").read_text() == "1" and [p.name for p in out.parent.iterdir()] == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def test_failure_leaves_everything_as_it_was(tmp_path):
    for opened in (staged_folder, staged_file):
        with pytest.raises(KeyboardInterrupt), opened(tmp_path / "new" / "deep" / "out") as place:
            (place / "x" if place.is_dir() else place).write_text("half")
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())


def test_what_is_there_is_replaced_only_when_asked_and_ours(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with staged_folder(out) as folder:  # an empty folder is free
        (folder / "x").write_text("1")
    with pytest.raises(InputError, match="--overwrite"), staged_folder(out):
        pass
    with pytest.raises(InputError, match="stays"), staged_folder(out, overwrite=True):
        pass
    with staged_folder(out, overwrite=True, ours=lambda old: (old / "x").exists()) as folder:
        (folder / "y").write_text("2")
    assert [p.name for p in out.iterdir()] == ["y"] and [p.name for p in tmp_path.iterdir()] == ["out"]
    link = tmp_path / "link"
    link.symlink_to(out)
    with pytest.raises(InputError, match="stays"), staged_folder(link, overwrite=True, ours=lambda old: True):
        pass
    assert (out / "y").exists()


def test_files(tmp_path):
    out = tmp_path / "out.bin"
    with staged_file(out) as file:
        file.write_text("1")
    with pytest.raises(InputError, match="--overwrite"), staged_file(out):
        pass
    with staged_file(out, overwrite=True) as file:
        file.write_text("2")
        assert out.read_text() == "1"
    assert out.read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out.bin"]
    with pytest.raises(InputError, match="folder"), staged_file(tmp_path):
        pass
    with pytest.raises(InputError, match="can't be written"), staged_file(out / "below"):
        pass


def test_space(tmp_path):
    check_space(tmp_path / "not" / "there", 1, "a test")
    with pytest.raises(InputError, match=r"a test needs 1000000000\.0 GB"):
        check_space(tmp_path, 10**18, "a test")


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask
