"""One decoder step over buffers that stay where they are; on CUDA it is captured once and replayed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from crab_edge.engines._torch_cache import Cache, Step

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crab_edge.engines._torch_decoder import Decoder


class Stepper:
    """`run` reads and writes the buffers only, so that it can be captured; calling the instance fills them.

    The capture belongs to the cache's buffers: `reset` when they are others.
    """

    def __init__(self, decoder: Decoder, cache: Cache, hidden: int, vocab: int, device: torch.device) -> None:
        self._decoder, self._cache, self._device = decoder, cache, device
        self._on_gpu = device.type == "cuda"
        self._host_embeds = torch.zeros(1, hidden, pin_memory=self._on_gpu)
        # Positions on the three axes, then the tokens before: one copy to the device.
        self._host_places = torch.zeros(4, dtype=torch.int64, pin_memory=self._on_gpu)
        self._host_logits = torch.zeros(vocab, pin_memory=self._on_gpu)
        # On the CPU these are the same memory.
        self.embeds = self._host_embeds.to(device)
        self.places = self._host_places.to(device)
        self.logits = self._host_logits.to(device)
        self._attend = _attention(decoder.depth) if self._on_gpu else Step
        self.graph: torch.cuda.CUDAGraph | None = None

    def reset(self) -> None:
        """Forgets the capture."""
        self.graph = None

    def run(self) -> None:
        """The step: `embeds` float32 [1, H] and `places` int64 [4] -> `logits` float32 [V]."""
        attend = self._attend(self._cache, self.places[3:])
        self.logits.copy_(self._decoder(self.embeds, self.places[:3, None], attend))

    def __call__(
        self, embeds: NDArray[np.float32], positions: NDArray[np.int64], past: int
    ) -> NDArray[np.float32]:
        """embeds [1, H] at positions [3, 1] behind `past` tokens -> logits [V], overwritten by the next."""
        self._host_embeds.numpy()[...] = embeds
        places = self._host_places.numpy()
        places[:3], places[3] = positions[:, 0], past
        if not self._on_gpu:
            self.run()
            return self.logits.numpy()
        self.embeds.copy_(self._host_embeds, non_blocking=True)
        self.places.copy_(self._host_places, non_blocking=True)
        if self.graph is None:
            self.graph = self._capture()
        self.graph.replay()
        self._host_logits.copy_(self.logits, non_blocking=True)
        torch.cuda.current_stream(self._device).synchronize()
        return self._host_logits.numpy()

    def _capture(self) -> torch.cuda.CUDAGraph:
        """Running before capturing compiles the kernels; it writes what the replay writes again."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # torch's own stream for captures belongs to the device of the process's first capture. An encoder
        # that is loading in another thread may allocate meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self.run()
        return graph


def _attention(depth: int) -> Any:
    """The kernels' step where they take heads of this depth, else torch's."""
    from crab_edge.engines._torch_kernels import FastStep

    return FastStep if FastStep.takes(depth) else Step
