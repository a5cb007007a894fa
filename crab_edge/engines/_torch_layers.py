"""What the decoder and the encoders have in common: norms and rotation, both in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from crab_edge.engines._torch_weights import GraphReader

Turn = tuple[Tensor, Tensor]
"""cos and signed sin, float32 [M, 1, 2, depth/2] each."""


@dataclass(frozen=True)
class Norm:
    """RMSNorm, or LayerNorm where there is a bias; float32 weights [H]."""

    weight: Tensor
    bias: Tensor | None
    epsilon: float
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [.., H] -> the activations' type."""
        shape = self.weight.shape
        if self.bias is None:
            return F.rms_norm(x, shape, self.weight, self.epsilon).to(self.dtype)
        return F.layer_norm(x, shape, self.weight, self.bias, self.epsilon).to(self.dtype)

    @classmethod
    def read(cls, reader: GraphReader, output: str) -> Norm:
        """The norm that makes `output`, alone or joined with the addition before it."""
        kinds = ("SimplifiedLayerNormalization", "LayerNormalization")
        node = reader.take(output, *kinds, f"Skip{kinds[0]}")
        names = node.inputs[2 if node.kind.startswith("Skip") else 1 :]
        parts = [reader.tensor(name, torch.float32) for name in names]
        return cls(parts[0], parts[1] if len(parts) > 1 else None, node.floats["epsilon"], reader.dtype)


def add_norm(norm: Norm, residual: Tensor, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """residual float32 [S, H] + x (if given) of the activations' type: the sum, and its norm."""
    total = residual if x is None else residual + x
    return total, norm(total)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up."""
    return F.silu(gate) * up


def turn(cos: Tensor, sin: Tensor) -> Turn:
    """What `rotate` wants of cos and sin [M, depth/2]."""
    return torch.stack([cos, cos], dim=1)[:, None], torch.stack([-sin, sin], dim=1)[:, None]


def rotate(x: Tensor, turned: Turn) -> Tensor:
    """[M, heads, depth] -> float32, the first half of every head turned against the second."""
    cos, sin = turned
    halves = x.unflatten(2, (2, -1))
    return (halves * cos + halves.flip(2) * sin).flatten(2)
