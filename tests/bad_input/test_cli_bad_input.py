"""What users get wrong, through the real command line: exit code 2, one line naming the file and the way out.

No traceback, nothing on standard output, nothing written. Everything here fails before a graph would be
opened, so a bundle with empty graphs serves.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import media
from tests.fake_bundle import write_fake_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return write_fake_bundle(tmp_path_factory.mktemp("bundle") / "good")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return media.video(tmp_path_factory.mktemp("clip") / "clip.mp4", seconds=3, fps=4)


@pytest.fixture
def refused(tmp_path, bundle):
    """refused(arguments..., words) runs `crab-edge`, checks the contract above and returns the line."""

    def run(*arguments, words, code=2, bundle_=bundle):
        line = [str(argument) for argument in arguments]
        if bundle_ is not None:
            line += ["--bundle", str(bundle_)]
        before = sorted(tmp_path.rglob("*"))
        ran = subprocess.run(
            [sys.executable, "-m", "crab_edge_apps.cli", *line],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            check=False,
        )
        assert ran.returncode == code, ran.stderr
        assert ran.stdout == ""
        assert ran.stderr.startswith("crab-edge: error: ") and ran.stderr.count("\n") == 1, ran.stderr
        assert "Traceback" not in ran.stderr
        for word in words:
            assert str(word) in ran.stderr, f"{word!r} is not in: {ran.stderr}"
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return ran.stderr

    return run


def test_missing_file(refused):
    refused("ask", "nowhere.mp4", words=["nowhere.mp4", "no such file"])


def test_a_mistyped_second_file_is_no_question(refused, clip):
    refused("ask", clip, "nowhere.wav", words=["nowhere.wav", "no such file"])


def test_not_a_media_file(refused, tmp_path):
    (tmp_path / "letter.mp4").write_text("Dear Sir or Madam,\n" * 50)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    for name in ("letter.mp4", "noise.mp4"):
        refused("ask", name, words=[name, "media"])


def test_empty_file(refused, tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    refused("ask", "empty.mp4", words=["empty.mp4", "empty"])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_mp4(refused, clip, tmp_path, share):
    media.truncated(clip, tmp_path / "cut.mp4", share)
    refused("ask", "cut.mp4", words=["cut.mp4", "whole"])


@pytest.mark.parametrize("share", [0.7, 0.9])
def test_truncated_mp4_with_its_index_in_front(refused, tmp_path, share):
    whole = media.video(tmp_path / "whole.mp4", seconds=10, fps=4, options={"movflags": "faststart"})
    media.truncated(whole, tmp_path / "cut.mp4", share)
    refused("ask", "cut.mp4", words=["cut.mp4", "whole"])


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_sound_of_zero_length_alone(refused, tmp_path, suffix):
    media.sound(tmp_path / f"silence.{suffix}", np.zeros(0, np.float32))
    refused("ask", f"silence.{suffix}", words=[f"silence.{suffix}", "empty"])


def test_a_directory(refused, tmp_path):
    (tmp_path / "clips").mkdir()
    refused("ask", "clips", words=["clips", "crab-edge analyze clips"])


def test_unknown_task(refused, clip):
    refused("ask", clip, "--task", "dance", words=["dance", "ave", "avqa"])
    refused("analyze", clip, "--task", "ave,dance", "--out", "out", words=["dance", "ave", "avqa"])


def test_a_task_that_does_not_apply(refused, tmp_path):
    media.picture(tmp_path / "still.png")
    refused("ask", "still.png", "--task", "ave", words=["ave", "video"])


def test_a_question_without_media(refused):
    refused("ask", "Is there a dog?", words=["Is there a dog?", "CLIP"])
    refused("ask", words=["no media"])


def test_words_and_numbers_that_say_nothing(refused, clip):
    refused("ask", clip, "", words=["empty word", "QUESTION"])
    for wrong in ("nan", "0", "-1"):
        refused("ask", clip, "--max-minutes", wrong, words=["--max-minutes", "more than 0"])


def test_media_that_go_with_no_task(refused, clip):
    refused("ask", clip, clip, "Is there a dog?", words=["2 were given", "--video, --image and --audio"])


def test_hours_of_video(refused, tmp_path):
    media.video(tmp_path / "hours.mp4", seconds=2 * 3600, fps=1, width=16, height=16, sound=False, gop=600)
    refused("ask", "hours.mp4", words=["hours.mp4", "120", "10", "crab-edge analyze", "--max-minutes"])
    refused("ask", "hours.mp4", "--max-minutes", "60", words=["hours.mp4", "60"])


def test_unknown_engine(refused, clip):
    refused("ask", clip, "--engine", "warp", words=["warp", "auto", "onnxruntime"])


def test_wrong_options(refused, clip):
    refused("ask", clip, "--threads", "0", words=["--threads"])
    refused("ask", clip, "--max-tokens", "0", words=["--max-tokens"])
    refused("analyze", clip, "--task", "ave", words=["--out"])


@pytest.fixture
def damaged(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "damaged")


@pytest.mark.parametrize("name", ["decoder.onnx", "embedding.bin", "tokenizer.json", "bundle.json"])
def test_one_flipped_byte(refused, damaged, clip, name):
    path = damaged / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x20
    path.write_bytes(content)
    refused("ask", clip, bundle_=damaged, words=[path, "damaged", "crab-edge export"])
    refused("verify", damaged, bundle_=None, words=[path, "damaged"])


def test_missing_graph(refused, damaged, clip):
    (damaged / "vision.onnx").unlink()
    refused("ask", clip, bundle_=damaged, words=[damaged / "vision.onnx", "missing", "crab-edge export"])
    refused(
        "analyze", clip, "--task", "ave", "--out", "out", bundle_=damaged, words=["vision.onnx", "missing"]
    )


@pytest.mark.parametrize(
    ("schema", "words"), [(2, ["schema 2", "schema 1", "pip install -U"]), ("x", ["damaged"])]
)
def test_newer_and_wrong_schema(refused, damaged, clip, schema, words):
    path = damaged / "bundle.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": schema}))
    refused("ask", clip, bundle_=damaged, words=[path, "crab-edge export", *words])


def test_no_bundle(refused, clip, tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("nowhere", "folder"):
        refused("ask", clip, bundle_=name, words=[name, "crab-edge export"])


def test_output_that_cannot_be_written(refused, clip, tmp_path):
    (tmp_path / "file").write_text("")
    refused("analyze", clip, "--task", "ave", "--out", "file/out", words=["file/out", "--out"])


def test_hostile_names_stay_on_one_line(refused, tmp_path):
    name = "two\nlines \x1b[31m.mp4"
    (tmp_path / name).write_text("no media")
    line = refused("ask", name, words=["two"])
    assert "\x1b" not in line
