"""Router traces on ONNX Runtime: the traced variant of the bundle's decoder, open while it is used.

It is a session of its own with a KV cache of its own, so the engine's cache and its answers stay as they are.
While it is open the decoder's weights are in memory twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from crab_edge.engines import onnxruntime as engine
from crab_edge.errors import BundleError, EngineError, InputError
from crab_edge.ilora import traced_graph
from crab_edge.manifest import COPY_AGAIN
from crab_edge.memory import available_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle

CHUNK = 256
# Measured on 4-bit decoders of 6 and 275 MB: packed weights and their scales, and what a pass needs besides.
_WEIGHTS_IN_MEMORY = 1.5
_PASS_BYTES = 64 << 20


class RouterTracer:
    """`crab_edge.engines.Tracer` over a bundle's decoder graph.

    Reading the graph and measuring the memory happens at once, opening it with the first pass.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._bundle = bundle
        self._threads = threads
        path = bundle.graph("decoder")
        try:
            model = path.read_bytes()
            self._routes = traced_graph.routes(model)
        except OSError as error:
            raise BundleError(f"{path}: can't be read ({error.strerror}); {COPY_AGAIN}") from error
        except ValueError as error:
            raise BundleError(f"{path}: not a decoder graph ({error}); {COPY_AGAIN}") from error
        if not self._routes:
            raise InputError(f"{path}: no linear of the decoder has a router; ask without a router trace")
        self.layers = tuple(layer for route in self._routes for layer in route.layers)
        self._check_memory()
        self._model: bytes | None = model + traced_graph.addition(self._routes)
        self._cache: _TracedCache | None = None
        self._last: tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]] | None = None

    def _check_memory(self) -> None:
        """Refuses what would push the machine into swapping, where its free memory can be measured."""
        decoder = self._bundle.manifest.graphs.decoder
        files = self._bundle.manifest.files.items()
        weights = sum(info.size for name, info in files if name in (decoder, f"{decoder}.data"))
        needed, free = int(weights * _WEIGHTS_IN_MEMORY) + _PASS_BYTES, available_bytes()
        if free is not None and free < needed:
            raise EngineError(
                f"a router trace opens the decoder a second time, which takes about {needed >> 20} MB, but "
                f"{free >> 20} MB of memory are free; close other programs or ask without a router trace"
            )

    def __call__(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Weights float32 [layers, S, experts] of one pass over embeds [S, H] at position_ids [3, S].

        Whole chunks that the last call began with too, such as the media of several questions, aren't run
        again.
        """
        if self._cache is None:
            self._cache = _TracedCache(self._open(), self._bundle, len(self._routes))
        kept = self._in_common(embeds, position_ids) // CHUNK * CHUNK
        out = [self._last[2][:, :kept]] if self._last is not None else []
        self._last = None
        for begin in range(kept, len(embeds), CHUNK):
            chunk = slice(begin, begin + CHUNK)
            total = min(begin + CHUNK, len(embeds))
            self._cache.reserve(total, begin)
            self._cache.run(embeds[None, chunk], position_ids[:, None, chunk], total)
            # Each [1, S, groups, experts] becomes [groups, S, experts].
            groups = [np.swapaxes(weights[0], 0, 1) for weights in self._cache.weights()]
            out.append(np.concatenate(groups, axis=0))
        weights = np.concatenate(out, axis=1)
        self._last = (embeds, position_ids, weights)
        return weights

    def _in_common(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> int:
        """Leading tokens that are those of the last call, so that the cache holds them."""
        if self._last is None:
            return 0
        last_embeds, last_positions, _ = self._last
        n = min(len(embeds), len(last_embeds))
        same = (embeds[:n] == last_embeds[:n]).all(axis=1)
        same &= (position_ids[:, :n] == last_positions[:, :n]).all(axis=0)
        return n if same.all() else int(np.argmin(same))

    def _open(self) -> Any:
        if self._model is None:
            raise EngineError("this router trace was closed; ask the engine for another one")
        session = engine._open(self._bundle, "decoder", self._threads, self._model)
        self._model = None
        return session

    def close(self) -> None:
        """Frees the session and its cache. Another call does nothing."""
        self._model = self._cache = self._last = None


class _TracedCache(engine._Cache):
    """The KV buffers of the traced graph; ONNX Runtime allocates the weights, whose length is the chunk's."""

    def __init__(self, session: Any, bundle: Bundle, routes: int) -> None:
        super().__init__(session, bundle)
        self._outputs = [traced_graph.output_name(number) for number in range(routes)]
        self._last: Any = None

    def run(
        self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64], total: int
    ) -> NDArray[np.float32]:
        self._last = self._step if embeds.shape[1] == 1 else self._chunk
        for name in self._outputs:
            # Anew for every run: a binding keeps what was allocated for the last one.
            self._last.bind_output(name)
        return super().run(embeds, position_ids, total)

    def weights(self) -> list[NDArray[np.float32]]:
        """Of the last run, by route: float32 [1, S, groups, experts]."""
        return [value.numpy() for value in self._last.get_outputs()[-len(self._outputs) :]]
