"""Throw-away losses that teach text to look things up in pictures and sounds.

A narrow decoder trained for minutes never finds out by the answer's cross-entropy alone that the four
coordinates it must say are held by the cells of one object, or that a class that a question names is to be
looked for: it settles on the best constant answer. Losses on the attention of one layer, and on what the
states around it know, show the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import apply_rotary_pos_emb

from crab_edge.training.heads import CELL, SIDE, BoxHead, ClassHead, box_error

#: (row [n], column [n], key head) -> attention [n, heads, S]
Attend = Callable[[Tensor, Tensor, int], Tensor]


class Hidden(NamedTuple):
    """What the decoder held over a batch: normalised last states [B, S, H], what entered each layer and the
    norm, cells and audio tokens bool [B, S], mask bool [B, 1, S, S], cosines and sines.
    """

    last: Tensor
    states: list[Tensor]
    seen: Tensor
    heard: Tensor
    mask: Tensor
    rotary: tuple[Tensor, Tensor]


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
    """The losses of one decoder layer's attention and of the states before and behind it.

    "named": the places that say a box know which class was named. "point": their attention lies on the
    object. "fetch": behind the layer they know its box. "look": a class named anywhere in a question or an
    answer attends to the cells that show it (last key's heads) and the audio tokens that it sounds in (first
    key's heads). "present": behind the next layer the name knows whether it is seen and heard.
    """

    def __init__(self, prototypes: Tensor, labels: Sequence[int], layer: int) -> None:
        super().__init__()
        width = prototypes.shape[1]
        self.layer = layer
        self.box = BoxHead(width)
        self.name = ClassHead(prototypes, scale=12.0 * width**-0.5)
        self.present = nn.Linear(width, 2)
        self.register_buffer("labels", torch.tensor(list(labels)), persistent=False)

    def forward(
        self, text: nn.Module, found: Hidden, batch: dict[str, Tensor], numbers: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a packed batch, those that it has truth for; `numbers` are the ids of 0..224."""
        named = (batch["ids"][..., None] == self.labels).float()
        label = torch.where(named.any(dim=-1), named.argmax(dim=-1), -1)
        attend = partial(self._attention, text.layers[self.layer], found)
        return self._boxes(found, batch, numbers, label, attend) | self._names(found, batch, label, attend)

    def _boxes(
        self, found: Hidden, batch: dict[str, Tensor], numbers: Tensor, label: Tensor, attend: Attend
    ) -> dict[str, Tensor]:
        said = said_boxes(batch, numbers)
        # Stills only: a cell of a video is seen at one moment, a box said of a picture.
        still = found.seen.sum(dim=1)[said.row[:, 0]] == SIDE * SIDE
        row, column, box = said.row[still], said.column[still], said.box[still]
        if not len(row):
            return {}
        target = torch.zeros(len(row), label.shape[1], dtype=torch.bool, device=row.device)
        target[found.seen[row[:, 0]]] = inside(box).flatten()
        four = torch.arange(len(row), device=row.device).repeat_interleave(4)
        row, column = row.flatten(), column.flatten()
        on_object = (attend(row, column, -1) * target[four, None]).sum(dim=-1)
        read = self.box(_normed(found.states[self.layer + 1][row, column]))
        out = {"point": -(on_object + 1e-4).log().mean(), "fetch": box_error(read, box[four]).mean()}
        # The name said last before the coordinates, in the same answer.
        place = torch.arange(label.shape[1], device=row.device)
        own = batch["segment"][row] == batch["segment"][row, column][:, None]
        before = own & (label[row] >= 0) & (place < column[:, None])
        told = before.any(dim=1)
        if bool(told.any()):
            last = (before * place).argmax(dim=1)
            logits = self.name(_normed(found.states[self.layer][row, column]))[told]
            out["named"] = F.cross_entropy(logits, label[row, last][told])
        return out

    def _names(
        self, found: Hidden, batch: dict[str, Tensor], label: Tensor, attend: Attend
    ) -> dict[str, Tensor]:
        row, column = ((label >= 0) & (batch["segment"] > 0)).nonzero(as_tuple=True)
        if not len(row):
            return {}
        asked = label[row, column]
        shows = torch.full_like(label, -1)
        shows[found.seen] = batch["cell_label"].flatten()
        cells = shows[row] == asked[:, None]
        sounds = torch.zeros(*label.shape, len(self.labels), dtype=torch.bool, device=label.device)
        sounds[found.heard] = batch["activity"].bool()
        tokens = sounds[row, :, asked]
        behind = self.present(_normed(found.states[min(self.layer + 2, len(found.states) - 1)][row, column]))
        look, present = [], []
        for number, (target, stream, group) in enumerate(((cells, found.seen, -1), (tokens, found.heard, 0))):
            there = target.any(dim=1)
            if bool(there.any()):
                share = attend(row[there], column[there], group)
                look.append(-((share * target[there, None]).sum(dim=-1) + 1e-4).log().mean())
            known = stream.any(dim=1)[row]
            if bool(known.any()):
                present.append(
                    F.binary_cross_entropy_with_logits(behind[known, number], there[known].float())
                )
        return {name: sum(each) / len(each) for name, each in (("look", look), ("present", present)) if each}

    def _attention(self, layer: nn.Module, found: Hidden, row: Tensor, column: Tensor, key: int) -> Tensor:
        """Attention [n, heads, S] of the heads that share key head `key`, at the places (row, column) [n]."""
        attention = layer.self_attn
        depth, shared = attention.head_dim, attention.num_key_value_groups
        normed = layer.input_layernorm(found.states[self.layer])
        queries, keys = (
            proj(normed).unflatten(-1, (-1, depth)).transpose(1, 2)
            for proj in (attention.q_proj, attention.k_proj)
        )
        queries, keys = apply_rotary_pos_emb(queries, keys, *found.rotary)
        queries = queries.unflatten(1, (-1, shared))[:, key].transpose(1, 2)[row, column].float()
        logits = attention.scaling * torch.einsum("nhd,nsd->nhs", queries, keys[row, key].float())
        return logits.masked_fill(~found.mask[row, 0, column][:, None], -torch.inf).softmax(dim=-1)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:])
