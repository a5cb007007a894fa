"""Which of the words on the command line are files, and which is the question."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from crab_edge.errors import InputError

_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,5}$")


def looks_like_path(word: str) -> bool:
    """Whether a word that names no file was meant as one: "foo.mp4" and "clips/foo" are, a sentence isn't."""
    stripped = word.strip()
    if not stripped or stripped.endswith(("?", "？", "!", ".")) or "\n" in stripped:
        return False
    if _SUFFIX.search(stripped):
        return True
    return not re.search(r"\s", stripped) and bool(re.search(r"[/\\]", stripped) or stripped[0] in "~.")


def split_question(words: Sequence[str], *, media_elsewhere: bool) -> tuple[list[str], str | None]:
    """(media, question) of the positional words.

    The last one is the question unless it is or looks like a path. A single word is the media, unless media
    were named by options (`media_elsewhere`).
    """
    media = list(words)
    if any(not word.strip() for word in media):
        raise InputError('an empty word is no file and no question; use `crab-edge ask CLIP "QUESTION"`')
    if not media or Path(media[-1]).exists() or looks_like_path(media[-1]):
        return media, None
    if len(media) == 1 and not media_elsewhere:
        if re.search(r"\s|\?|？", media[0]):
            raise InputError(
                f'no media given for the question "{media[0]}"; use `crab-edge ask CLIP "QUESTION"`'
            )
        return media, None
    return media[:-1], media[-1]


def forced_kinds(options: Mapping[str, Sequence[Path]], others: Sequence[Path]) -> dict[Path, str]:
    """Path -> kind from the options --video, --image, --audio; a file given as both video and sound is whole.

    InputError for a file that is named twice in another way.
    """
    named: dict[Path, list[str]] = {}
    for kind, paths in options.items():
        for path in paths:
            named.setdefault(path, []).append(kind)
    for path, kinds in named.items():
        if path in others or (len(kinds) > 1 and sorted(kinds) != ["audio", "video"]):
            raise InputError(f"{path}: named twice; give it once, or once with --video and once with --audio")
    return {path: kinds[0] for path, kinds in named.items() if len(kinds) == 1}
