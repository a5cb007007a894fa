"""Router traces on a bundle in torch: the engine's own decoder with another cache, so weights exist once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from crab_edge.engines._torch_cache import Cache, Chunk
from crab_edge.engines._torch_device import running
from crab_edge.errors import EngineError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.engines._torch_decoder import Decoder
    from crab_edge.engines._torch_weights import Group

ROOT = "language_model."
CHUNK = 256


class RouterTracer:
    """`crab_edge.engines.Tracer` over a decoder. A call runs the whole pass."""

    def __init__(self, decoder: Decoder, new_cache: Callable[[], Cache], device: torch.device) -> None:
        self._decoder: Decoder | None = decoder
        self._new_cache, self._device = new_cache, device
        groups = [group for group in decoder.groups if group.route is not None]
        if not groups:
            raise InputError("no linear of the decoder has a router; ask without a router trace")
        self.layers = tuple(name.removeprefix(ROOT) for group in groups for name in group.adapted)
        self._routers = {
            id(group): torch.from_numpy(group.route.router()).to(device) for group in groups if group.route
        }

    def __call__(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Weights float32 [layers, S, experts] of one pass over embeds [S, H] at position_ids [3, S]."""
        if self._decoder is None:
            raise EngineError("this router trace was closed; ask the engine for another one")
        cache, total = self._new_cache(), len(embeds)
        needed = cache.bytes_for(cache.grown(total))
        parts = []
        with running(self._device, "a router trace", needed):
            cache.reserve(total, 0)
            for begin in range(0, total, CHUNK):
                chunk = slice(begin, begin + CHUNK)
                found: list[torch.Tensor] = []

                def seen(group: Group, x: torch.Tensor, found: list[torch.Tensor] = found) -> None:
                    logits = x.float() @ self._routers[id(group)].transpose(1, 2)
                    found.append(logits.softmax(-1))

                tensors = (
                    torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
                    for array in (embeds[chunk], position_ids[:, chunk])
                )
                self._decoder(*tensors, Chunk(cache, begin, len(embeds[chunk])), seen)
                parts.append(torch.cat(found).cpu().numpy())
        return np.concatenate(parts, axis=1)

    def close(self) -> None:
        """Lets go of the decoder. Another call does nothing."""
        self._decoder, self._routers = None, {}
