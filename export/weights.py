"""Reading a model's weights one linear at a time, straight from its safetensors files.

Nothing here builds the torch model: the largest thing in memory is one linear, so a 7B model exports on a
machine that couldn't hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.weight_names import canonical

if TYPE_CHECKING:
    import torch

    from crab_edge.model.weights import WeightFiles

Floats = NDArray[np.float32]
__all__ = ["Adapter", "Floats", "Linear", "WeightStore", "canonical"]


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


class WeightStore:
    """The weights of a model directory and of an optional adapter directory, by canonical name.

    Opening reads headers only, and checks that the files hold exactly what the model's configuration and the
    adapter's say; ModelError names what is missing, unknown or misshapen. Reading gives float32 whatever the
    files hold, and refuses NaN and infinity. Nothing stays mapped between two reads.
    """

    def __init__(self, model_dir: Path, adapter_dir: Path | None = None) -> None:
        from crab_edge.model.adapter import adapter_config, check_adapter_files, matching_linears
        from crab_edge.model.base import check_base, load_config, on_meta

        self.model_dir = Path(model_dir)
        self.adapter_dir = Path(adapter_dir) if adapter_dir is not None else None
        self.adapter_config: dict[str, Any] = {}
        config = load_config(self.model_dir)
        self._base: WeightFiles = check_base(self.model_dir, config)
        self._adapter: WeightFiles | None = None
        self._linears: list[str] = []
        if self.adapter_dir is not None:
            adapter = adapter_config(self.adapter_dir)
            self.adapter_config = adapter.to_dict()
            linears = matching_linears(on_meta(config), adapter)
            self._adapter = check_adapter_files(self.adapter_dir, adapter, linears)
            self._linears = sorted(linears)

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, *unused: object) -> None:
        """Nothing is held open; the form is kept for callers that think in sessions."""

    @property
    def scaling(self) -> float:
        """s = alpha / r of the adapter."""
        return float(self.adapter_config["lora_alpha"]) / int(self.adapter_config["r"])

    def adapted(self) -> list[str]:
        """Canonical paths of the linears that the adapter has weights for, zero ones included."""
        return list(self._linears)

    @cached_property
    def zero_linears(self) -> list[str]:
        """Those of `adapted` whose experts are all exactly zero: no-ops, which `linear` leaves out.

        Known before anything is exported; a linear that isn't zero costs the reading of a few rows.
        """
        return [path for path in self._linears if self._is_zero(path)]

    def n_parameters(self) -> int:
        """Parameters of base and adapter together, from the files' headers."""
        files = [self._base] if self._adapter is None else [self._base, self._adapter]
        return sum(int(np.prod(s, dtype=np.int64)) for each in files for s in each.shapes().values())

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a base weight, without reading it."""
        return self._base.entry(name).shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all base weights by canonical name."""
        return self._base.shapes()

    def adapter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The same of the adapter's weights."""
        return {} if self._adapter is None else self._adapter.shapes()

    def files(self) -> list[Path]:
        """The safetensors files that are read."""
        opened = [self._base] if self._adapter is None else [self._base, self._adapter]
        return sorted({entry.file for files in opened for entry in files.stored.values()})

    def array(self, name: str) -> Floats:
        """A base weight as float32."""
        return _floats(self._base.tensor(name), name, self.model_dir)

    def rows(self, name: str, begin: int, end: int) -> Floats:
        """Rows begin..end of a base weight as float32; nothing else of it is read."""
        return _floats(self._base.rows(name, begin, end), name, self.model_dir)

    def linear(self, path: str) -> Linear:
        """The linear at `path` (without `.weight`), with its adapter if that does anything."""
        weight = self.array(f"{path}.weight")
        if weight.ndim > 2:  # a convolution whose kernel is its stride
            weight = weight.reshape(len(weight), -1)
        bias = self.array(f"{path}.bias") if f"{path}.bias" in self._base else None
        return Linear(path, weight, bias, self._read_adapter(path))

    def adapter_array(self, name: str) -> Floats:
        """A weight of the adapter as float32, e.g. `language_model.layers.0.mlp.up_proj.lora_B1.weight`."""
        assert self._adapter is not None and self.adapter_dir is not None
        return _floats(self._adapter.tensor(name), name, self.adapter_dir)

    def _read_adapter(self, path: str) -> Adapter | None:
        if self._adapter is None or f"{path}.lora_A.weight" not in self._adapter:
            return None
        if path in self.zero_linears:
            return None
        down, route = (self.adapter_array(f"{path}.{part}.weight") for part in ("lora_A", "lora_route"))
        up = np.concatenate([self.adapter_array(f"{path}.{part}.weight") for part in self._experts()], axis=1)
        up *= np.float32(self.scaling)
        return Adapter(down, route, up)

    def _experts(self) -> list[str]:
        return [f"lora_B{i}" for i in range(int(self.adapter_config["num_experts"]))]

    def _is_zero(self, path: str) -> bool:
        assert self._adapter is not None
        for part in self._experts():
            name = f"{path}.{part}.weight"
            # The first row of an expert that isn't zero nearly always tells.
            if self._adapter.rows(name, 0, 1).any() or self._adapter.tensor(name).any():
                return False
        return True


def _floats(tensor: torch.Tensor, name: str, where: Path) -> Floats:
    import torch

    from crab_edge.model.weights import check_finite

    check_finite(tensor, name, where)
    # The copy lets go of the mapped file, also where it holds float32 already.
    return tensor.to(torch.float32, copy=True).numpy()
