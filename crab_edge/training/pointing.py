"""Throw-away losses that teach an answer to fetch a box from the picture.

A narrow decoder trained for minutes never finds out by the answer's cross-entropy alone that the four
coordinates it must say are held by the cells of one object: it settles on the best constant box. Two losses
at the places where coordinates are said show the way. One asks the attention of a few heads to lie on the
cells inside the true box, one reads the box linearly off the state behind those heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

from crab_edge.training.heads import CELL, SIDE, BoxHead, box_error


@dataclass(frozen=True)
class Said:
    """Boxes that answers say: row and column int64 [n, 4] of the places that predict x1, y1, x2, y2, and the
    boxes float32 [n, 4] in pixels of 224.
    """

    row: Tensor
    column: Tensor
    box: Tensor


def said_boxes(batch: dict[str, Tensor], numbers: Tensor) -> Said:
    """Answers of a packed batch with exactly four coordinates; `numbers` are the ids of 0..224."""
    where = batch["pixels"].nonzero()
    segment = batch["segment"][where[:, 0], where[:, 1]]
    answer = where[:, 0] * (int(batch["segment"].max()) + 1) + segment
    _, place, count = answer.unique_consecutive(return_inverse=True, return_counts=True)
    where = where[count[place] == 4].reshape(-1, 4, 2)
    ids = batch["targets"][where[..., 0], where[..., 1]]
    values = (numbers == ids[..., None]).float().argmax(dim=-1)
    return Said(where[..., 0], where[..., 1], values.float())


def inside(box: Tensor) -> Tensor:
    """bool [n, 64]: the cells whose middle lies in the inner four fifths of each box [n, 4]; at least one."""
    centre = (torch.arange(SIDE, device=box.device) + 0.5) * CELL
    cy, cx = (a.reshape(1, -1) for a in torch.meshgrid(centre, centre, indexing="ij"))
    middle, half = (box[:, :2] + box[:, 2:]) / 2, 0.4 * (box[:, 2:] - box[:, :2])
    dx, dy = (cx - middle[:, :1]).abs(), (cy - middle[:, 1:]).abs()
    found = (dx <= half[:, :1]) & (dy <= half[:, 1:])
    nearest = (dx**2 + dy**2).argmin(dim=-1)
    return found | F.one_hot(nearest, SIDE * SIDE).bool()


class Pointing(nn.Module):
    """The losses "point" and "fetch" of one decoder layer and of the state behind it."""

    def __init__(self, width: int, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.box = BoxHead(width)

    def forward(
        self,
        text: nn.Module,
        states: list[Tensor],
        batch: dict[str, Tensor],
        seen: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
        numbers: Tensor,
    ) -> dict[str, Tensor]:
        """`states[i]` [B, S, H] enters decoder layer i; seen bool [B, S] marks cells, mask [B, 1, S, S]."""
        said = said_boxes(batch, numbers)
        # Stills only: a cell of a video is seen at one moment, a box said of a picture.
        still = seen.sum(dim=1)[said.row[:, 0]] == SIDE * SIDE
        row, column, box = said.row[still], said.column[still], said.box[still]
        zero = states[-1].sum() * 0
        if not len(row):
            return {"point": zero, "fetch": zero}
        after = states[self.layer + 1][row, column]
        read = self.box(F.rms_norm(after.float(), after.shape[-1:])).flatten(0, 1)
        fetch = box_error(read, box.repeat_interleave(4, dim=0)).mean()
        share = self._attention(text.layers[self.layer], states[self.layer], row, column, mask, rotary)
        target = torch.zeros(len(row), seen.shape[1], dtype=torch.bool, device=seen.device)
        target[seen[row[:, 0]]] = inside(box).flatten()
        on_object = (share * target[:, None, None]).sum(dim=-1)
        return {"point": -(on_object + 1e-4).log().mean(), "fetch": fetch}

    def _attention(
        self,
        layer: nn.Module,
        x: Tensor,
        row: Tensor,
        column: Tensor,
        mask: Tensor,
        rotary: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Attention [n, 4, heads, S] of the last key's heads at the places (row, column) [n, 4]."""
        attention = layer.self_attn
        depth, shared = attention.head_dim, attention.num_key_value_groups
        normed = layer.input_layernorm(x)
        query, key = (
            proj(normed).unflatten(-1, (-1, depth)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        query = query[:, -shared:].transpose(1, 2)[row, column].float()
        key = key[row[:, 0], -1].float()
        logits = attention.scaling * torch.einsum("nphd,nsd->nphs", query, key)
        allowed = mask[row, 0, column][:, :, None]
        return logits.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
