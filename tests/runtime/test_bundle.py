"""Reading bundles: everything that is wrong is found before a graph is opened, and named."""

import json
import os
import shutil

import numpy as np
import pytest

from crab_edge import bundle as bundle_module
from crab_edge.bundle import Bundle, Embedding
from crab_edge.errors import BundleError
from crab_edge.manifest import check_name, content_digest
from tests.fake_bundle import HIDDEN, write_fake_bundle


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "fake")


@pytest.fixture
def folder(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "fake")


def edit(folder, change, keep_digest=False):
    """Change the manifest as a forger would: with a digest that fits, unless told otherwise."""
    path = folder / "bundle.json"
    content = json.loads(path.read_text())
    change(content)
    if not keep_digest:
        content["digest"] = content_digest(content)
    path.write_text(json.dumps(content))


def refused(folder, *words):
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    message = str(caught.value)
    assert "\n" not in message and caught.value.exit_code == 2
    for word in words:
        assert word in message, message


def test_opens_and_gives_its_parts(folder):
    opened = Bundle.open(folder)
    assert opened.features.system_prompt == "You see and hear."
    assert opened.prompt.vocab_size == opened.manifest.model.vocab_size
    assert opened.embedding.rows(np.array([1, 2])).shape == (2, HIDDEN)
    assert opened.graph("vision") == folder / "vision.onnx"
    assert opened.identity.startswith("fake/w4@")
    assert Bundle.open(folder, full=True).identity == opened.identity


def test_opens_through_a_link_to_the_folder(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").path == folder.resolve()


@pytest.mark.parametrize(
    "name", ["decoder.onnx", "audio.onnx", "embedding.bin", "tokenizer.json", "features.json"]
)
def test_one_flipped_bit_is_found_and_named(folder, name):
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    refused(folder, str(path), "damaged", "crab-edge export")


def test_every_flipped_bit_of_the_manifest_is_found(folder):
    path = folder / "bundle.json"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        changed = bytearray(content)
        changed[place] ^= 1
        if json_or_none(bytes(changed)) == json.loads(content):
            continue  # only white space between tokens
        path.write_bytes(changed)
        with pytest.raises(BundleError, match=r"bundle\.json"):
            Bundle.open(folder)


def json_or_none(content):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_missing_graph(folder):
    (folder / "vision.onnx").unlink()
    refused(folder, str(folder / "vision.onnx"), "missing")


def test_wrong_size(folder):
    with (folder / "audio.onnx").open("ab") as file:
        file.write(b"more")
    refused(folder, "audio.onnx", "expected 50 bytes, got 54")


def test_no_folder_and_no_manifest(tmp_path):
    refused(tmp_path / "nowhere", "nowhere", "no such bundle folder")
    refused(tmp_path, "bundle.json is missing")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '"x"', "[" * 100_000, "{}", '{"schema_version": "1"}']
)
def test_manifest_that_is_none(folder, text):
    (folder / "bundle.json").write_text(text)
    refused(folder, "bundle.json", "damaged")


def test_newer_schema_names_both_versions_and_the_way_out(folder):
    edit(folder, lambda content: content.update(schema_version=2, crab_edge="9.9.9", something="new"))
    refused(folder, "schema 2", "9.9.9", "reads schema 1", "pip install -U crab-edge", "crab-edge export")


def test_older_schema(folder):
    edit(folder, lambda content: content.update(schema_version=0))
    refused(folder, "schema 0", "rebuild")


def test_unknown_field_and_wrong_type(folder):
    edit(folder, lambda content: content.update(extra=1))
    refused(folder, "extra")
    edit(folder, lambda content: (content.pop("extra"), content["model"].update(hidden_size="wide")))
    refused(folder, "model.hidden_size")


def test_edited_by_hand(folder):
    edit(folder, lambda content: content["model"].update(name="other"), keep_digest=True)
    refused(folder, "digest")


def test_unknown_file(folder):
    (folder / "notes.txt").write_text("hello")
    refused(folder, "notes.txt", "not listed")


def test_unknown_file_in_a_folder_below(folder):
    (folder / "engines").mkdir()
    (folder / "engines" / "x.plan").write_text("hello")
    refused(folder, "x.plan", "not listed")


def test_links_are_refused(folder, tmp_path):
    outside = tmp_path / "outside.onnx"
    shutil.move(folder / "decoder.onnx", outside)
    (folder / "decoder.onnx").symlink_to(outside)
    refused(folder, "decoder.onnx", "no links")


def test_linked_folders_are_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "engines").symlink_to(tmp_path / "elsewhere")
    refused(folder, "engines", "no links")


@pytest.mark.parametrize(
    "name", ["../decoder.onnx", "/etc/passwd", "a/../../b", "a\\b", "", ".", "a//b", "bundle.json"]
)
def test_names_that_leave_the_folder(folder, name):
    with pytest.raises(ValueError, match="not the name"):
        check_name(name)
    edit(folder, lambda content: content["files"].update({name: content["files"]["decoder.onnx"]}))
    refused(folder, "bundle.json", "damaged")


def test_graph_that_is_not_listed(folder):
    edit(folder, lambda content: content["graphs"].update(decoder="other.onnx"))
    refused(folder, "lists no other.onnx")


def test_too_old_onnxruntime(folder, monkeypatch):
    monkeypatch.setattr(bundle_module.importlib.metadata, "version", lambda name: "1.9.2+local")
    refused(folder, "needs onnxruntime >=1.23", "1.9.2", "pip install")
    monkeypatch.setattr(bundle_module.importlib.metadata, "version", lambda name: "1.23.0rc1")
    Bundle.open(folder)


def test_embedding_of_the_wrong_size(folder):
    edit(folder, lambda content: content["model"].update(vocab_size=7))
    with pytest.raises(BundleError, match=r"embedding\.bin: expected 84 bytes"):
        _ = Bundle.open(folder).embedding


def test_embedding_rows(tmp_path):
    q = np.array([[1, -2], [3, 4], [-128, 127]], np.int8)
    scales = np.array([0.5, 2.0, 1.0], np.float32)
    path = tmp_path / "embedding.bin"
    path.write_bytes(q.tobytes() + scales.tobytes())
    embedding = Embedding(path, 3, 2, 8)
    rows = embedding.rows(np.array([2, 0, 2]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, [[-128, 127], [0.5, -1], [-128, 127]])
    for wrong in (-1, 3):
        with pytest.raises(IndexError):
            embedding.rows(np.array([0, wrong]))
    floats = np.arange(6, dtype=np.float32).reshape(3, 2)
    path.write_bytes(floats.tobytes())
    np.testing.assert_array_equal(Embedding(path, 3, 2, 32).rows(np.array([1])), floats[1:2])


def test_large_bundles_are_hashed_once(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bundle_module, "ALWAYS_HASHED", 10)
    hashed = []
    original = bundle_module.file_sha256
    monkeypatch.setattr(bundle_module, "file_sha256", lambda path: hashed.append(path.name) or original(path))
    Bundle.open(folder)
    assert len(hashed) == 6
    Bundle.open(folder)
    assert len(hashed) == 6
    Bundle.open(folder, full=True)
    assert len(hashed) == 12
    content = bytearray((folder / "decoder.onnx").read_bytes())
    content[0] ^= 1
    (folder / "decoder.onnx").write_bytes(content)  # same size, another time
    refused(folder, "decoder.onnx", "damaged")


def test_a_broken_cache_does_no_harm(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(bundle_module, "ALWAYS_HASHED", 10)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "crab-edge").mkdir()
    (tmp_path / "crab-edge" / "hashes.json").write_text("[1, 2")
    Bundle.open(folder)
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    Bundle.open(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(folder):
    (folder / "decoder.onnx").chmod(0)
    refused(folder, "decoder.onnx", "can't be read")
