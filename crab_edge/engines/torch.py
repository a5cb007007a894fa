"""The float model in torch, behind the engines' protocol: the reference that bundles are compared with.

It runs the official towers and decoder of transformers on a model directory, with or without an adapter. A
bundle has no float weights, so this engine opens model directories (`TorchEngine.load`), not bundles.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import EngineError, InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..bundle import Bundle

GRID = 16
"""Patches along each side of the model's 224x224 input."""
VARIANT = "device"
"""What stands behind the colon of `torch:cuda`."""


class TorchEngine:
    """Runs a thinker (`crab_edge.model`, wrapped in an adapter or not) with a dynamic KV cache. Batch 1."""

    name = "torch"

    def __init__(self, model: nn.Module) -> None:
        """`model` is used as it is (device, dtype) and put into eval mode."""
        from peft import PeftModel
        from transformers import DynamicCache

        thinker = model.get_base_model() if isinstance(model, PeftModel) else model
        self.model = model.eval()
        self._head = thinker.lm_head
        self._inner = thinker.model
        self._config = thinker.config
        self._new_cache = lambda: DynamicCache(config=self._config.text_config)
        self._cache = self._new_cache()
        self.length = 0

    @classmethod
    def load(
        cls,
        model_dir: Path | str,
        adapter_dir: Path | str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> TorchEngine:
        """Open a model directory and, if given, an adapter directory. ModelError when they don't fit."""
        from ..model import load_adapter, load_base

        model: nn.Module = load_base(model_dir, dtype=dtype)
        if adapter_dir is not None:
            model = load_adapter(model, adapter_dir)
        return cls(model.to(device))

    @property
    def device(self) -> torch.device:
        """Where the head's weights are."""
        return self._head.weight.device

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids int64 [S] -> embeddings float32 [S, H] (a bundle has its own table for this)."""
        with torch.inference_mode():
            return self._array(self._inner.get_input_embeddings()(self._tensor(ids)))

    def vision(self, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Patches float32 [T*256, 1176] of 224x224 frames -> embeddings float32 [T*64, H]."""
        grids, rest = divmod(len(pixel_values), GRID * GRID)
        if rest or not grids:
            raise EngineError(f"vision got {len(pixel_values)} patches, expected a multiple of {GRID * GRID}")
        tower = self._inner.visual
        with torch.inference_mode():
            grid = torch.tensor([[grids, GRID, GRID]], device=self.device)
            return self._array(tower(self._tensor(pixel_values).to(tower.dtype), grid_thw=grid).pooler_output)

    def audio(self, chunks: NDArray[np.float32], lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Mel chunks float32 [C, n_mels, 200] with valid frames int64 [C] -> embeddings float32 [n, H].

        A chunk shorter than 200 frames ends its recording, as in the official tower.
        """
        if (
            len(chunks) != len(lengths)
            or not len(lengths)
            or min(lengths) < 1
            or max(lengths) > chunks.shape[2]
        ):
            raise EngineError(
                f"audio got {len(chunks)} chunks and lengths {list(lengths)[:8]}, expected 1..200 each"
            )
        tower = self._inner.audio_tower
        frames, recordings = [], [0]
        for chunk, length in zip(chunks, lengths, strict=True):
            frames.append(chunk[:, :length])
            recordings[-1] += int(length)
            if length < chunk.shape[1]:
                recordings.append(0)
        mel = self._tensor(np.concatenate(frames, axis=1)).to(tower.dtype)
        totals = torch.tensor([n for n in recordings if n], device=self.device)
        with torch.inference_mode():
            return self._array(tower(mel, feature_lens=totals).last_hidden_state)

    def forward(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append float32 [1, S, H] at position_ids int64 [3, 1, S]; logits float32 [V] of the last token."""
        steps = embeds.shape[1]
        limit = self._config.text_config.max_position_embeddings
        if embeds.ndim != 3 or embeds.shape[0] != 1 or position_ids.shape != (3, 1, steps) or not steps:
            raise EngineError(
                f"forward got {embeds.shape} and {position_ids.shape}, expected [1, S, H] and [3, 1, S]"
            )
        if self.length + steps > limit:
            raise EngineError(f"{self.length + steps} tokens are more than the model's {limit} positions")
        decoder = self._inner.language_model
        with torch.inference_mode():
            hidden = decoder(
                inputs_embeds=self._tensor(embeds).to(decoder.dtype),
                position_ids=self._tensor(position_ids),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
            logits = self._head(hidden[0, -1])
        self.length += steps
        return self._array(logits)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens of the cache."""
        if not 0 <= length <= self.length:
            raise EngineError(f"can't rewind to {length} tokens: the cache holds {self.length}")
        if length == 0:
            self._cache = self._new_cache()
        elif length < self.length:
            self._cache.crop(length - self.length)
        self.length = length

    def tracer(self) -> TorchTracer:
        """Passes that give the routers' weights, beside this engine's cache. See `engines.Traceable`."""
        return TorchTracer(self)

    def describe(self) -> dict[str, Any]:
        """Name, device, dtype and versions."""
        import transformers

        return {
            "name": self.name,
            "provider": str(self.device),
            "dtype": str(self._head.weight.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _tensor(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    @staticmethod
    def _array(tensor: torch.Tensor) -> NDArray[np.float32]:
        return tensor.float().cpu().numpy()


class TorchTracer:
    """`crab_edge.engines.Tracer` over the engine's model."""

    def __init__(self, engine: TorchEngine) -> None:
        from ..ilora.torch_layer import ILoRALayer

        self._engine = engine
        self._decoder = engine._inner.language_model
        self.layers = tuple(
            name for name, module in self._decoder.named_modules() if isinstance(module, ILoRALayer)
        )
        if not self.layers:
            raise InputError("no linear of the decoder has a router; ask without a router trace")

    def __call__(self, embeds: NDArray[np.float32], position_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Weights float32 [layers, S, experts] of one pass over embeds [S, H] at position_ids [3, S]."""
        from ..ilora.torch_tuner import trace_routes

        tensor = self._engine._tensor
        with torch.inference_mode(), trace_routes(self._decoder) as routes:
            self._decoder(
                inputs_embeds=tensor(embeds[None]).to(self._decoder.dtype),
                position_ids=tensor(position_ids[:, None]),
                use_cache=False,
            )
        return np.stack([routes[name][0][0].float().numpy() for name in self.layers])

    def close(self) -> None:
        """Nothing to free: the pass kept no cache."""


def create(bundle: Bundle, *, threads: int | None = None) -> TorchEngine:
    """Refused: a bundle has no float weights to run in torch."""
    raise EngineError(
        "engine torch runs float model directories, and a bundle holds exported graphs: choose engine "
        "onnxruntime, or open the model with crab_edge.engines.torch.TorchEngine.load(model_dir, adapter_dir)"
    )
