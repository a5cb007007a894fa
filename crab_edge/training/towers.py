"""Both encoders as batched forwards: the official arithmetic without its per-window and per-chunk Python
loops.

The official forwards attend window by window and chunk by chunk. Training feeds hundreds of pictures a
step, so here the windows and chunks are one batch axis. Results equal the official ones (test), gradients
too, and the modules are called, not their weights, so adapters wrapped around linears take part. Where
transformers' gradient checkpointing is switched on, each block is checkpointed as its official forward would
be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

PATCHES, CELLS, SIDE, CHUNK = 256, 64, 8, 200


def _rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class VisionGrid:
    """Constants of a 16x16 patch grid for one vision tower: window order, its inverse, rotary cos and sin."""

    def __init__(self, tower: nn.Module) -> None:
        grid = torch.tensor([[1, 16, 16]])
        window, _ = get_vision_window_index(
            grid, spatial_merge_size=2, window_size=tower.window_size, patch_size=tower.patch_size
        )
        cos, sin = tower.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, 2))
        self.order = window
        self.back = torch.argsort(window)
        self.cos, self.sin = (
            f.reshape(CELLS, 4, -1)[window].reshape(PATCHES, 1, -1).float() for f in (cos, sin)
        )

    def to(self, device: torch.device) -> VisionGrid:
        """The same constants on `device`, in place."""
        for name in ("order", "back", "cos", "sin"):
            setattr(self, name, getattr(self, name).to(device))
        return self


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; `mask` is true where a query may look.

    In bf16 on a CPU two plain products train 1.3 to 2.6 times as fast as the fused kernel on sequences this
    short.
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        scores = torch.matmul(q * scale, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(dim=-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _through(block: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)`, which stands for the block's forward: checkpointed when the block is set to be."""
    if getattr(block, "gradient_checkpointing", False) and block.training:
        return block._gradient_checkpointing_func(function, *inputs)
    return function(*inputs)


def _vision_attention(attention: nn.Module, x: Tensor, grid: VisionGrid, windows: int) -> Tensor:
    n, length, heads = x.shape[0], PATCHES // windows, attention.num_heads
    q, k, v = (f(x).reshape(n, PATCHES, heads, -1) for f in (attention.q, attention.k, attention.v))
    cos, sin = grid.cos.to(q.dtype), grid.sin.to(q.dtype)
    q, k = (t * cos + _rotate_half(t) * sin for t in (q, k))
    q, k, v = (t.reshape(n * windows, length, heads, -1).transpose(1, 2) for t in (q, k, v))
    out = attend(q, k, v, attention.scaling)
    return attention.proj(out.transpose(1, 2).reshape(n, PATCHES, -1))


def _vision_block(block: nn.Module, grid: VisionGrid, windows: int, x: Tensor) -> Tensor:
    x = x + _vision_attention(block.attn, block.norm1(x), grid, windows)
    return x + block.mlp(block.norm2(x))


def vision_hidden(tower: nn.Module, patches: Tensor, grid: VisionGrid) -> Tensor:
    """Patches [n*256, 1176] -> hidden states [n, 256, hidden] before the merger, in window order."""
    weight = tower.patch_embed.proj.weight
    x = F.linear(patches, weight.flatten(1))
    n = x.shape[0] // PATCHES
    x = x.reshape(n, CELLS, 4, -1)[:, grid.order].reshape(n, PATCHES, -1)
    for index, block in enumerate(tower.blocks):
        windows = 1 if index in tower.fullatt_block_indexes else 4
        x = _through(block, partial(_vision_block, block, grid, windows), x)
    return x


def vision_merge(tower: nn.Module, hidden: Tensor, grid: VisionGrid) -> Tensor:
    """Hidden states [n, 256, hidden] -> cells [n, 64, out] in raster order."""
    return tower.merger(hidden).reshape(hidden.shape[0], CELLS, -1)[:, grid.back]


def vision_cells(tower: nn.Module, patches: Tensor, grid: VisionGrid) -> Tensor:
    """Patches float32 [n*256, 1176] of n temporal slices -> cells [n, 64, out], raster order, 28 px a
    cell.
    """
    return vision_merge(tower, vision_hidden(tower, patches, grid), grid)


def _audio_layer(layer: nn.Module, mask: Tensor | None, x: Tensor) -> Tensor:
    attention, y = layer.self_attn, layer.self_attn_layer_norm(x)
    q, k, v = (
        f(y).reshape(*x.shape[:2], attention.num_heads, -1).transpose(1, 2)
        for f in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = attend(q, k, v, attention.scaling, mask)
    x = x + attention.out_proj(out.transpose(1, 2).reshape(*x.shape[:2], -1))
    return x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))


def audio_hidden(tower: nn.Module, chunks: Tensor, lengths: Tensor) -> Tensor:
    """Mel chunks [C, n_mels, 200] with valid `lengths` int64 [C] -> states [C, 100, d] before pooling."""
    steps = torch.arange(CHUNK, device=chunks.device)
    valid = (steps[None] < lengths[:, None])[:, None]
    x = F.gelu(tower.conv1(chunks)) * valid.to(chunks.dtype)
    x = F.gelu(tower.conv2(x)).transpose(1, 2)
    x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(x.dtype)
    keys = (steps[None, : x.shape[1]] < ((lengths - 1) // 2 + 1)[:, None])[:, None, None]
    mask = None if bool((lengths == CHUNK).all()) else keys
    for layer in tower.layers:
        x = _through(layer, partial(_audio_layer, layer, mask), x)
    return x


def audio_tokens(tower: nn.Module, chunks: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Mel chunks float32 [C, n_mels, 200], `lengths` int64 [C] -> (tokens [C, 50, out], valid bool [C, 50]).

    A chunk of L frames has ((L-1)//2+1)//2 valid tokens of 40 ms; only the last chunk of a clip may be short.
    """
    x = audio_hidden(tower, chunks, lengths)
    x = x.reshape(x.shape[0], x.shape[1] // 2, 2, -1).mean(dim=2)
    valid = torch.arange(x.shape[1], device=x.device)[None] < (((lengths - 1) // 2 + 1) // 2)[:, None]
    return tower.proj(tower.ln_post(x)), valid
