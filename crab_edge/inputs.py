"""Which files are meant: files, folders, patterns and lists of paths."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from crab_edge.errors import InputError
from crab_edge.media_io import shown

SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .3gp .ogv .gif "
    ".wav .mp3 .m4a .aac .flac .ogg .oga .opus .wma .aiff .aif .amr "
    ".jpg .jpeg .png .webp .bmp .tif .tiff .heic .avif".split()
)
# First bytes of media files, for those without a known suffix: (offset, bytes).
SIGNATURES = (
    (4, b"ftyp"),
    (0, b"\x1a\x45\xdf\xa3"),
    (0, b"RIFF"),
    (0, b"OggS"),
    (0, b"fLaC"),
    (0, b"ID3"),
    (0, b"FLV\x01"),
    (0, b"\xff\xd8\xff"),
    (0, b"\x89PNG\r\n"),
    (0, b"GIF8"),
)


def find_media(paths: Iterable[str | Path], *, strict: bool = True) -> Iterator[Path]:
    """Files as they are given; of folders, every media file below, in order of name.

    A `Path` is a file or folder. A string may also be a pattern ("clips/**/*.mp4"; "**" goes through
    folders) or "@list.txt", a list as `read_list` takes it; a file that is really called so goes first.
    In folders a file counts by its suffix or, without a known one, by its first bytes; hidden ones don't.
    InputError for a list that can't be read and, if `strict`, for a pattern that matches nothing.
    """
    for given in paths:
        if isinstance(given, Path) or os.path.lexists(given):
            yield from _below(Path(given))
        elif given.startswith("@") and len(given) > 1:
            yield from find_media(read_list(given[1:]))
        elif glob.has_magic(given):
            yield from _matches(os.path.expanduser(given), strict)
        else:
            yield from _below(Path(os.path.expanduser(given)))


def read_list(name: str | Path) -> list[Path]:
    """The paths in a list: one a line, or ended by NUL bytes as `find -print0` writes them; "-" is stdin.

    They are files or folders, relative to the current folder; no patterns, no comments. Empty lines are
    left out.
    """
    try:
        if str(name) == "-":
            content = sys.stdin.buffer.read()
        else:
            content = Path(name).read_bytes()
    except OSError as error:
        raise InputError(
            f"{shown(Path(name))}: the list can't be read ({error.strerror}); check its path"
        ) from None
    content = content.removeprefix(b"\xef\xbb\xbf")
    if b"\0" in content:
        lines = content.split(b"\0")
    else:
        lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    return [Path(os.fsdecode(line)) for line in lines if line]


def _matches(pattern: str, strict: bool) -> Iterator[Path]:
    found = sorted(glob.glob(pattern, recursive=True))
    if strict and not found:
        raise InputError(f"{shown(Path(pattern))}: no file matches this pattern; check it")
    seen: set[Path] = set()
    for name in found:
        for path in _below(Path(name)):
            if path not in seen:
                seen.add(path)
                yield path


def _below(path: Path) -> Iterator[Path]:
    if not os.path.isdir(path):  # Path.is_dir would raise below a forbidden folder
        yield path
        return
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(path, onerror=unreadable.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and (file.suffix.lower() in SUFFIXES or _looks_like_media(file)):
                yield file
    yield from (Path(error.filename) for error in unreadable)


def _looks_like_media(path: Path) -> bool:
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for its writer
            return False
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return any(head[offset : offset + len(magic)] == magic for offset, magic in SIGNATURES)
