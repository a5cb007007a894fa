"""Calibration: float weights and what was seen at their inputs -> low-bit weights and an error report."""

from .gptq import quantize_gptq
from .report import LinearError, QuantisationReport
from .residual import quantize_planes
from .rtn import quantize_rows, quantize_rtn

__all__ = [
    "LinearError",
    "QuantisationReport",
    "quantize_gptq",
    "quantize_planes",
    "quantize_rows",
    "quantize_rtn",
]
