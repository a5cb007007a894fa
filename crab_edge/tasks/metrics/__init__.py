"""The official metrics, each with its trivial baselines. A module adds one by its tuple `METRICS`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from crab_edge.errors import TaskError
from crab_edge.tasks.metrics.base import Figure, Metric, Sample, whole_seconds

__all__ = ["Figure", "Metric", "Sample", "get", "whole_seconds"]


@lru_cache(maxsize=1)
def _metrics() -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    for module in pkgutil.iter_modules(__path__):
        for metric in getattr(importlib.import_module(f"{__name__}.{module.name}"), "METRICS", ()):
            metrics[metric.name] = metric
    return metrics


def get(name: str) -> Metric:
    """The metric of that name; TaskError lists the names."""
    metrics = _metrics()
    if name not in metrics:
        raise TaskError(f"unknown metric {name!r}; the metrics are {', '.join(sorted(metrics))}")
    return metrics[name]
