"""Which expert spoke: the weights of every router of the decoder, for every token of one answer.

A router belongs to one adapted linear and mixes its experts by g = softmax(R x), anew for every token.
`Session.ask(..., router=True)` puts a `RouterTrace` in `Answer.router`.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from crab_edge.errors import InputError
from crab_edge.staging import staged_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

Modality = Literal["text", "video", "image", "audio", "answer"]
MODALITIES: tuple[Modality, ...] = ("text", "video", "image", "audio", "answer")
VERSION = 1
SUFFIXES = (".npz", ".jsonl")


@dataclass(frozen=True, eq=False)
class RouterTrace:
    """Router weights of one prompt with its answer; of a clip in several windows, one after the other.

    `weights` float32 [layers, tokens, experts], each row a softmax. `layers` are the module paths of the
    linears that the routers belong to, such as "layers.0.self_attn.q_proj": linears that share an input are
    one group in the graph, but each has a router of its own. `tokens` is the text of each token: joined it is
    the text; "" for media, and where a character is spread over several tokens, before the last of them.
    `modality` says what a token stands for: "text" is all of the prompt but the media. `windows` are the
    indices of each window's first token.

    InputError when the sizes don't fit together.
    """

    layers: tuple[str, ...]
    weights: NDArray[np.float32] = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    modality: tuple[str, ...] = field(repr=False)
    windows: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        shape = self.weights.shape
        expected = (len(self.layers), len(self.tokens))
        fits = len(shape) == 3 and shape[:2] == expected and 0 not in shape
        if not fits or len(self.modality) != len(self.tokens) or self.weights.dtype != np.float32:
            raise InputError(
                f"router weights {self.weights.dtype} {shape} with {len(self.layers)} layers, "
                f"{len(self.tokens)} tokens and {len(self.modality)} modalities; expected float32 "
                "[layers, tokens, experts], none of them 0"
            )
        unknown = sorted(set(self.modality) - set(MODALITIES))
        if unknown:
            raise InputError(f"unknown modality {unknown[0]!r}; expected one of {', '.join(MODALITIES)}")
        starts = self.windows
        if not starts or starts[0] != 0 or list(starts) != sorted({*starts}) or starts[-1] >= expected[1]:
            raise InputError(f"windows {starts}: expected rising indices from 0, below {expected[1]}")

    @property
    def experts(self) -> int:
        """Number of experts."""
        return int(self.weights.shape[2])

    def mean_by_modality(self) -> dict[str, NDArray[np.float32]]:
        """Mean weights float32 [layers, experts] of the tokens of each modality that occurs."""
        kinds = np.array(self.modality)
        return {
            name: self.weights[:, kinds == name].mean(axis=1, dtype=np.float64).astype(np.float32)
            for name in MODALITIES
            if name in self.modality
        }

    def summary(self) -> dict[str, Any]:
        """Sizes, and the mean weight of each expert by modality over all layers: plain JSON values."""
        means = {
            name: [round(float(value), 4) for value in mean.mean(axis=0)]
            for name, mean in self.mean_by_modality().items()
        }
        return {
            "layers": len(self.layers),
            "tokens": len(self.tokens),
            "experts": self.experts,
            "mean_by_modality": means,
        }

    @classmethod
    def join(cls, traces: Sequence[RouterTrace]) -> RouterTrace:
        """Traces of several windows as one. InputError when their layers or experts differ."""
        first = traces[0]
        if len(traces) == 1:
            return first
        for other in traces[1:]:
            if other.layers != first.layers or other.experts != first.experts:
                raise InputError("traces of different models can't be joined")
        starts, total = [], 0
        for trace in traces:
            starts += [total + start for start in trace.windows]
            total += len(trace.tokens)
        return cls(
            layers=first.layers,
            weights=np.concatenate([trace.weights for trace in traces], axis=1),
            tokens=tuple(text for trace in traces for text in trace.tokens),
            modality=tuple(name for trace in traces for name in trace.modality),
            windows=tuple(starts),
        )

    def save(self, path: str | Path) -> None:
        """`save_npz` or `to_jsonl`, by the suffix. InputError for another one."""
        check_path(path)
        if Path(path).suffix == ".npz":
            self.save_npz(path)
        else:
            self.to_jsonl(path)

    def save_npz(self, path: str | Path) -> None:
        """Writes the fields as arrays of the same names (texts as unicode); nothing in it is pickled.

        Like all writers here it replaces the file at once or not at all. InputError when it can't be written.
        """
        arrays: dict[str, Any] = {
            "version": np.int64(VERSION),
            "weights": self.weights,
            "windows": np.array(self.windows, np.int64),
            **{name: np.array(getattr(self, name), np.str_) for name in ("layers", "tokens", "modality")},
        }
        _replace(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load_npz(cls, path: str | Path) -> RouterTrace:
        """Reads what `save_npz` wrote. InputError for anything else."""
        try:
            with np.load(path, allow_pickle=False) as data:
                if int(data["version"]) != VERSION:
                    raise InputError(f"{path}: router trace version {data['version']}, expected {VERSION}")
                texts = {name: tuple(map(str, data[name])) for name in ("layers", "tokens", "modality")}
                starts = tuple(map(int, data["windows"]))
                return cls(weights=data["weights"].astype(np.float32, copy=False), windows=starts, **texts)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"{path}: not a router trace ({reason}); write one with `ask --router`"
            ) from error

    def to_jsonl(self, path: str | Path) -> None:
        """One line with `layers`, `experts` and `windows`, then one line a token with its `weights`.

        A token's weights are [layers][experts], rounded to five digits.
        """
        header = {
            "type": "router",
            "version": VERSION,
            "layers": list(self.layers),
            "experts": self.experts,
            "windows": list(self.windows),
        }

        def write(file: IO[bytes]) -> None:
            file.write(_line(header))
            by_token = np.swapaxes(self.weights, 0, 1)
            for i, (text, name) in enumerate(zip(self.tokens, self.modality, strict=True)):
                weights = [[round(float(value), 5) for value in row] for row in by_token[i]]
                file.write(_line({"token": i, "text": text, "modality": name, "weights": weights}))

        _replace(path, write)


def check_path(path: str | Path) -> Path:
    """The path, if a trace can be written there; InputError for another suffix or an unusable folder."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path}: a router trace is written as {' or '.join(SUFFIXES)}; name such a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} doesn't exist; create it first")
    if path.is_dir():
        raise InputError(f"{path}: a folder; name a file in it")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: the folder {path.parent} can't be written to; choose another one")
    return path


def _line(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _replace(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets `write` fill a file beside `path`, then puts it there."""
    try:
        with staged_file(path, overwrite=True) as part, part.open("wb") as file:
            write(file)
    except OSError as error:
        raise InputError(
            f"{path}: the router trace can't be written ({error.strerror}); choose another place"
        ) from error
