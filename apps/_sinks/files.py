"""Files of sinks: names that can't collide or do harm, contents that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from crab_edge.errors import CrabError, InputError
from crab_edge.rows import ASKED

_LONGEST_STEM = 80
_PREFIX, _SUFFIX = ".crab-edge-", ".part"
_FORBIDDEN = frozenset('<>:"/\\|?*%')


def file_name(row: Mapping[str, Any], suffix: str) -> str:
    """`<stem>.<8 hex digits>.<task><suffix>`: the digits tell clips, questions and bundles apart.

    The stem is that of the first medium, without what file systems and shells trip over.
    """
    media = row.get("media") or ["clip"]
    known = [row.get(name) for name in ("sha256", *ASKED)]
    if known[0] is None:
        known[0] = media
    digest = hashlib.sha256(json.dumps(known, default=str).encode("utf-8", "backslashreplace")).hexdigest()
    return f"{safe(Path(str(media[0])).stem)}.{digest[:8]}.{safe(str(row.get('task') or 'task'))}{suffix}"


def safe(name: str) -> str:
    """A name made fit for any file system, at most 80 bytes of UTF-8."""
    kept = "".join(c if c.isprintable() and c not in _FORBIDDEN else "_" for c in name)
    kept = kept.encode("utf-8", "replace")[:_LONGEST_STEM].decode("utf-8", "ignore")
    return kept.lstrip(".-~=+@ ").rstrip(". ") or "_"


def ready(folder: Path) -> None:
    """Makes a folder and removes what a killed run left half-written; InputError when that can't be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            left.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: can't be made ({error.strerror}); choose another --out") from error


def trouble(path: Path, error: OSError) -> CrabError:
    """A write's failure as the user reads it."""
    return CrabError(
        f"{path}: can't be written ({error.strerror or error}); make room and run the same command again"
    )


@contextmanager
def unfinished_file(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that takes its place when the block ends well and goes when it doesn't.

    CrabError when it can't be made or put in place; the block's own errors pass.
    """
    # Not `crab_edge.staging`: there are thousands, and they needn't be synced, since they can be made again.
    try:
        handle, name = tempfile.mkstemp(prefix=_PREFIX, suffix=_SUFFIX, dir=path.parent)
    except OSError as error:
        raise trouble(path, error) from error
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        mask = os.umask(0o022)
        os.umask(mask)
        try:
            unfinished.chmod(0o666 & ~mask)
            os.replace(unfinished, path)
        except OSError as error:
            raise trouble(path, error) from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replaced(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write that takes `path`'s place when the block ends well; CrabError when it can't be."""
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with unfinished_file(path) as unfinished:
        try:
            with open(unfinished, mode, **text) as file:  # type: ignore[call-overload]
                yield file
        except OSError as error:
            raise trouble(path, error) from error
