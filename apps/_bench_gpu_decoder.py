"""The decoder around the contenders' linears: attention with a fixed cache, norms, head; the same for all.

Everything but the linears (and the head's weights) is equal, so a difference in time is theirs. Shapes and
addresses are fixed, so that a step can be compiled and recorded into a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from crab_edge_apps._bench_gpu_weights import GROUPS, RandomModel
from torch import Tensor, nn
from torch.nn import functional as F

_EPSILON, _THETA = 1e-6, 1e6
Make = Callable[[int, str], nn.Module]
MakeHead = Callable[[int | None], nn.Module]
#: Rows of the head behind which the layers are timed alone: it costs next to nothing.
SMALL_HEAD = 32


class Norm(nn.Module):
    """RMSNorm in float32, as Qwen2's; its weight is one."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + _EPSILON)
        return self.weight * wide.to(x.dtype)


class Layer(nn.Module):
    """One decoder layer of Qwen2: x [T, hidden] -> [T, hidden].

    groups: by the names of `GROUPS`, modules that give a list of outputs, one for each linear of the group.
    """

    def __init__(self, model: RandomModel, groups: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        shape = model.shape
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.groups = nn.ModuleDict(groups)
        self.before = Norm(shape.hidden, dtype, model.device)
        self.between = Norm(shape.hidden, dtype, model.device)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, past: int) -> Tensor:
        """cos, sin [T, head_dim]; keys, values [kv_heads, slots, head_dim] hold `past` tokens, get T more."""
        tokens = x.shape[0]
        q, k, v = self.groups["qkv"](self.before(x))
        q = _rotate(q.view(tokens, self.heads, self.head_dim).transpose(0, 1), cos, sin)
        k = _rotate(k.view(tokens, self.kv_heads, self.head_dim).transpose(0, 1), cos, sin)
        keys[:, past : past + tokens] = k
        values[:, past : past + tokens] = v.view(tokens, self.kv_heads, self.head_dim).transpose(0, 1)
        seen = past + tokens
        mixed = F.scaled_dot_product_attention(
            q[None],
            keys[None, :, :seen],
            values[None, :, :seen],
            # One token sees the whole cache; a prompt starts it.
            is_causal=tokens > 1,
            enable_gqa=self.heads != self.kv_heads,
        )[0]
        (o,) = self.groups["o"](mixed.transpose(0, 1).reshape(tokens, -1))
        x = x + o
        gate, up = self.groups["gate_up"](self.between(x))
        (down,) = self.groups["down"](F.silu(gate) * up)
        return x + down


class Decoder(nn.Module):
    """All layers, a cache of `slots` random tokens, the last norm and heads.

    make: (layer, group) -> the group's linears; head: rows (None: the vocabulary) -> the head.
    """

    def __init__(
        self, model: RandomModel, make: Make, head: MakeHead, dtype: torch.dtype, slots: int
    ) -> None:
        super().__init__()
        shape = model.shape
        self.model = model
        self.layers = nn.ModuleList(
            Layer(model, {group: make(layer, group) for group in GROUPS}, dtype)
            for layer in range(shape.layers)
        )
        self.norm = Norm(shape.hidden, dtype, model.device)
        self.heads = {rows: head(rows) for rows in (None, SMALL_HEAD)}
        self._cos, self._sin = _rotary(slots, shape.head_dim, dtype, model.device)
        # The same for every contender, so that their answers can be compared.
        self._cache = [layer.to(dtype) for layer in model.cache(slots)]
        # Of prompts: they would overwrite what a decode step is to see.
        self._empty = [torch.zeros_like(layer) for layer in self._cache]
        # On the CPU a layer is traced but no code is made for it: the dry run shows that it can be.
        how: Any = {"fullgraph": True, "dynamic": False}
        how["backend"] = "inductor" if model.device.type == "cuda" else "eager"
        # Functions of any layer or group: one compilation serves all those of equal shapes.
        self._layer = {False: _layer, True: torch.compile(_layer, **how)}
        self._group = {False: _group, True: torch.compile(_group, **how)}

    def forward(self, x: Tensor, past: int, rows: int | None = None, compiled: bool = False) -> Tensor:
        """x [T, hidden] behind the cache's first `past` tokens -> the last one's logits, of `rows` or all."""
        cos, sin = self._cos[past : past + len(x)], self._sin[past : past + len(x)]
        for layer, (keys, values) in zip(self.layers, self._cache if past else self._empty, strict=True):
            x = self._layer[compiled](layer, x, cos, sin, keys, values, past)
        return self.heads[rows](self.norm(x[-1:]))

    def groups(self, name: str) -> list[nn.Module]:
        """One group of linears of every layer."""
        return [layer.groups[name] for layer in self.layers]

    def apply(self, group: nn.Module, x: Tensor, compiled: bool) -> list[Tensor]:
        """One group's outputs."""
        return self._group[compiled](group, x)

    def runner(self, x: Tensor, past: int, rows: int | None, compiled: bool) -> Callable[[], Tensor]:
        """A function that passes x behind `past` tokens and gives logits."""
        return lambda: self(x, past, rows, compiled)

    def bytes(self, group: nn.Module) -> int:
        """Bytes of a group of linears."""
        return held_bytes(group)

    def head_bytes(self) -> int:
        """Bytes of the head."""
        return held_bytes(self.heads[None])


def held_bytes(module: nn.Module) -> int:
    """Bytes of a module's own tensors, those of its parts included."""
    return sum(tensor.nbytes for tensor in module.buffers())


def _layer(layer: Layer, *args: Any) -> Tensor:
    return layer(*args)


def _group(group: nn.Module, x: Tensor) -> list[Tensor]:
    return group(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _rotary(slots: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [slots, head_dim] of text: all three of TMRoPE's axes count alike."""
    steps = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
    angles = torch.arange(slots, dtype=torch.float64, device=device)[:, None] * _THETA**-steps
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)
