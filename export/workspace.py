"""The work folder of an export: what is finished stays there, so that a killed export goes on where it was.

It lies beside the output as `.NAME.export`, on the same disk, so that publishing is a rename:

    lock           held while an export runs
    journal.json   the inputs' identity, and for every finished step what it left
    steps/         the graph of every finished step
    state/         arrays that later steps need: hidden states, answers, moments
    bundle/        the files of the bundle so far

A step is finished once its files are on the disk and the journal says so. What the journal says is believed
only after sizes and hashes were compared.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import InputError, ModelError

JOURNAL = "journal.json"
_CHUNK = 1 << 22


def place(out: Path) -> Path:
    """The work folder of the bundle `out`."""
    return out.parent / f".{out.name}.export"


class Workspace:
    """Context manager over the work folder of `out`.

    identity: what the work depends on. A folder with another identity is emptied: `restarted` says so.
    A bad model or adapter leaves no folder behind, and neither does success (`finish`); a kill, an interrupt
    or a full disk leaves it for the next run.
    Raises InputError when another export is writing the same bundle.
    """

    def __init__(self, out: Path, identity: dict[str, Any]) -> None:
        self.folder = place(out)
        self.bundle = self.folder / "bundle"
        self.identity = json.loads(json.dumps(identity))
        self.restarted = False
        self.resumed = 0
        self._lock: BinaryIO | None = None
        self._steps: dict[str, dict[str, Any]] = {}
        self._finished = False

    def __enter__(self) -> Workspace:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("wb")
        except OSError as error:
            raise InputError(
                f"{self.folder.parent}: can't be written ({error.strerror}); choose another --out"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"{self.folder}: another export is writing this bundle; wait for it or choose another --out"
            ) from None
        self._steps = self._read()
        self.resumed = len(self._steps)
        if not self._steps:
            self._empty()
        for name in ("bundle", "steps", "state"):
            (self.folder / name).mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Other weights than those that were begun with won't be asked for again; a full disk may be cleared.
        useless = isinstance(error, ModelError) or (isinstance(error, InputError) and not self._steps)
        if self._finished or useless:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def finish(self) -> None:
        """The bundle was published: the folder goes when the context ends."""
        self._finished = True

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            content = json.loads((self.folder / JOURNAL).read_bytes())
            steps = content["steps"]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        if content.get("identity") != self.identity:
            self.restarted = True
            return {}
        return dict(steps)

    def _empty(self) -> None:
        for entry in self.folder.iterdir():
            if entry.name == "lock":
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def entry(self, step: str) -> dict[str, Any] | None:
        """What a finished step noted, or None. If files that it left changed, it isn't finished."""
        entry = self._steps.get(step)
        if entry is None:
            return None
        for name, (begin, end, digest) in entry["files"].items():
            if not _unchanged(self.folder / name, begin, end, digest):
                del self._steps[step]
                return None
        return dict(entry["note"])

    def done(
        self,
        step: str,
        note: dict[str, Any] | None = None,
        files: dict[str, tuple[int, int, str]] | None = None,
    ) -> None:
        """Note a finished step. files: path in the folder -> begin, end and sha256 of the bytes it wrote.

        They must be on the disk.
        """
        self._steps[step] = {"note": note or {}, "files": files or {}}
        content = {"identity": self.identity, "steps": self._steps}
        self._write(self.folder / JOURNAL, json.dumps(content).encode())

    def keep(self, name: str, content: bytes) -> dict[str, tuple[int, int, str]]:
        """Write a small file whole and to the disk; returns it in the form that `done` takes."""
        self._write(self.folder / name, content)
        return {name: (0, len(content), hashlib.sha256(content).hexdigest())}

    def keep_arrays(self, name: str, arrays: dict[str, NDArray[Any]]) -> dict[str, tuple[int, int, str]]:
        """Write arrays under `name` (.npz, no pickles); see `keep`."""
        path = self.folder / name
        temporary = path.with_name(f"{path.name}.new")
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
        size = path.stat().st_size
        return {name: (0, size, _digest(path, 0, size))}

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """What `keep_arrays` wrote."""
        with np.load(self.folder / name, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    def array(self, name: str, key: str) -> NDArray[Any]:
        """One array of what `keep_arrays` wrote."""
        with np.load(self.folder / name, allow_pickle=False) as file:
            return file[key]

    def has(self, name: str) -> bool:
        """Whether a state file is there."""
        return (self.folder / name).is_file()

    def forget(self, step: str) -> None:
        """A step that has to be done again."""
        self._steps.pop(step, None)

    def drop(self, name: str) -> None:
        """Remove a state file that no later step needs."""
        (self.folder / name).unlink(missing_ok=True)

    def _write(self, path: Path, content: bytes) -> None:
        temporary = path.with_name(f"{path.name}.new")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def digest_of(path: Path) -> tuple[int, int, str]:
    """A whole file in the form that `Workspace.done` takes, after bringing it to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    size = path.stat().st_size
    return 0, size, _digest(path, 0, size)


def _unchanged(path: Path, begin: int, end: int, digest: str) -> bool:
    try:
        return path.stat().st_size >= end and _digest(path, begin, end) == digest
    except OSError:
        return False


def _digest(path: Path, begin: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            block = file.read(min(_CHUNK, end - begin))
            if not block:
                break
            digest.update(block)
            begin += len(block)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity_of(files: list[Path]) -> dict[str, Any]:
    """Sizes, times and contents of input files: all of a small one, the first and last MB of a large one."""
    out: dict[str, Any] = {}
    for path in sorted(set(files)):
        stat = path.stat()
        size, edge = stat.st_size, 1 << 20
        spans = [(0, size)] if size <= 64 << 20 else [(0, edge), (size - edge, size)]
        digests = [_digest(path, *span) for span in spans]
        out[str(path.resolve())] = [size, stat.st_mtime_ns, *digests]
    return out
