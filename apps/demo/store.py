"""The demo's private folder: uploads, a folder for each visitor, nothing left behind.

Files lie under names made here, never under the names they were uploaded with. The folder is this user's
alone (mode 0700). A run that was killed can't tidy up, so the next one does: a folder whose lock nobody holds
is nobody's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from crab_edge.errors import CrabError, InputError

PREFIX = "crab-edge-demo-"
_LOCK = "lock"
_SWEEP_EVERY_S = 60.0
_UPLOAD_AGE_S = 15 * 60.0
# Browsers choose a player by the suffix; anything else is offered for download only.
_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .webm .mkv .ogv .wav .mp3 .m4a .aac .ogg .oga .opus .flac".split()
    + ".png .jpg .jpeg .gif .webp".split()
)


class Store:
    """The folder of one run. `max_bytes`: what all files in it may take together.

    `also_sweep`: called once a minute, with the sweep of the uploads.
    """

    def __init__(self, max_bytes: float, *, parent: Path | None = None) -> None:
        self.max_bytes = max_bytes
        remove_abandoned(parent)
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent)).resolve()
        self._lock = _locked(self.root / _LOCK)
        self.uploads = self.root / "uploads"
        self.uploads.mkdir(mode=0o700)
        self._taken: dict[Path, Path] = {}
        self._reserved = 0
        # No file is moved while the files are counted: one could be missed.
        self._counting = threading.Lock()
        self._closed = threading.Event()
        self.also_sweep: list[Callable[[], None]] = []
        threading.Thread(target=self._sweep_regularly, name="demo-sweep", daemon=True).start()

    def new_folder(self) -> Path:
        """A folder for one visitor; its name can't be guessed, since whoever knows it may read it."""
        folder = self.root / "visitors" / secrets.token_hex(16)
        folder.mkdir(mode=0o700, parents=True)
        return folder

    def uploaded(self, files: Any) -> tuple[list[Path], list[str]]:
        """Paths and shown names of what a client says it uploaded, as Gradio's file data.

        InputError for anything else: a hostile client may name any file.
        """
        if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
            raise InputError("expected a list of uploaded files")
        paths = [self.check_upload(str(file.get("path"))) for file in files]
        given = [str(file.get("orig_name") or path.name) for file, path in zip(files, paths, strict=True)]
        return paths, [name.replace("\\", "/").rpartition("/")[2][:200] or "clip" for name in given]

    def check_upload(self, path: str) -> Path:
        """The path of an uploaded file; InputError if it isn't one."""
        try:
            real = Path(path).resolve()
            there = real if real.exists() else self._taken.get(real)
        except (OSError, ValueError, RuntimeError):
            there = None
        if there is None or not there.exists():
            raise InputError("the uploaded file is gone; upload it again")
        if self.uploads not in real.parents or not there.is_file():
            raise InputError("only uploaded files can be opened; upload the file")
        return real

    def take(self, upload: Path, folder: Path, number: int, *, shown: bool = False) -> Path:
        """Moves an uploaded file into a visitor's folder, under a name of our own.

        Equal files of two visitors are one upload: the second takes it from where the first has put it.
        `shown`: the page is about to play the upload, so it stays as well, until `drop`.
        """
        suffix = upload.suffix.lower()
        place = folder / f"{number}{suffix if suffix in _SUFFIXES else '.bin'}"
        try:
            with self._counting:
                if not upload.exists():
                    os.link(self._taken[upload], place)
                elif shown:
                    os.link(upload, place)
                else:
                    os.replace(upload, place)
        except KeyError:
            raise InputError("the uploaded file is gone; upload it again") from None
        except OSError as error:
            raise CrabError(f"the upload can't be kept ({error.strerror}); upload it again") from error
        os.chmod(place, 0o600)
        self._taken = {old: new for old, new in self._taken.items() if new.exists()} | {upload: place}
        if not shown:
            self.drop(upload)
        return place

    def give_back(self, places: Sequence[Path], uploads: Sequence[Path]) -> None:
        """Undoes `take`, so that the same uploads can be taken once more."""
        with self._counting, contextlib.suppress(OSError):
            for place, upload in zip(places, uploads, strict=True):
                if not upload.exists():
                    upload.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    os.link(place, upload)

    def drop(self, upload: Path) -> None:
        """Removes an upload, if it is still there, and its folder."""
        with contextlib.suppress(OSError):
            upload.unlink(missing_ok=True)
            upload.parent.rmdir()

    @contextlib.contextmanager
    def reserved(self, size: int) -> Iterator[bool]:
        """Keeps room for `size` more bytes while the block lasts; gives False if they don't fit.

        What arrives meanwhile lies in the folder as well, so it counts twice until the block ends.
        """
        with self._counting:
            fits = self.used() + self._reserved + size <= self.max_bytes
            self._reserved += size if fits else 0
        try:
            yield fits
        finally:
            with self._counting:
                self._reserved -= size if fits else 0

    def used(self) -> int:
        """Bytes of all files in the folder."""
        total = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def remove(self, folder: Path) -> None:
        """Removes a visitor's folder."""
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self, older_than_s: float = _UPLOAD_AGE_S) -> None:
        """Removes uploads that nobody opened."""
        limit = time.time() - older_than_s
        for entry in list(self.uploads.iterdir()):
            with contextlib.suppress(OSError):
                if entry.lstat().st_mtime < limit:
                    shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _sweep_regularly(self) -> None:
        while not self._closed.wait(_SWEEP_EVERY_S):
            for sweep in (self.sweep, *self.also_sweep):
                with contextlib.suppress(OSError):
                    sweep()

    def close(self) -> None:
        """Removes everything."""
        self._closed.set()
        shutil.rmtree(self.root, ignore_errors=True)
        self._lock.close()


def _locked(path: Path) -> IO[str]:
    file = path.open("a")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def remove_abandoned(parent: Path | None = None) -> None:
    """Removes this user's folders of runs that have ended without tidying up."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.getuid():
                continue
            # Without a lock file yet, it is being made at this moment.
            with (folder / _LOCK).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            continue
