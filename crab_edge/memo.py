"""What was found out about files before, kept in the user's cache by path, size and times.

If it can't be read or written, that costs time only.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path


def cache_folder() -> Path:
    """Where this user's caches of Crab Edge lie; it needn't exist."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "crab-edge"


class Memo:
    """Facts about files, in `name` in the user's cache. A file that has changed since is unknown."""

    def __init__(self, name: str) -> None:
        self._path = cache_folder() / name
        self._new = False
        try:
            known = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            known = {}
        self._known = known if isinstance(known, dict) else {}

    @staticmethod
    def _stamp(path: Path) -> str:
        stat = path.stat()
        return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"

    def knows(self, path: Path, fact: str) -> bool:
        """Whether `fact` was learnt about the file as it is now."""
        return bool(self._known.get(str(path)) == [self._stamp(path), fact])

    def learn(self, path: Path, fact: str) -> None:
        """Notes `fact` about the file, in place of an earlier one; `save` keeps it."""
        self._known[str(path)] = [self._stamp(path), fact]
        self._new = True

    def save(self) -> None:
        """Writes what was learnt, in one go."""
        if not self._new:
            return
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
