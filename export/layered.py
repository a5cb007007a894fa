"""The float model with one module's weights in memory at a time: official torch modules, filled and emptied.

The whole thinker is built without weights (on torch's meta device). A module that is about to run gets its
weights from the store; when it has run they are dropped. The decoder goes layer by layer, every prompt
through one layer before the next is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from crab_edge.engines.torch import TorchEngine
from crab_edge.errors import EngineError, ModelError
from crab_edge.ilora.torch_layer import ILoRALinear

from .linear import row_blocks
from .weights import WeightStore, canonical

Floats = NDArray[np.float32]
_HEAD_WEIGHTS = 1 << 23


class LayeredEngine(TorchEngine):
    """The encoders behind the engines' protocol, and the decoder as `start`, `layer` and `logits`.

    `forward` is refused: a token at a time would read the whole model for every token.
    Raises ModelError when the adapter names a linear that the model doesn't have.
    """

    name = "torch, layer by layer"

    def __init__(self, config: Any, weights: WeightStore) -> None:
        self.weights = weights
        model = _skeleton(config)
        _adapt(model, weights)
        super().__init__(model)
        self._names = {id(module): name for name, module in model.named_modules()}
        visual, audio = self._inner.visual, self._inner.audio_tower
        units = [visual.patch_embed, *visual.blocks, visual.merger]
        units += [audio.conv1, audio.conv2, *audio.layers, audio.ln_post, audio.proj]
        for unit in units:
            unit.register_forward_pre_hook(lambda module, _: self._fill(module))
            unit.register_forward_hook(lambda module, *_: _drop(module))

    @property
    def device(self) -> torch.device:
        """Always the CPU."""
        return torch.device("cpu")

    def embed(self, ids: NDArray[np.int64]) -> Floats:
        """Token ids int64 [S] -> embeddings float32 [S, H], read row by row."""
        name = "language_model.embed_tokens.weight"
        rows = {int(i): self.weights.rows(name, int(i), int(i) + 1)[0] for i in np.unique(ids)}
        return np.stack([rows[int(i)] for i in ids])

    def forward(self, embeds: Floats, position_ids: NDArray[np.int64]) -> Floats:
        """Refused."""
        raise EngineError("a model held layer by layer has no whole decoder; run it with `layer`")

    @contextmanager
    def layer(self, i: int) -> Iterator[Callable[[Floats, NDArray[np.int64]], Floats]]:
        """Decoder layer i as a function of hidden states [S, H] and positions [3, S] of a whole prompt."""
        decoder = self._inner.language_model
        module = decoder.layers[i]
        self._fill(module)

        def run(hidden: Floats, positions: NDArray[np.int64]) -> Floats:
            with torch.inference_mode():
                x = torch.from_numpy(hidden)[None]
                turned = decoder.rotary_emb(x, torch.from_numpy(positions)[:, None])
                return module(x, attention_mask=None, position_embeddings=turned, use_cache=False)[0].numpy()

        try:
            yield run
        finally:
            _drop(module)

    def normed(self, hidden: Floats, seen: Callable[[str, torch.Tensor], None] | None = None) -> Floats:
        """The final norm of hidden states [n, H]; `seen` is called with the head's name and input."""
        norm = self._inner.language_model.norm
        self._fill(norm)
        with torch.inference_mode():
            x = norm(torch.from_numpy(hidden))
        _drop(norm)
        if seen is not None:
            seen("lm_head", x)
        return x.numpy()

    def logits(self, hidden: Floats) -> Floats:
        """Final norm and head of hidden states [n, H] -> [n, V], the head read in blocks of rows."""
        normed = self.normed(hidden)
        tied = "lm_head.weight" not in self.weights
        name = "language_model.embed_tokens.weight" if tied else "lm_head.weight"
        rows, width = self.weights.shape(name)
        out = np.empty((len(normed), rows), np.float32)
        done = 0
        for part in row_blocks(self.weights, name, max(1, _HEAD_WEIGHTS // width)):
            out[:, done : done + len(part)] = normed @ part.T
            done += len(part)
        return out

    def _fill(self, module: nn.Module) -> None:
        name = self._names[id(module)]
        state = {}
        for key, parameter in module.named_parameters():
            path, part = _place(f"{name}.{key}")
            read = self.weights.array if part is None else self.weights.adapter_array
            value = read(path if part is None else f"{path}.{part}.weight")
            state[key] = torch.from_numpy(value.reshape(parameter.shape))
        module.load_state_dict(state, strict=True, assign=True)


def _drop(module: nn.Module) -> None:
    module.to("meta")


def _skeleton(config: Any) -> nn.Module:
    from accelerate import init_empty_weights
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

    # Buffers (rotary frequencies, sinusoids) stay real: no file holds them.
    with init_empty_weights(include_buffers=False):
        return Thinker._from_config(config, dtype=torch.float32).eval()


def _adapt(model: nn.Module, weights: WeightStore) -> None:
    """Wrap the adapted linears, without weights."""
    from accelerate import init_empty_weights

    if not weights.adapter_config:
        return
    config = weights.adapter_config
    sizes = {
        "r": int(config["r"]),
        "lora_alpha": float(config["lora_alpha"]),
        "num_experts": int(config["num_experts"]),
        "lora_dropout": 0.0,
    }
    linears = {canonical(f"{n}.weight"): n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path in weights.adapted():
        name = linears.get(f"{path}.weight")
        if name is None:
            raise ModelError(
                f"{weights.adapter_dir}: adapts {path}, which isn't in the model; give this model's adapter"
            )
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        with init_empty_weights(include_buffers=False):
            setattr(owner, child, ILoRALinear(getattr(owner, child), "default", **sizes))
    model.eval()


def _place(name: str) -> tuple[str, str | None]:
    """A parameter's name -> the weight's canonical name, or the adapted linear and the adapter's part."""
    if ".lora_" in name:
        path, _, rest = name.partition(".lora_")
        return canonical(f"{path}.weight").removesuffix(".weight"), f"lora_{rest.split('.')[0]}"
    return canonical(name.replace(".base_layer.", ".")), None
