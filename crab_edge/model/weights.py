"""The safetensors files of a directory: their index, their headers, and single tensors read on demand.

Files are mapped by the safetensors library and unmapped again after every read, so that resident memory
grows by the tensor that was read and not by what was read before. What is broken is a ModelError before any
weight is used.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge.errors import InputError, ModelError
from crab_edge.staging import current_umask
from crab_edge.weight_names import OTHER_PARTS, canonical

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]
DTYPES = ("BF16", "F16", "F32")
SHOWN = 5
"""How many names of each kind an error lists; it always says how many there are."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its name there, its shape and its safetensors dtype, one of `DTYPES`."""

    file: Path
    name: str
    shape: Shape
    dtype: str


class WeightFiles:
    """The tensors of a directory by canonical name; iterating gives the names in the files' order.

    Reads `<stem>.safetensors`, else the files that `<stem>.safetensors.index.json` names, else all
    `<stem>*.safetensors`. The talker and token2wav of Qwen2.5-Omni are left aside, and files that hold
    nothing else may be absent. Raises ModelError for a missing, truncated or unreadable file and for names
    that mean the same weight twice.
    """

    def __init__(self, directory: Path | str, stem: str = "model") -> None:
        self.directory = Path(directory)
        self.stored: dict[str, Stored] = {}
        for file in _files(self.directory, stem):
            for entry in _header(file):
                name = canonical(entry.name)
                if name in self.stored:
                    first = self.stored[name]
                    raise ModelError(
                        f"{self.directory} holds {name} twice: as {first.name} in {first.file.name} and as "
                        f"{entry.name} in {file.name}; keep one copy of the model in the directory"
                    )
                self.stored[name] = entry

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def entry(self, name: str) -> Stored:
        """Where a tensor lies; ModelError for a name that no file has."""
        if name not in self.stored:
            raise ModelError(
                f"{self.directory}: holds no weight {name}; its config doesn't describe these weights"
            )
        return self.stored[name]

    def shapes(self) -> dict[str, Shape]:
        """Canonical name -> shape."""
        return {name: entry.shape for name, entry in self.stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype. It is mapped privately: writing to it doesn't change the file."""
        return self._read(name, None)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor."""
        return self._read(name, slice(start, stop))

    def _read(self, name: str, rows: slice | None) -> torch.Tensor:
        from safetensors import SafetensorError, safe_open

        entry = self.entry(name)
        try:
            with safe_open(entry.file, framework="pt") as tensors:
                return tensors.get_tensor(entry.name) if rows is None else tensors.get_slice(entry.name)[rows]
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{entry.file}: can't be read any more ({error}); was it replaced?") from None


def check_finite(tensor: torch.Tensor, name: str, where: Path | str) -> float:
    """The greatest magnitude in a tensor; ModelError if it holds NaN or infinity. No copy is made."""
    import torch

    if not tensor.numel():
        return 0.0
    edges = torch.stack(torch.aminmax(tensor))
    if not torch.isfinite(edges).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise ModelError(
            f"{where}: {name} holds NaN or infinity in {bad:,} of {tensor.numel():,} values; "
            "the file is damaged or its training diverged: use another checkpoint"
        )
    return float(edges.abs().max())


def check_weights(
    found: Mapping[str, Shape],
    expected: Mapping[str, Shape],
    where: Path | str,
    hint: str = "its config doesn't describe these weights, or the copy is incomplete",
) -> None:
    """ModelError listing what is missing, unknown or misshapen, at most `SHOWN` names each, and how many."""
    missing = [f"{n} {list(expected[n])}" for n in expected if n not in found]
    unknown = [f"{n} {list(found[n])}" for n in found if n not in expected]
    misshapen = [
        f"{n} is {list(found[n])}, expected {list(shape)}"
        for n, shape in expected.items()
        if n in found and tuple(found[n]) != tuple(shape)
    ]
    kinds = (("missing", missing), ("misshapen", misshapen), ("unknown", unknown))
    parts = [f"{len(names):,} {kind}: {_some(names)}" for kind, names in kinds if names]
    if parts:
        raise ModelError(
            f"{where}: of {len(expected):,} expected weights {'; '.join(parts)}. Most likely {hint}"
        )


def save_tensors(tensors: Mapping[str, torch.Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file straight from the tensors' memory (mapped or not), without a copy of them.

    Raises InputError when the disk is full or the place can't be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), file, metadata=dict(metadata))
        # The library's files are private; these are as readable as the user's others.
        file.chmod(0o666 & ~current_umask())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file}: can't be written ({error}); free some space or choose another --out"
        ) from None


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _files(directory: Path, stem: str) -> list[Path]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _indexed(index)
    files = sorted(directory.glob(f"{stem}*.safetensors"))
    if files:
        return files
    if any(directory.glob("*.bin")):
        raise ModelError(f"{directory}: holds .bin files, expected {stem}*.safetensors: convert them first")
    raise ModelError(f"no {stem}*.safetensors in {directory}: expected a directory of weights")


def _indexed(index: Path) -> list[Path]:
    """The files of an index that hold anything of the thinker."""
    try:
        places: Any = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(str(name), str(file)) for name, file in places.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: not a readable index of shards ({error!r}); copy it again") from None
    holds: dict[str, list[str]] = {}
    for name, file in pairs:
        if not _other(name):
            holds.setdefault(file, []).append(name)
    for file, names in holds.items():
        if Path(file).name != file:
            raise ModelError(f"{index}: names the file {file!r} outside its directory; copy it again")
        if not (index.parent / file).is_file():
            raise ModelError(
                f"{index} places {len(names):,} weights in {file}, which isn't there (first {names[0]}): "
                "the copy is incomplete, fetch that file"
            )
    return [index.parent / file for file in sorted(holds)]


def _header(file: Path) -> Iterable[Stored]:
    """The thinker's tensors in one file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if not _other(name):
                    part = tensors.get_slice(name)
                    entry = Stored(file, name, tuple(part.get_shape()), part.get_dtype())
                    if entry.dtype not in DTYPES:
                        raise ModelError(
                            f"{file}: {name} is {entry.dtype}, expected {', '.join(DTYPES)}: "
                            "give the float model, not a quantised one"
                        )
                    yield entry
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{file} is not a whole safetensors file ({_damage(file) or error}): copy it again"
        ) from None


def _other(name: str) -> bool:
    return name.removeprefix("module.").startswith(OTHER_PARTS)


def _damage(file: Path) -> str:
    """In bytes, what a truncated file lacks; empty if that isn't what is wrong."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, 100_000_000):
                return f"{size:,} bytes, less than its own header"
            header = json.loads(stream.read(length))
        whole = 8 + length + max(e["data_offsets"][1] for n, e in header.items() if n != "__metadata__")
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return ""
    return f"{size:,} of {whole:,} bytes" if size != whole else ""
