"""Publishes a bundle atomically: written beside its place, hashed, synced, then renamed. All or nothing."""

from __future__ import annotations

import datetime
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from crab_edge.errors import InputError
from crab_edge.manifest import MANIFEST_NAME, FileInfo, Manifest, check_name
from crab_edge.staging import current_umask, replace_folder, sync

if TYPE_CHECKING:
    from crab_edge.bundle import Bundle


class BundleWriter:
    """Context manager that writes the bundle `out`.

        with BundleWriter(out) as writer:
            writer.path("decoder.onnx").write_bytes(...)
            writer.commit(manifest)

    Without `commit`, or on an exception, nothing is left and `out` is as it was. With `folder`, an existing
    folder beside `out`, the files go there and stay there when something fails: its owner cleans up. Raises
    InputError if `out` exists and `overwrite` is false, or if it exists and isn't a bundle.
    """

    def __init__(self, out: str | Path, overwrite: bool = False, folder: Path | None = None) -> None:
        self.out = Path(out).expanduser().absolute()
        self.overwrite = overwrite
        self._given = folder
        self._folder: Path | None = None

    def __enter__(self) -> BundleWriter:
        self.check_place()
        if self._given is not None:
            self._folder = self._given
            return self
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        except OSError as error:
            raise InputError(
                f"{self.out.parent}: can't be written ({error.strerror}); choose another --out"
            ) from error
        # mkdtemp makes a private folder; a bundle is as readable as the user's other files.
        self._folder.chmod(0o777 & ~current_umask())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._folder is not None and self._given is None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._folder = None

    def check_place(self) -> None:
        """Raises InputError if nothing may be published at `out`."""
        if not self.out.exists() and not self.out.is_symlink():
            return
        if not self.overwrite:
            raise InputError(f"{self.out}: already exists; choose another --out or add --overwrite")
        empty = self.out.is_dir() and not any(self.out.iterdir())
        if not empty and not (self.out / MANIFEST_NAME).is_file():
            raise InputError(f"{self.out}: exists and is no bundle; it stays. Choose another --out")

    @property
    def folder(self) -> Path:
        """The temporary folder that becomes the bundle."""
        if self._folder is None:
            raise RuntimeError("BundleWriter is used as a context manager, and commit ends it")
        return self._folder

    def path(self, name: str) -> Path:
        """Where to write the file `name` (a relative POSIX path); its folder exists afterwards."""
        check_name(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def preview(self, manifest: Manifest) -> Bundle:
        """The unpublished bundle as it stands, for an engine: to measure parity before `commit`."""
        from crab_edge.bundle import Bundle

        return Bundle(self.folder, manifest)

    def commit(self, manifest: Manifest) -> Path:
        """Fills in `files`, `created` and the digest, checks the whole, renames it to `out`.

        Raises BundleError (and publishes nothing) if the result couldn't be opened by this version.
        """
        from crab_edge.bundle import Bundle, file_sha256

        folder = self.folder
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != MANIFEST_NAME:
                name = path.relative_to(folder).as_posix()
                files[name] = FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        complete = manifest.model_copy(update={"files": files, "created": manifest.created or now})
        (folder / MANIFEST_NAME).write_text(complete.to_text(), encoding="utf-8")
        Bundle.open(folder, full=True)
        for path in [*folder.rglob("*"), folder]:
            sync(path)
        self.check_place()
        replace_folder(folder, self.out)
        self._folder = None
        sync(self.out.parent)
        return self.out
