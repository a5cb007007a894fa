"""Publishing bundles: all or nothing, and never over something else."""

import os

import pytest

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.errors import BundleError, InputError
from tests.fake_bundle import fake_manifest, write_fake_bundle


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir())


def test_publishes_and_leaves_nothing_else(tmp_path):
    out = write_fake_bundle(tmp_path / "deep" / "bundle")
    assert leftovers(out.parent) == ["bundle"]
    opened = Bundle.open(out, full=True)
    assert opened.manifest.created and len(opened.manifest.files) == 6
    assert out.stat().st_mode & 0o055 == 0o055 & ~os.umask(os.umask(0o022) and 0o022)


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), BundleWriter(tmp_path / "bundle") as writer:
        writer.path("decoder.onnx").write_bytes(b"half")
        raise RuntimeError
    assert leftovers(tmp_path) == []


def test_without_commit_nothing_is_published(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer:
        writer.path("a/b").write_bytes(b"x")
    assert leftovers(tmp_path) == []


def test_an_incomplete_bundle_is_not_published(tmp_path):
    with pytest.raises(BundleError, match=r"tokenizer\.json"), BundleWriter(tmp_path / "bundle") as writer:
        writer.path("decoder.onnx").write_bytes(b"x")
        writer.commit(fake_manifest(10, [1]))
    assert leftovers(tmp_path) == []


def test_existing_bundle_stays_unless_overwritten(tmp_path):
    out = write_fake_bundle(tmp_path / "bundle", name="first")
    with pytest.raises(InputError, match="already exists"):
        write_fake_bundle(out)
    write_fake_bundle(out, overwrite=True, name="second")
    assert Bundle.open(out).manifest.model.name == "second"
    assert leftovers(tmp_path) == ["bundle"]
    with pytest.raises(RuntimeError), BundleWriter(out, overwrite=True):
        raise RuntimeError
    assert Bundle.open(out).manifest.model.name == "second"


def test_only_bundles_are_overwritten(tmp_path):
    home = tmp_path / "thesis"
    home.mkdir()
    (home / "chapter.txt").write_text("mine")
    with pytest.raises(InputError, match="no bundle"):
        write_fake_bundle(home, overwrite=True)
    assert (home / "chapter.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="can't be written"):
        write_fake_bundle(tmp_path / "file" / "bundle")


def test_names_stay_inside(tmp_path):
    with BundleWriter(tmp_path / "bundle") as writer, pytest.raises(ValueError, match="not the name"):
        writer.path("../outside")
