"""Several questions about one scene in one sequence.

The media prefix comes once; every question with its answer is a segment that sees the prefix and itself, at
the positions it would have if it stood alone. Loss and gradients equal those of separate samples (test), at
a fraction of the cost: a clip's prefix is several hundred tokens, a question with its answer some forty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crab_edge.positions import next_position, tmrope
from crab_edge.prompt import MediaItem, PromptBuilder

IGNORE = -100


@dataclass(frozen=True)
class Packed:
    """One scene: ids int64 [S], positions int64 [3, S], segment int64 [S] (0 = prefix), targets int64 [S].

    `targets[i]` is the id that position i must predict, -100 where there is no loss; `pixels[i]` bool says
    that this id is a coordinate of a box.
    """

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    segment: NDArray[np.int64]
    targets: NDArray[np.int64]
    pixels: NDArray[np.bool_]


def coordinate_tokens(builder: PromptBuilder, answer: Sequence[int]) -> list[bool]:
    """Which ids of an answer are numbers inside `<obj>...</obj>` or `[x1,y1,...]`."""
    out, text = [], ""
    for token in answer:
        piece = builder.decode([token])
        tail = text[max(text.rfind("<obj>"), text.rfind("["), 0) :]
        inside = ("<obj>" in tail and "</" not in tail) or (tail.startswith("[") and "]" not in tail)
        out.append(inside and piece.strip().isdigit())
        text += piece
    return out


def pack(
    builder: PromptBuilder,
    lead: str,
    items: Sequence[MediaItem],
    samples: Sequence[tuple[str, str]],
    coordinates_only: Sequence[bool] = (),
) -> Packed:
    """Pack (instruction, answer) pairs about the same media.

    Loss as in the Crab+ reference: from just after `<|im_start|>assistant`, so the newline, the answer and
    `<|im_end|>`, not the newline that ends the turn. Answers marked in `coordinates_only` have it on their
    coordinates alone.
    """
    prefix = builder.prefix(lead, items)
    where = tmrope(prefix, builder.special, items, builder.cfg)
    start = next_position(where)
    ids, positions = [prefix], [where]
    segment = [np.zeros(len(prefix), np.int64)]
    targets = [np.full(len(prefix), IGNORE, np.int64)]
    pixels = [np.zeros(len(prefix), np.bool_)]
    for number, (instruction, answer) in enumerate(samples, start=1):
        question = builder.suffix(instruction)
        said = builder.encode(answer)
        whole = np.concatenate([question, [*said, builder.special.im_end]]).astype(np.int64)
        # The last id of a prompt is "\n"; the id before it ends "assistant" and predicts the newline.
        first = len(question) - 2
        target = np.full(len(whole), IGNORE, np.int64)
        target[first:-1] = whole[first + 1 :]
        # Nothing follows <|im_end|>, so it needn't be read.
        ids.append(whole[:-1])
        pixel = np.zeros(len(whole) - 1, np.bool_)
        pixel[first + 1 : -1] = coordinate_tokens(builder, said)
        if number <= len(coordinates_only) and coordinates_only[number - 1]:
            target[:-1][~pixel] = IGNORE
        targets.append(target[:-1])
        pixels.append(pixel)
        segment.append(np.full(len(whole) - 1, number, np.int64))
        positions.append(np.broadcast_to(start + np.arange(len(whole) - 1), (3, len(whole) - 1)))
    return Packed(
        np.concatenate(ids),
        np.concatenate(positions, axis=1),
        np.concatenate(segment),
        np.concatenate(targets),
        np.concatenate(pixels),
    )


def collate(packed: Sequence[Packed], pad: int) -> dict[str, Tensor]:
    """Right-padded batch: ids [B, S], positions [3, B, S], segment [B, S] (-1 = padding), targets [B, S],
    pixels bool [B, S]."""
    length = max(len(p.ids) for p in packed)
    size = len(packed)
    ids = np.full((size, length), pad, np.int64)
    positions = np.ones((3, size, length), np.int64)
    segment = np.full((size, length), -1, np.int64)
    targets = np.full((size, length), IGNORE, np.int64)
    pixels = np.zeros((size, length), np.bool_)
    for row, p in enumerate(packed):
        n = len(p.ids)
        ids[row, :n], positions[:, row, :n] = p.ids, p.positions
        segment[row, :n], targets[row, :n], pixels[row, :n] = p.segment, p.targets, p.pixels
    arrays = {"ids": ids, "positions": positions, "segment": segment, "targets": targets, "pixels": pixels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def attention_mask(segment: Tensor) -> Tensor:
    """segment int64 [B, S] -> bool [B, 1, S, S], true where row may attend to column.

    Causal; a question sees the prefix and itself; padding sees itself, so that no row is empty.
    """
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    same = segment[:, :, None] == segment[:, None, :]
    prefix = (segment == 0)[:, None, :] & (segment >= 0)[:, :, None]
    return (causal & (same | prefix))[:, None]
