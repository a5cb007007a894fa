"""A bundle in torch: its own low-bit weights, on a GPU with the Triton kernels or exactly on the CPU.

On the CPU every product dequantises its weight first. That is slow, and the reference for what the kernels
must give; activations are never rounded to int8, so a bundle of accuracy level 4 gets the answers of level 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from crab_edge.engines import _torch_device as devices
from crab_edge.engines._opening import GRAPHS, Opening
from crab_edge.engines._torch_cache import Cache, Chunk
from crab_edge.engines._torch_decoder import Decoder
from crab_edge.engines._torch_step import Stepper
from crab_edge.engines._torch_towers import Audio, Vision
from crab_edge.engines._torch_weights import GraphReader
from crab_edge.errors import EngineError
from crab_edge.manifest import COPY_AGAIN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crab_edge.bundle import Bundle
    from crab_edge.engines import Tracer

FRAMES = 200


class TorchBundleEngine:
    """`Engine` over a bundle's weights. Not thread-safe, but `warm` works beside the caller's thread."""

    name = "torch"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        low_memory: bool | None = None,
    ) -> None:
        """See `crab_edge.engines.torch.create`."""
        self.device = devices.choose_device(device)
        self.dtype = devices.choose_dtype(dtype, self.device)
        devices.check_dtype(self.device, self.dtype)
        if threads is not None:
            # torch has one setting for the whole process.
            torch.set_num_threads(threads)
        self._bundle, self._model = bundle, bundle.manifest.model
        self._asked = device
        self.low_memory = self._short_of_memory() if low_memory is None else low_memory
        self._graphs = Opening(self._load)
        self._cache: Cache | None = None
        self._step: Stepper | None = None
        self.length = 0

    def _short_of_memory(self) -> bool:
        """Whether the GPU can't hold all graphs at once; the CPU can always page something out."""
        free = devices.free_bytes(self.device)
        return free is not None and sum(self._graph_bytes(name) for name in GRAPHS) > free

    def _graph_bytes(self, name: str) -> int:
        files = self._bundle.manifest.files
        return sum(files[part].size for part in self._bundle.graph_files(name))

    def warm(self, *, vision: bool = True, audio: bool = True) -> None:
        """Starts loading the decoder and the towers named, each in a thread of its own.

        With `low_memory` the decoder waits until the towers have run.
        """
        for name, wanted in (("decoder", not self.low_memory), ("audio", audio), ("vision", vision)):
            if wanted:
                self._graphs.start(name)

    def _load(self, name: str) -> Any:
        reader = GraphReader(self._bundle.graph(name), self.device, self.dtype)
        what, needed = f"the {name}'s weights", reader.device_bytes()
        devices.check_room(self.device, what, needed)
        with devices.running(self.device, f"loading {what}", needed):
            if name == "decoder":
                return Decoder(reader, self._model)
            return Vision(reader) if name == "vision" else Audio(reader)

    def _part(self, name: str) -> Any:
        try:
            return self._graphs.get(name)
        except BaseException:
            # The next use tries again: memory may be free by then.
            self._graphs.forget(name)
            raise

    def close(self, *names: str) -> None:
        """Drops these graphs (default: all, with the cache) and gives their memory back."""
        dropped = self._graphs.drop(names)
        if not names or "decoder" in names:
            self._forget()
        if dropped and self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        self._cache, self._step, self.length = None, None, 0

    def vision(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patches float32 [T*256, 1176] -> embeddings float32 [T*64, H]."""
        return self._encode("vision", lambda tower: tower(self._tensor(pixel_values)), len(pixel_values) // 4)

    def audio(self, chunks: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mel chunks float32 [C, n_mels, 200], valid frames int64 [C] -> embeddings float32 [n, H]."""
        lengths = np.asarray(lengths, np.int64)
        return self._encode(
            "audio",
            lambda tower: tower(self._tensor(chunks), self._tensor(lengths)),
            int(((lengths + 1) // 2 // 2).sum()),
        )

    def _encode(self, name: str, run: Callable[[Any], torch.Tensor], rows: int) -> NDArray[np.float32]:
        tower = self._part(name)
        with devices.running(self.device, f"the {name} encoder", 0):
            out = run(tower).cpu().numpy()
        if out.shape != (rows, self._model.hidden_size):
            raise EngineError(
                f"the {name} encoder returned shape {out.shape}, expected {(rows, self._model.hidden_size)}; "
                f"{COPY_AGAIN}"
            )
        return out

    def forward(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends S embeddings [1, S, H] at position_ids [3, 1, S] to the cache; logits [V] of the last.

        The returned array is overwritten by the next call.
        """
        steps = embeds.shape[1] if embeds.ndim == 3 else 0
        if not steps or embeds.shape != (1, steps, self._model.hidden_size):
            raise EngineError(f"forward got {embeds.shape}, expected [1, S, {self._model.hidden_size}]")
        if position_ids.shape != (3, 1, steps):
            raise EngineError(f"forward got positions {position_ids.shape}, expected {(3, 1, steps)}")
        total = self.length + steps
        if total > self._model.max_positions:
            raise EngineError(
                f"{total} tokens are more than the {self._model.max_positions} that {self._model.name} "
                "can hold; ask about a shorter clip"
            )
        if self.low_memory:
            self.close("vision", "audio")
        decoder = self._part("decoder")
        cache = self._cache = self._cache or self.new_cache()
        needed = cache.bytes_for(cache.grown(total))
        try:
            with devices.running(self.device, f"{total} tokens", needed):
                logits = self._run(decoder, cache, embeds, position_ids)
        except BaseException:
            # Buffers that grew halfway belong to no capacity.
            self._forget()
            raise
        self.length = total
        return logits

    def _run(
        self, decoder: Decoder, cache: Cache, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        steps = embeds.shape[1]
        if cache.reserve(self.length + steps, self.length) and self._step is not None:
            self._step.reset()
        if steps > 1:
            attend = Chunk(cache, self.length, steps)
            logits = decoder(self._tensor(embeds[0]), self._tensor(position_ids[:, 0]), attend)
            return logits.cpu().numpy()
        if self._step is None:
            sizes = (self._model.hidden_size, self._model.vocab_size)
            self._step = Stepper(decoder, cache, *sizes, self.device)
        return self._step(embeds[0], position_ids[:, 0], self.length)

    def rewind(self, length: int) -> None:
        """Forgets all but the first `length` tokens."""
        if not 0 <= length <= self.length:
            raise EngineError(f"can't rewind to {length}: the cache holds {self.length} tokens")
        self.length = length

    def new_cache(self) -> Cache:
        """Of the manifest's type beside float32 activations, else of the activations' own."""
        model, dtype = self._model, self.dtype
        if dtype == torch.float32:
            dtype = devices.DTYPES[self._bundle.manifest.recipe.kv_dtype]
        sizes = (model.layers, model.kv_heads, model.head_dim, model.max_positions)
        return Cache(*sizes, self.device, dtype)

    def tracer(self) -> Tracer:
        """Passes that give the routers' weights, beside this engine's cache. See `engines.Traceable`."""
        from crab_edge.engines._torch_trace import RouterTracer

        if self.low_memory:
            self.close("vision", "audio")
        return RouterTracer(self._part("decoder"), self.new_cache, self.device)

    def describe(self) -> dict[str, Any]:
        """Name, provider, device, type and versions."""
        described: dict[str, Any] = {
            "name": self.name,
            "version": torch.__version__,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.device.type == "cpu":
            why = ", because torch finds no GPU" if self._asked == "auto" else ""
            how = {"provider": f"CPU (exact products, slow{why})", "threads": torch.get_num_threads()}
            return described | how
        import triton

        major, minor = torch.cuda.get_device_capability(self.device)
        card = f"{torch.cuda.get_device_name(self.device)}, sm_{major}{minor}"
        return described | {"provider": f"CUDA ({card})", "triton": triton.__version__}

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)
