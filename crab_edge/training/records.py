"""Records of AV-UIE v2 in micro-batches for an adapter: one record a row, every record once an epoch.

The records of all epochs stand in one line, each epoch shuffled on its own. Micro-batch i holds places
[i*batch, (i+1)*batch) of that line, whatever process makes it, so the same steps see the same records on any
number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from crab_edge.errors import CrabError
from crab_edge.features import FeatureConfig
from crab_edge.prompt import PromptBuilder
from crab_edge.training.data import Vocabulary, language_batch

_USED = ("ids", "positions", "segment", "targets", "pixels", "patches", "chunks", "lengths")


class Records(Protocol):
    """What is needed of the records (`avuie.AvuieScenes`)."""

    @property
    def complete(self) -> bool: ...
    def __len__(self) -> int: ...
    def record(self, index: int) -> Any: ...
    def name(self, index: int) -> str: ...


@dataclass(frozen=True)
class Unusable:
    """Stands for a micro-batch that couldn't be made. An exception would lose its type on the way here."""

    message: str


class RecordBatches:
    """make(i) -> micro-batch i: packed text with TMRoPE ids, patches, mel chunks (`data.language_batch`)."""

    def __init__(
        self, records: Records, builder_args: tuple[str, FeatureConfig], *, batch: int, seed: int
    ) -> None:
        self.records, self.builder_args, self.batch, self.seed = records, builder_args, batch, seed
        self._builder: PromptBuilder | None = None

    def indices(self, number: int) -> list[int]:
        """Which records micro-batch `number` holds."""
        places = range(number * self.batch, (number + 1) * self.batch)
        size = len(self.records)
        return [int(_order(self.seed, place // size, size)[place % size]) for place in places]

    def __call__(self, number: int) -> dict[str, Tensor] | Unusable:
        if self._builder is None:
            # Made where it is used: tokenizers don't like being carried into another process.
            self._builder = PromptBuilder(*self.builder_args)
        rows = []
        for index in self.indices(number):
            try:
                scene = self.records.record(index)
            except CrabError as error:
                return Unusable(f"{self.records.name(index)}: {error}")
            sample = scene.samples[0]
            rows.append((scene, sample.lead, [sample]))
        batch = language_batch(rows, self._builder, Vocabulary(()))
        return {name: batch[name] for name in _USED}


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 19, epoch]).permutation(size)
