"""How far quantised weights are from the float ones, linear by linear."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK_WEIGHTS = 1 << 22


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
        running = self.start(name, bits, moment, method)
        rows = max(1, _CHUNK_WEIGHTS // max(1, weight.shape[1]))
        for begin in range(0, len(weight), rows):
            running.add(weight[begin : begin + rows], quantised[begin : begin + rows])
        return running.finish()

    def start(
        self, name: str, bits: int, moment: NDArray[np.float32] | None = None, method: str = "rtn"
    ) -> RunningError:
        """The same for a weight that comes in blocks of rows: `add` them, then `finish`."""
        return RunningError(self, name, bits, moment, method)

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


class RunningError:
    """The error of one weight, summed over its rows."""

    def __init__(
        self,
        report: QuantisationReport,
        name: str,
        bits: int,
        moment: NDArray[np.float32] | None,
        method: str,
    ) -> None:
        self._report, self._name, self._bits, self._moment, self._method = report, name, bits, moment, method
        self._norm = self._moved = 0.0
        self._weights = 0

    def add(self, weight: NDArray[np.float32], quantised: NDArray[np.float32]) -> None:
        """Rows [n, K] and what became of them."""
        self._norm += _energy(weight, self._moment)
        self._moved += _energy(weight - quantised, self._moment)
        self._weights += weight.size

    def finish(self) -> float:
        """Record the weight; returns its error."""
        error = float(np.sqrt(self._moved / self._norm)) if self._norm > 0 else 0.0
        entry = LinearError(self._name, self._bits, self._weights, error, self._method)
        self._report.linears.append(entry)
        return error


def _energy(weight: NDArray[np.float32], moment: NDArray[np.float32] | None) -> float:
    """Mean of |W x|^2; |W|_F^2 when nothing is known of x."""
    if moment is None:
        return float(np.square(weight).sum())
    if moment.ndim == 1:
        return float((np.square(weight) @ moment).sum())
    return max(0.0, float(((weight @ moment) * weight).sum()))
