"""How far quantised weights are from the float ones, linear by linear."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class LinearError:
    """One weight [N, K]: its bits, the relative error, and the method that chose its codes."""

    name: str
    bits: int
    weights: int
    error: float
    method: str


@dataclass
class QuantisationReport:
    """Errors of all weights of an export, and their summary for the manifest.

    An error is |Y - Y'| / |Y| of the linear's output over the calibration inputs as far as their moment is
    known, else |W - Q|_F / |W|_F.
    """

    linears: list[LinearError] = field(default_factory=list)

    def add(
        self,
        name: str,
        bits: int,
        weight: NDArray[np.float32],
        quantised: NDArray[np.float32],
        moment: NDArray[np.float32] | None = None,
        method: str = "rtn",
    ) -> float:
        """Record one weight [N, K]; moment: mean of x x^T [K, K], or its diagonal [K]. Returns the error."""
        norm = _energy(weight, moment)
        error = float(np.sqrt(_energy(weight - quantised, moment) / norm)) if norm > 0 else 0.0
        self.linears.append(LinearError(name, bits, weight.size, error, method))
        return error

    def summary(self, worst: int = 3) -> dict[str, Any]:
        """By number of bits: how many weights, by which methods, the mean error (by tensor), the worst."""
        out: dict[str, Any] = {}
        for bits in sorted({entry.bits for entry in self.linears}):
            entries = [entry for entry in self.linears if entry.bits == bits]
            ranked = sorted(entries, key=lambda entry: -entry.error)
            out[f"{bits}-bit"] = {
                "tensors": len(entries),
                "weights": sum(entry.weights for entry in entries),
                "methods": dict(sorted(Counter(entry.method for entry in entries).items())),
                "mean_error": round(float(np.mean([entry.error for entry in entries])), 6),
                "worst": {entry.name: round(entry.error, 6) for entry in ranked[:worst]},
            }
        return out


def _energy(weight: NDArray[np.float32], moment: NDArray[np.float32] | None) -> float:
    """Mean of |W x|^2; |W|_F^2 when nothing is known of x."""
    if moment is None:
        return float(np.square(weight).sum())
    if moment.ndim == 1:
        return float((np.square(weight) @ moment).sum())
    return max(0.0, float(((weight @ moment) * weight).sum()))
