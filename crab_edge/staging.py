"""Output that appears whole or not at all: written beside its place, synced, renamed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crab_edge.errors import InputError


@contextmanager
def staged_folder(
    out: Path | str, *, overwrite: bool = False, ours: Callable[[Path], bool] = lambda folder: False
) -> Iterator[Path]:
    """Yields an empty folder beside `out` that becomes `out` when the block ends without an exception.

    Otherwise nothing is left and `out` is as it was. An empty folder at `out` is taken over. Raises
    InputError if `out` holds anything and `overwrite` is false, or if it isn't `ours` to replace.
    """
    out = Path(out).expanduser().absolute()
    _check_folder(out, overwrite, ours)
    made = _make_parents(out)
    folder: Path | None = None
    try:
        with _writable(out):
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
            # mkdtemp makes a private folder; the result is as readable as the user's other files.
            folder.chmod(0o777 & ~current_umask())
        yield folder
        with _writable(out):
            for path in [*folder.rglob("*"), folder]:
                sync(path)
            _check_folder(out, overwrite, ours)
            replace_folder(folder, out)
            sync(out.parent)
        made = []
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


@contextmanager
def staged_file(out: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a path beside `out` for a file that becomes `out` when the block ends without an exception.

    Raises InputError if `out` exists and `overwrite` is false, or if it is a folder.
    """
    out = Path(out).expanduser().absolute()
    if out.is_dir():
        raise InputError(f"{out}: is a folder, expected a file's name; choose another --out")
    if os.path.lexists(out) and not overwrite:
        raise InputError(f"{out}: already exists; choose another --out or add --overwrite")
    made = _make_parents(out)
    folder: Path | None = None
    try:
        with _writable(out):
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield folder / out.name
        with _writable(out):
            sync(folder / out.name)
            os.replace(folder / out.name, out)
            sync(out.parent)
        made = []
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


def check_space(out: Path | str, needed: int, what: str) -> None:
    """InputError unless the disk of `out` has `needed` bytes free for `what`."""
    place = Path(out).expanduser().absolute().parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise InputError(
            f"{place}: {what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space or choose another --out"
        )


def current_umask() -> int:
    """The process's umask: which permissions new files don't get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_folder(out: Path, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        return
    if not overwrite:
        raise InputError(f"{out}: already exists; choose another --out or add --overwrite")
    if out.is_symlink() or not out.is_dir() or not ours(out):
        raise InputError(f"{out}: exists and isn't what this command writes; it stays. Choose another --out")


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{out}: can't be written ({error.strerror or error}); choose another place"
        ) from None


def _make_parents(out: Path) -> list[Path]:
    """The parents that had to be made, innermost first."""
    missing = [parent for parent in out.parents if not parent.exists()]
    with _writable(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def replace_folder(folder: Path, out: Path) -> None:
    """Renames `folder` to `out`; what was there steps aside first and comes back if that fails."""
    if not out.exists():
        os.rename(folder, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    os.rename(out, aside / "old")
    try:
        os.rename(folder, out)
    except BaseException:
        os.rename(aside / "old", out)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
