"""A bundle: one folder with graphs, embedding, tokenizer and a manifest that vouches for them.

It is written once (`BundleWriter`) and never edited. `Bundle.open` believes nothing it has not checked:
names, sizes, hashes, versions. There is no pickle anywhere.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from crab_edge.bundle_writer import BundleWriter
from crab_edge.errors import BundleError, InputError
from crab_edge.manifest import COPY_AGAIN, MANIFEST_NAME, Manifest, read_manifest
from crab_edge.memo import Memo

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crab_edge.features import FeatureConfig
    from crab_edge.prompt import PromptBuilder

__all__ = ["Bundle", "BundleWriter", "Embedding", "default_bundle", "file_sha256", "sample_clip"]

ALWAYS_HASHED = 64 << 20


def default_bundle() -> Path:
    """The small bundle that ships inside the package. Raises BundleError if this install has none."""
    path = Path(__file__).parent / "assets" / "crab-nano"
    if not (path / MANIFEST_NAME).is_file():
        raise BundleError(f"{path}: this install carries no default bundle; name one with --bundle")
    return path


def sample_clip() -> Path:
    """The ten-second clip that ships inside the package. Raises InputError if this install has none."""
    path = Path(__file__).parent / "assets" / "sample.mp4"
    if not path.is_file():
        raise InputError(f"{path}: this install carries no sample clip; give a media file of your own")
    return path


class Embedding:
    """Token embeddings read by row from a memory-mapped file: nothing is loaded that isn't asked for.

    The file is int8 [V, H] followed by float32 scales [V] (`bits` 8), or float32 [V, H] (`bits` 32).
    """

    def __init__(self, path: Path, vocab_size: int, hidden_size: int, bits: int) -> None:
        import numpy as np

        size = vocab_size * hidden_size * (bits // 8) + (4 * vocab_size if bits == 8 else 0)
        actual = path.stat().st_size
        if actual != size:
            raise BundleError(
                f"{path}: expected {size} bytes for {vocab_size} x {hidden_size} at {bits} bits, "
                f"got {actual}; {COPY_AGAIN}"
            )
        self._rows = np.memmap(
            path, dtype=np.int8 if bits == 8 else np.float32, mode="r", shape=(vocab_size, hidden_size)
        )
        self._scales = None
        if bits == 8:
            offset = vocab_size * hidden_size
            self._scales = np.memmap(path, dtype=np.float32, mode="r", offset=offset, shape=(vocab_size,))

    def rows(self, ids: NDArray[np.integer]) -> NDArray[np.float32]:
        """Embeddings of `ids` (int [S], each within the vocabulary) as float32 [S, H]."""
        import numpy as np

        if len(ids) and not 0 <= int(np.min(ids)) <= int(np.max(ids)) < len(self._rows):
            raise IndexError(f"token ids must lie in 0..{len(self._rows) - 1}")
        rows = self._rows[ids].astype(np.float32)
        if self._scales is not None:
            rows *= self._scales[ids][:, None]
        return rows


class Bundle:
    """An opened bundle: `path`, `manifest`, `features`, `prompt`, `embedding`. Made by `Bundle.open`."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(
        cls, path: str | Path, *, full: bool = False, progress: Callable[[str, int], None] | None = None
    ) -> Bundle:
        """Checks everything that can be checked without opening a graph.

        Files are hashed on every open up to 64 MB in all; a larger bundle is hashed once and remembered in
        the user's cache by path, size and time. `full` hashes regardless; `progress` gets (name, size) of
        each file.
        Raises BundleError with one line that names the file.
        """
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise BundleError(f"{folder}: no such bundle folder; give one made by `crab-edge export`")
        folder = folder.resolve()
        manifest = read_manifest(folder)
        _check_required_files(folder, manifest)
        _check_tree(folder, manifest)
        _check_versions(folder, manifest)
        _check_hashes(folder, manifest, full=full, progress=progress)
        return cls(folder, manifest)

    @property
    def identity(self) -> str:
        """`name/recipe@digest`: the same for equal bundles, whatever their place."""
        manifest = self.manifest
        return f"{manifest.model.name}/{manifest.recipe.name}@{manifest.digest[:12]}"

    @functools.cached_property
    def features(self) -> FeatureConfig:
        """The media settings in `features.json`."""
        from crab_edge.features import FeatureConfig

        return FeatureConfig.load(self.path / "features.json")

    @functools.cached_property
    def prompt(self) -> PromptBuilder:
        """The chat template with this bundle's tokenizer."""
        from crab_edge.prompt import PromptBuilder

        return PromptBuilder(self.path / "tokenizer.json", self.features)

    @functools.cached_property
    def embedding(self) -> Embedding:
        """The memory-mapped token embeddings."""
        model = self.manifest.model
        bits = self.manifest.recipe.embedding_bits
        return Embedding(self.path / "embedding.bin", model.vocab_size, model.hidden_size, bits)

    def graph(self, name: str) -> Path:
        """Path of the graph `decoder`, `audio` or `vision`."""
        return self.path / str(getattr(self.manifest.graphs, name))

    def graph_files(self, name: str) -> list[str]:
        """Which of the manifest's files are that graph and the data beside it."""
        graph = str(getattr(self.manifest.graphs, name))
        return [file for file in (graph, f"{graph}.data") if file in self.manifest.files]


def _check_required_files(folder: Path, manifest: Manifest) -> None:
    graphs = manifest.graphs
    always = ("tokenizer.json", "features.json", "embedding.bin")
    engines = [graph.file for engine in manifest.engines.values() for graph in engine.graphs.values()]
    for name in (*always, graphs.decoder, graphs.audio, graphs.vision, *engines):
        if name not in manifest.files:
            raise BundleError(f"{folder / MANIFEST_NAME}: lists no {name}; {COPY_AGAIN}")


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(Path(entry.path))
            else:
                yield entry


def _check_tree(folder: Path, manifest: Manifest) -> None:
    """The folder holds exactly the listed files, as plain files of the listed sizes."""
    found = set()
    for entry in _walk(folder):
        name = Path(entry.path).relative_to(folder).as_posix()
        if entry.is_symlink() or not entry.is_file(follow_symlinks=False):
            raise BundleError(f"{entry.path}: a bundle holds plain files only, no links; {COPY_AGAIN}")
        if name == MANIFEST_NAME:
            continue
        if name not in manifest.files:
            raise BundleError(f"{entry.path}: not listed in {MANIFEST_NAME}; remove it from the bundle")
        size, expected = entry.stat(follow_symlinks=False).st_size, manifest.files[name].size
        if size != expected:
            raise BundleError(f"{entry.path}: damaged (expected {expected} bytes, got {size}); {COPY_AGAIN}")
        found.add(name)
    missing = sorted(manifest.files.keys() - found)
    if missing:
        raise BundleError(f"{folder / missing[0]}: missing from the bundle; {COPY_AGAIN}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _check_versions(folder: Path, manifest: Manifest) -> None:
    """Packages that are installed must be new enough; one that is absent is the engine's business."""
    for package, wanted in manifest.requires.items():
        for name in (package, f"{package}-gpu"):
            try:
                actual = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            if _numbers(actual) < _numbers(wanted):
                raise BundleError(
                    f"{folder}: needs {name} {wanted}, but {actual} is installed; "
                    f"run `pip install '{name}{wanted}'`"
                )


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_hashes(
    folder: Path, manifest: Manifest, *, full: bool, progress: Callable[[str, int], None] | None
) -> None:
    memo = None if full or manifest.total_size <= ALWAYS_HASHED else Memo("hashes.json")

    def check(item: tuple[str, str]) -> None:
        name, expected = item
        path = folder / name
        if memo is None or not memo.knows(path, expected):
            try:
                actual = file_sha256(path)
            except OSError as error:
                raise BundleError(f"{path}: can't be read ({error.strerror}); {COPY_AGAIN}") from error
            if actual != expected:
                raise BundleError(
                    f"{path}: damaged (expected sha256 {expected[:12]}, got {actual[:12]}); {COPY_AGAIN}"
                )
            if memo is not None:
                memo.learn(path, expected)
        if progress:
            progress(name, manifest.files[name].size)

    items = sorted((name, info.sha256) for name, info in manifest.files.items())
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(check, items):
            pass
    if memo is not None:
        memo.save()
