"""Activation statistics: second moments of every linear's input, over real inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Wanted = Callable[[str, int], bool]


class InputMoments:
    """Running means of x x^T, or of its diagonal only, by module name."""

    def __init__(self, full: Wanted) -> None:
        self.enabled = True
        self._full = full
        self._sums: dict[str, torch.Tensor] = {}
        self._rows: dict[str, int] = {}

    def add(self, name: str, x: torch.Tensor) -> None:
        """Count inputs [..., K] of the linear `name`, unless `enabled` is off."""
        if not self.enabled:
            return
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        total = rows.T @ rows if self._full(name, rows.shape[1]) else rows.square().sum(dim=0)
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._rows[name] = self._rows.get(name, 0) + len(rows)

    def moments(self) -> dict[str, NDArray[np.float32]]:
        """float32 [K, K] where wanted in full, else [K] (mean squares), of the linears that saw any input."""
        return {
            name: (total / self._rows[name]).cpu().numpy()
            for name, total in self._sums.items()
            if self._rows[name]
        }


@contextmanager
def input_moments(model: nn.Module, full: Wanted = lambda name, width: False) -> Iterator[InputMoments]:
    """Watch every `nn.Linear` of `model` inside the `with` block.

    full(name, K): whether to keep all of x x^T for a linear, K^2 floats, or its diagonal only. Names are
    those of `named_modules()`; PEFT's prefix and `.base_layer` are removed, so an adapted linear appears
    under the name of the linear it wraps. The adapter's own linears are left out (they share its input).
    """
    seen = InputMoments(full)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            clean = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            hooks.append(
                module.register_forward_pre_hook(lambda _, inputs, clean=clean: seen.add(clean, inputs[0]))
            )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
