"""Which word is the question: a mistyped file name must not be taken for one."""

from pathlib import Path

import pytest
from crab_edge_apps._media_arguments import forced_kinds, looks_like_path, split_question

from crab_edge.errors import InputError


@pytest.mark.parametrize(
    "word",
    ["foo.mp4", "my clip.mp4", "clips/foo", "/tmp/x", "~/x", "./x", "a.b/c d.wav", "clip.JPEG", "x.7z"],
)
def test_paths(word):
    assert looks_like_path(word)


@pytest.mark.parametrize(
    "word",
    [
        "Is there a dog?",
        "dog",
        "What is it. And where?",
        "Describe the clip.",
        "有狗吗",
        "有狗吗？",
        "cat and/or dog",
        "Is it foo.mp4?",
        "",
        "line\nfoo.mp4",
    ],
)
def test_questions(word):
    assert not looks_like_path(word)


def test_splitting(tmp_path):
    clip = tmp_path / "clip"
    clip.write_bytes(b"")
    odd = tmp_path / "Is there a dog?"
    odd.write_bytes(b"")
    here = str(clip)

    def split(*words, elsewhere=False):
        return split_question(words, media_elsewhere=elsewhere)

    assert split(here) == ([here], None)
    assert split(here, "Is there a dog?") == ([here], "Is there a dog?")
    assert split(here, "dog") == ([here], "dog")
    assert split(here, "foo.mp4") == ([here, "foo.mp4"], None)
    assert split(here, str(odd)) == ([here, str(odd)], None), "an existing file is media whatever its name"
    assert split("foo.mp4") == (["foo.mp4"], None)
    assert split("foo") == (["foo"], None)
    assert split("foo", elsewhere=True) == ([], "foo")
    assert split("Is there a dog?", elsewhere=True) == ([], "Is there a dog?")
    assert split() == ([], None)
    with pytest.raises(InputError, match="no media given for the question"):
        split("Is there a dog?")


def test_forcing_kinds():
    a, b = Path("a.mp4"), Path("b.wav")

    def forced(video=(), image=(), audio=(), others=()):
        return forced_kinds({"video": video, "image": image, "audio": audio}, others)

    assert forced([a], audio=[b]) == {a: "video", b: "audio"}
    assert forced([a], audio=[a]) == {}, "its picture and its sound: all of it"
    for wrong in ({"video": [a], "others": [a]}, {"video": [a, a]}, {"image": [a], "audio": [a]}):
        with pytest.raises(InputError, match="named twice"):
            forced(**wrong)
