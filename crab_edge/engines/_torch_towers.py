"""The vision and audio encoders in torch over a bundle's own weights; equal to the exported graphs.

Residuals and norms are float32, everything between them is of the activations' type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from crab_edge.engines._torch_layers import Norm, rotate, turn
from crab_edge.engines._torch_weights import GraphReader, Group

if TYPE_CHECKING:
    from crab_edge.engines._torch_layers import Turn

VISION, AUDIO = "visual", "audio_tower"


@dataclass(frozen=True)
class Block:
    """A layer of an encoder. `mlp` are gate_up and down, or the two linears of a plain MLP."""

    norm1: Norm
    qkv: Group
    out: Group
    norm2: Norm
    mlp: tuple[Group, Group]
    heads: int
    scale: float
    rows: int
    """Rows that attend to each other, one run after the other."""

    def attend(self, x: Tensor, turned: Turn | None, mask: Tensor | None) -> Tensor:
        """[M, H] -> [M, H]; `mask` is bool [runs, rows], False for keys that nobody may see."""
        q, k, v = (part.unflatten(1, (self.heads, -1)) for part in self.qkv(x))
        if turned is not None:
            q, k = (rotate(part, turned).to(v.dtype) for part in (q, k))
        q, k, v = (part.unflatten(0, (-1, self.rows)).transpose(1, 2) for part in (q, k, v))
        keep = None if mask is None else mask[:, None, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, scale=self.scale)
        (out,) = self.out(mixed.transpose(1, 2).reshape(len(x), -1))
        return out

    def hidden(self, x: Tensor) -> Tensor:
        """The MLP, [M, H] -> [M, H]."""
        first, second = self.mlp
        gated = first(x)
        middle = F.silu(gated[0]) * gated[1] if len(gated) > 1 else F.gelu(gated[0])
        (out,) = second(middle)
        return out

    def __call__(self, x: Tensor, turned: Turn | None, mask: Tensor | None) -> Tensor:
        """The residual float32 [M, H] -> the next."""
        x = x + self.attend(self.norm1(x), turned, mask)
        return x + self.hidden(self.norm2(x))


class Vision:
    """Patches of 224x224 frames -> embeddings; the order of rows is that of `export/vision.py`."""

    def __init__(self, reader: GraphReader) -> None:
        take, root = reader.take, VISION
        self._patches = self._shape(reader, f"{root}.frames")[1]
        self._cells = self._shape(reader, f"{root}.cells")[1]
        self._project = reader.group([f"{root}.patch_embed.proj"])
        self._order = reader.tensor(take(f"{root}.window_order", "Gather").inputs[1])
        self._shape(reader, f"{root}.windows")
        cos, sin = (reader.tensor(f"{root}.rotary_pos_emb.{part}", torch.float32) for part in ("cos", "sin"))
        self._turn = turn(cos, sin)
        self._blocks: list[Block] = []
        while f"{root}.blocks.{len(self._blocks)}.norm1" in reader:
            self._blocks.append(self._block(reader, f"{root}.blocks.{len(self._blocks)}"))
        self._norm = Norm.read(reader, f"{root}.merger.ln_q")
        self._shape(reader, f"{root}.merger.cells")
        self._merge = [reader.group([f"{root}.merger.mlp.{part}"]) for part in (0, 2)]
        take(f"{root}.merger.mlp.1", "Gelu")
        self._inverse = reader.tensor(take(f"{root}.raster_order", "Gather").inputs[1])
        self._shape(reader, "embeddings")
        reader.finish()
        self.dtype = reader.dtype

    def __call__(self, pixels: Tensor) -> Tensor:
        """float32 [T*256, 1176] -> float32 [T*64, H]."""
        (x,) = self._project(pixels.to(self.dtype))
        x = x.float().reshape(-1, self._cells, self._patches // self._cells * x.shape[1])
        frames = len(x)
        x = x[:, self._order].reshape(frames * self._patches, -1)
        cos, sin = (part.repeat(frames, 1, 1, 1) for part in self._turn)
        for block in self._blocks:
            x = block(x, (cos, sin), None)
        x = self._norm(x).reshape(frames * self._cells, -1)
        (x,) = self._merge[0](x)
        (x,) = self._merge[1](F.gelu(x))
        return x.float().unflatten(0, (frames, -1))[:, self._inverse].flatten(0, 1)

    def _block(self, reader: GraphReader, path: str) -> Block:
        attention, mlp = f"{path}.attn", f"{path}.mlp"
        heads = reader.take(f"{attention}.q.rotated", "RotaryEmbedding").ints["num_heads"]
        reader.take(f"{attention}.k.rotated", "RotaryEmbedding")
        rows = self._patches
        if f"{attention}.v.windows" in reader:
            windows = [f"{attention}.{part}.windows" for part in ("q.rotated", "k.rotated", "v")]
            rows = min(self._shape(reader, name)[1] for name in windows)
            self._shape(reader, f"{attention}.attention.frames")
        scale = reader.take(f"{attention}.attention", "MultiHeadAttention").floats["scale"]
        reader.take(f"{attention}.residual", "Add")
        reader.take(f"{mlp}.act_fn", "QuickGelu")
        reader.take(f"{mlp}.product", "Mul")
        reader.take(f"{mlp}.residual", "Add")
        return Block(
            norm1=Norm.read(reader, f"{path}.norm1"),
            qkv=reader.group([f"{attention}.{part}" for part in "qkv"]),
            out=reader.group([f"{attention}.proj"]),
            norm2=Norm.read(reader, f"{path}.norm2"),
            mlp=(
                reader.group([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
                reader.group([f"{mlp}.down_proj"]),
            ),
            heads=heads,
            scale=scale,
            rows=rows,
        )

    @staticmethod
    def _shape(reader: GraphReader, output: str) -> list[int]:
        """What a Reshape makes."""
        return [int(size) for size in reader.array(reader.take(output, "Reshape").inputs[1])]


class Audio:
    """Mel chunks of two seconds -> embeddings, the rows behind a chunk's length left out."""

    def __init__(self, reader: GraphReader) -> None:
        take, root = reader.take, AUDIO
        masks = (("frame_mask", "Less"), ("key_mask", "Less"), ("token_mask", "Less"))
        for name, kind in masks:
            take(f"{root}.{name}.bool", kind)
            take(f"{root}.{name}", "Cast")
        for name in ("lengths", "frame_mask.column", "pairs", "rows", "token_mask.flat", "kept_rows.flat"):
            take(f"{root}.{name}", "Reshape")
        take(f"{root}.kept.twice", "Add")
        take(f"{root}.kept", "Div")
        take(f"{root}.kept_tokens", "Div")
        take(f"{root}.conv1.masked", "Mul")
        take(f"{root}.by_time", "Transpose")
        self._convolutions = [self._convolution(reader, f"{root}.conv{part}") for part in (1, 2)]
        self._places = reader.tensor(take(f"{root}.embedded", "Add").inputs[1], torch.float32)
        self._blocks: list[Block] = []
        while f"{root}.layers.{len(self._blocks)}.residual" in reader:
            self._blocks.append(self._block(reader, f"{root}.layers.{len(self._blocks)}"))
        take(f"{root}.avg_pooler", "ReduceMean")
        self._norm = Norm.read(reader, f"{root}.ln_post")
        self._project = reader.group([f"{root}.proj"])
        take(f"{root}.kept_rows", "NonZero")
        take("embeddings", "Gather")
        reader.finish()
        self.dtype = reader.dtype

    def __call__(self, mel: Tensor, lengths: Tensor) -> Tensor:
        """float32 [C, n_mels, 200] and valid frames int64 [C] -> float32 [n, H]."""
        kept = (lengths + 1) // 2
        x = F.gelu(F.conv1d(mel.to(self.dtype), *self._convolutions[0], padding=1))
        x = x * _below(mel.shape[2], lengths)[:, None].to(x.dtype)
        x = F.gelu(F.conv1d(x, *self._convolutions[1], stride=2, padding=1))
        x = x.transpose(1, 2).float() + self._places
        chunks, states, _ = x.shape
        mask = _below(states, kept)
        x = x.flatten(0, 1)
        for block in self._blocks:
            x = block(x, None, mask)
        x = self._norm(x.unflatten(0, (chunks * states // 2, 2)).mean(1))
        (x,) = self._project(x)
        return x[_below(states // 2, kept // 2).flatten()].float()

    @staticmethod
    def _convolution(reader: GraphReader, path: str) -> tuple[Tensor, Tensor]:
        node = reader.take(path, "Conv")
        reader.take(f"{path}.gelu", "Gelu")
        return reader.tensor(node.inputs[1]), reader.tensor(node.inputs[2])

    def _block(self, reader: GraphReader, path: str) -> Block:
        attention = f"{path}.self_attn"
        mixed = reader.take(f"{attention}.attention", "MultiHeadAttention")
        reader.take(f"{attention}.residual", "Add")
        reader.take(f"{path}.activation_fn", "Gelu")
        reader.take(f"{path}.residual", "Add")
        return Block(
            norm1=Norm.read(reader, f"{attention}_layer_norm"),
            qkv=reader.group([f"{attention}.{part}_proj" for part in "qkv"]),
            out=reader.group([f"{attention}.out_proj"]),
            norm2=Norm.read(reader, f"{path}.final_layer_norm"),
            mlp=(reader.group([f"{path}.fc1"]), reader.group([f"{path}.fc2"])),
            heads=mixed.ints["num_heads"],
            scale=mixed.floats["scale"],
            rows=len(self._places),
        )


def _below(count: int, lengths: Tensor) -> Tensor:
    """bool [C, count]: whether a place lies below the chunk's length."""
    return torch.arange(count, device=lengths.device)[None] < lengths[:, None]
