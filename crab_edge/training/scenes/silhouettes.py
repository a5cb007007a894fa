"""Masks from the cut-outs' alpha, and the box and points by which an answer speaks of a mask."""

from __future__ import annotations

import numpy as np
from PIL import Image

from crab_edge.training.scenes.compose import FRAME, Stage

_SHOWN = 127


def silhouettes(stage: Stage, time: float, duration: float) -> list[np.ndarray]:
    """bool [height, width] of every object of the stage at native size, less what stands before it."""
    width, height = stage.canvas
    out: list[np.ndarray] = []
    for thing in stage.things:
        alpha = Image.new("L", stage.canvas)
        if thing.visible[0] <= time < thing.visible[1]:
            x, y = thing.centre(time, duration)
            corner = round(x * width - thing.cutout.width / 2), round(y * height - thing.cutout.height / 2)
            alpha.paste(thing.cutout.getchannel("A"), corner)
        mask = np.asarray(alpha) > _SHOWN
        out = [other & ~mask for other in out]
        out.append(mask)
    return out


def squared(mask: np.ndarray) -> np.ndarray:
    """bool [224, 224]: stretched as the official metric does, nearest neighbour."""
    image = Image.fromarray(mask.astype(np.uint8) * 255).resize((FRAME, FRAME), Image.Resampling.NEAREST)
    return np.asarray(image) > _SHOWN


def box_of(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom (the last ones exclusive, at most 223, as the official reader wants them)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return None
    return (
        int(columns[0]),
        int(rows[0]),
        min(int(columns[-1]) + 1, FRAME - 1),
        min(int(rows[-1]) + 1, FRAME - 1),
    )


def points_of(masks: list[np.ndarray], count: int = 3) -> tuple[tuple[float, float], ...]:
    """`count` points (x, y) well inside, spread over the masks (largest first) and over each of them."""
    order = sorted((m for m in masks if m.any()), key=lambda m: -int(m.sum()))
    chosen: list[list[tuple[int, int]]] = [[] for _ in order]
    inner = [_inside(mask) for mask in order]
    for number in range(count if order else 0):
        at = number % len(order)
        rows, columns, depth = inner[at]
        if not chosen[at]:
            best = int(depth.argmax())
        else:
            taken = np.array(chosen[at])
            away = np.hypot(rows[:, None] - taken[:, 0], columns[:, None] - taken[:, 1]).min(axis=1)
            best = int(away.argmax())
        chosen[at].append((int(rows[best]), int(columns[best])))
    points = [chosen[number % len(order)][number // len(order)] for number in range(count if order else 0)]
    return tuple((float(column), float(row)) for row, column in points)


def _inside(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, columns and depth (how many erosions it survives) of the pixels of 40 % of the depth or more."""
    depth = np.zeros(mask.shape, np.int32)
    left = np.pad(mask, 1)
    for _ in range(FRAME):
        if not left.any():
            break
        depth += left[1:-1, 1:-1]
        left = np.pad(
            left[1:-1, 1:-1] & left[:-2, 1:-1] & left[2:, 1:-1] & left[1:-1, :-2] & left[1:-1, 2:], 1
        )
    rows, columns = np.nonzero(depth >= max(1, int(np.ceil(0.4 * depth.max()))))
    return rows, columns, depth[rows, columns]
