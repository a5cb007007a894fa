"""The decoder in torch over a bundle's own low-bit weights; equal to the graph that the exporter writes.

Linears run through the operators of `crab_edge.ilora.torch_ops`. Norms, rotation, the residual and the
router's softmax are float32 whatever the activations' type is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from crab_edge.engines import _torch_layers
from crab_edge.engines._torch_layers import Norm, turn
from crab_edge.engines._torch_weights import GraphReader, Group

if TYPE_CHECKING:
    from crab_edge.engines._torch_layers import Turn
    from crab_edge.engines._torch_weights import Seen
    from crab_edge.manifest import ModelInfo

    Attend = Callable[[int, Tensor, Tensor, Tensor, Turn, float], Tensor]

ROOT = "language_model"


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    input_norm: Norm
    qkv: Group
    o: Group
    middle_norm: Norm
    gate_up: Group
    down: Group
    scale: float


class Decoder:
    """Reads the whole decoder graph; the instance is a function of embeddings, positions and a cache."""

    def __init__(self, reader: GraphReader, model: ModelInfo) -> None:
        self.dtype = reader.dtype
        self.depth = model.head_dim
        self._between = _kernels() if reader.device.type == "cuda" else _torch_layers
        self._table = self._rotary(reader)
        norm = Norm.read(reader, f"{ROOT}.layers.0.input_layernorm")
        self.layers: list[Layer] = []
        for i in range(model.layers):
            following = "norm" if i + 1 == model.layers else f"layers.{i + 1}.input_layernorm"
            self.layers.append(self._layer(reader, i, norm))
            norm = Norm.read(reader, f"{ROOT}.{following}")
        self._last_norm = norm
        reader.take(f"{ROOT}.last_token", "Slice")
        self._head = reader.group(["logits"])
        reader.finish()

    @property
    def groups(self) -> list[Group]:
        """All groups of adapted or plain linears, in the order they run."""
        return [group for each in self.layers for group in (each.qkv, each.o, each.gate_up, each.down)]

    def __call__(self, embeds: Tensor, positions: Tensor, attend: Attend, seen: Seen | None = None) -> Tensor:
        """Embeddings float32 [S, H] at positions int64 [3, S] -> logits float32 [V] of the last token.

        `attend` (a `Chunk` or a `Step`) keeps the keys and values; `seen` is told of every route's input.
        """
        turned, between = self._turned(positions), self._between
        residual, x = between.add_norm(self.layers[0].input_norm, embeds)
        following = [*(layer.input_norm for layer in self.layers[1:]), self._last_norm]
        for i, layer in enumerate(self.layers):
            q, k, v = (part.unflatten(1, (-1, self.depth)) for part in layer.qkv(x, seen))
            (x,) = layer.o(attend(i, q, k, v, turned, layer.scale), seen)
            residual, x = between.add_norm(layer.middle_norm, residual, x)
            gate, up = layer.gate_up(x, seen)
            (x,) = layer.down(between.silu_mul(gate, up), seen)
            residual, x = between.add_norm(following[i], residual, x)
        (logits,) = self._head(x[-1:])
        return logits[0].float()

    def _turned(self, positions: Tensor) -> Turn:
        # One of the three summands isn't zero: no product that a device may round to TF32.
        angles = (positions[:, :, None].float() * self._table[:, None]).sum(0)
        return turn(angles.cos(), angles.sin())

    @staticmethod
    def _rotary(reader: GraphReader) -> Tensor:
        """Frequencies float32 [3, depth/2] by axis."""
        prefix = f"{ROOT}.rotary_emb"
        for name, kind in (("positions", "Reshape"), ("by_token", "Transpose"), ("float", "Cast")):
            reader.take(f"{prefix}.{name}", kind)
        reader.take(f"{prefix}.cos", "Cos")
        reader.take(f"{prefix}.sin", "Sin")
        return reader.tensor(reader.take(f"{prefix}.angles", "MatMul").inputs[1], torch.float32)

    def _layer(self, reader: GraphReader, i: int, norm: Norm) -> Layer:
        path = f"{ROOT}.layers.{i}"
        attention, mlp = f"{path}.self_attn", f"{path}.mlp"
        for part in "qk":
            reader.take(f"{attention}.{part}_rotated", "RotaryEmbedding")
        # With a float16 cache the graph casts around its attention; here the cache's own type says it.
        for cast in ("q_rotated.cast", "k_rotated.cast", "v_proj.cast", "attention.cast"):
            if f"{attention}.{cast}" in reader:
                reader.take(f"{attention}.{cast}", "Cast")
        mixed = reader.take(f"{attention}.attention", "GroupQueryAttention")
        reader.take(f"{mlp}.act_fn", "QuickGelu")
        reader.take(f"{mlp}.product", "Mul")
        return Layer(
            input_norm=norm,
            qkv=reader.group([f"{attention}.{part}_proj" for part in "qkv"]),
            o=reader.group([f"{attention}.o_proj"]),
            middle_norm=Norm.read(reader, f"{path}.post_attention_layernorm"),
            gate_up=reader.group([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
            down=reader.group([f"{mlp}.down_proj"]),
            scale=mixed.floats["scale"],
        )


def _kernels() -> Any:
    from crab_edge.engines import _torch_kernels

    return _torch_kernels
