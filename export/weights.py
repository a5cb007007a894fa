"""Reading a model's weights one linear at a time, straight from its safetensors files.

Nothing here builds the torch model: the largest thing in memory is one linear, so a 7B model exports on a
machine that couldn't hold it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import ModelError

Floats = NDArray[np.float32]
_WRAPPERS = re.compile(r"^(base_model\.model\.|module\.|thinker\.)+")
_ADAPTED = re.compile(r"(?P<path>.+)\.(?P<part>lora_route|lora_A|lora_B\d+)\.weight")


@dataclass(frozen=True)
class Adapter:
    """One linear's I-LoRA: down [r, K], route [N, K], up = s [B_0 | .. | B_{N-1}] [out, N*r]."""

    down: Floats
    route: Floats
    up: Floats

    @property
    def rank(self) -> int:
        """r."""
        return len(self.down)

    @property
    def experts(self) -> int:
        """N."""
        return len(self.route)


@dataclass(frozen=True)
class Linear:
    """weight [out, K], bias [out] or None; `adapter` is None where there is none or where every B is zero."""

    path: str
    weight: Floats
    bias: Floats | None
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, the name it has there, its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]

    def read(self, begin: int | None = None, end: int | None = None) -> Floats:
        """The tensor, or its rows begin..end, as float32.

        The file is mapped for this read only. A mapping that stayed would keep every page that was ever
        read in the process, in the end the whole model.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as tensors:
                if begin is None and end is None:
                    tensor = tensors.get_tensor(self.name)
                else:
                    tensor = tensors.get_slice(self.name)[begin:end]
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{self.file}: {self.name} can't be read ({error}); copy it again") from None
        values = tensor.to(torch.float32).numpy()
        if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise ModelError(
                f"{self.file}: {self.name} holds values that aren't finite; train or copy it again"
            )
        return values


def canonical(name: str) -> str:
    """A weight's name without wrappers, the same for both generations of transformers' names.

    `language_model.*`, `visual.*`, `audio_tower.*` and `lm_head.weight`.
    """
    name = _WRAPPERS.sub("", name)
    if not name.startswith("lm_head."):
        name = name.removeprefix("model.")
    # Older checkpoints call the decoder `model.*` only.
    if name.startswith(("layers.", "norm.", "embed_tokens.")):
        name = f"language_model.{name}"
    return name


class WeightStore:
    """The weights of a model directory and of an optional adapter directory, by canonical name.

    Use it as a context manager. Reading gives float32 whatever the files hold. Raises ModelError for what is
    missing or misshapen.
    """

    def __init__(self, model_dir: Path, adapter_dir: Path | None = None) -> None:
        self.model_dir = Path(model_dir)
        self.adapter_dir = Path(adapter_dir) if adapter_dir is not None else None
        self.adapter_config: dict[str, Any] = {}
        self._base: dict[str, Stored] = {}
        self._adapter: dict[str, Stored] = {}
        self._open(self._base, self.model_dir, "model*.safetensors")
        if self.adapter_dir is not None:
            self._open(self._adapter, self.adapter_dir, "adapter_model*.safetensors")
            path = self.adapter_dir / "adapter_config.json"
            try:
                self.adapter_config = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{path}: can't be read ({error}); give an adapter directory") from None
            if self.adapter_config.get("peft_type") != "ILORA":
                found = self.adapter_config.get("peft_type")
                raise ModelError(f"{path}: expected an I-LoRA adapter, got peft_type {found!r}")

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *unused: object) -> None:
        """Nothing is held open between two reads."""

    def _open(self, index: dict[str, Stored], folder: Path, pattern: str) -> None:
        from safetensors import SafetensorError, safe_open

        files = sorted(folder.glob(pattern))
        if not files:
            raise ModelError(f"{folder}: holds no {pattern}; give a directory written by training")
        for file in files:
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():
                        shape = tuple(tensors.get_slice(name).get_shape())
                        index[canonical(name)] = Stored(file, name, shape)
            except SafetensorError as error:
                raise ModelError(f"{file}: not a whole safetensors file ({error}); copy it again") from None

    @property
    def scaling(self) -> float:
        """s = alpha / r of the adapter."""
        return float(self.adapter_config["lora_alpha"]) / int(self.adapter_config["r"])

    def adapted(self) -> list[str]:
        """Canonical paths of the linears that the adapter files name."""
        matches = (_ADAPTED.fullmatch(name) for name in self._adapter)
        return sorted({match["path"] for match in matches if match})

    def n_parameters(self) -> int:
        """Parameters of base and adapter together, from the files' headers."""
        stored = [*self._base.values(), *self._adapter.values()]
        return sum(int(np.prod(entry.shape, dtype=np.int64)) for entry in stored)

    def files(self) -> list[Path]:
        """The safetensors files that are read."""
        stored = [*self._base.values(), *self._adapter.values()]
        return sorted({entry.file for entry in stored})

    @cached_property
    def zero_linears(self) -> list[str]:
        """Those of `adapted` whose experts are all exactly zero: no-ops, which `linear` leaves out."""
        return [path for path in self.adapted() if self._is_zero(path)]

    def _is_zero(self, path: str) -> bool:
        names = (f"{path}.lora_B{i}.weight" for i in range(int(self.adapter_config["num_experts"])))
        # The first row of an expert that isn't zero nearly always tells.
        return not any(
            self._adapter[name].read(0, 1).any() or self._adapter[name].read().any() for name in names
        )

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def array(self, name: str) -> Floats:
        """A base weight as float32."""
        return self._read(self._base, name, self.model_dir)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a base weight."""
        return self._stored(self._base, name, self.model_dir).shape

    def rows(self, name: str, begin: int, end: int) -> Floats:
        """Rows begin..end of a base weight as float32; nothing else of it is read."""
        return self._stored(self._base, name, self.model_dir).read(begin, end)

    def adapter_array(self, name: str) -> Floats:
        """One of the adapter's own weights as float32."""
        assert self.adapter_dir is not None
        return self._read(self._adapter, name, self.adapter_dir)

    def linear(self, path: str) -> Linear:
        """The linear at `path` (without `.weight`), with its adapter if that does anything."""
        weight = self.array(f"{path}.weight")
        if weight.ndim > 2:  # a convolution whose kernel is its stride
            weight = weight.reshape(len(weight), -1)
        bias = self.array(f"{path}.bias") if f"{path}.bias" in self._base else None
        return Linear(path, weight, bias, self._read_adapter(path, weight))

    def _read_adapter(self, path: str, weight: Floats) -> Adapter | None:
        if f"{path}.lora_A.weight" not in self._adapter:
            return None
        assert self.adapter_dir is not None

        def part(name: str) -> Floats:
            return self._read(self._adapter, f"{path}.{name}.weight", self.adapter_dir)

        down, route = part("lora_A"), part("lora_route")
        up = np.concatenate([part(f"lora_B{i}") for i in range(len(route))], axis=1)
        rank = int(self.adapter_config["r"])
        if down.shape != (rank, weight.shape[1]) or up.shape != (len(weight), rank * len(route)):
            raise ModelError(
                f"{self.adapter_dir}: the adapter of {path} has A {list(down.shape)} and B {list(up.shape)}, "
                f"which doesn't fit weights {list(weight.shape)} at rank {rank}; give this model's adapter"
            )
        if path in self.zero_linears:
            return None
        return Adapter(down, route, up * np.float32(self.scaling))

    def _read(self, index: dict[str, Stored], name: str, folder: Path) -> Floats:
        return self._stored(index, name, folder).read()

    def _stored(self, index: dict[str, Stored], name: str, folder: Path) -> Stored:
        if name not in index:
            raise ModelError(f"{folder}: holds no weight {name}; its config doesn't describe these weights")
        return index[name]
