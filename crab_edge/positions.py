"""TMRoPE: the (time, height, width) position of every token.

Equal to transformers' `Qwen2_5OmniThinker...get_rope_index` with `use_audio_in_video=False`, the only way
Crab+ runs it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import CrabError
from crab_edge.features import FeatureConfig
from crab_edge.prompt import MediaItem, SpecialIds


def tmrope(
    ids: NDArray[np.int64],
    special: SpecialIds,
    media: Sequence[MediaItem],
    cfg: FeatureConfig,
    start: int = 0,
) -> NDArray[np.int64]:
    """Positions of a token sequence without padding.

    ids: int64 [S]; media: one item for each run of placeholders, in order; start: the first position, for
    text that continues a sequence. Returns int64 [3, S], axes time, height, width. Whatever follows starts at
    `next_position`.

    Text and audio count up by one on all axes (one audio token is 40 ms). A grid of T x H x W merge groups
    starts at p with time p + trunc(k * seconds_per_grid * ids per second), height p + row, width p + column,
    in row-major order. What follows starts one past the largest position so far. CrabError if placeholders
    and items don't match.
    """
    ids = np.asarray(ids, np.int64)
    kinds = {special.video: "video", special.image: "image", special.audio: "audio"}
    out = np.empty((3, ids.size), np.int64)
    here, position = 0, start
    placeholders = np.flatnonzero(np.isin(ids, list(kinds)))
    for number, item in enumerate(media):
        first = (
            placeholders[np.searchsorted(placeholders, here)] if (placeholders >= here).any() else ids.size
        )
        last = first + item.tokens
        if last > ids.size or any(kinds.get(int(i)) != item.kind for i in ids[first:last]):
            raise CrabError(
                f"medium {number}: expected a run of {item.tokens} {item.kind} placeholders, found none there"
            )
        out[:, here:first] = np.arange(position, position + first - here)
        position += int(first - here)
        if item.tokens:
            out[:, first:last] = position + _offsets(item, cfg)
            position = int(out[:, first:last].max()) + 1
        here = int(last)
    if (placeholders >= here).any():
        raise CrabError(f"the ids hold more placeholders than the {len(media)} media given")
    out[:, here:] = np.arange(position, position + ids.size - here)
    return out


def next_position(positions: NDArray[np.int64]) -> int:
    """The position of the token after these: one past the largest on any axis; 0 after none."""
    return int(positions.max()) + 1 if positions.size else 0


def _offsets(item: MediaItem, cfg: FeatureConfig) -> NDArray[np.int64]:
    """int64 [3, tokens], relative to the item's first position."""
    if item.kind == "audio" or item.grid is None:
        return np.broadcast_to(np.arange(item.tokens), (3, item.tokens))
    t, h, w = item.grid[0], item.grid[1] // cfg.merge, item.grid[2] // cfg.merge
    if t * h * w != item.tokens:
        raise CrabError(
            f"a grid of {item.grid} patches makes {t * h * w} tokens, the item says {item.tokens}"
        )
    seconds = np.float32(cfg.seconds_per_grid if item.kind == "video" else 1.0)
    # float32 before truncation, as the official code computes it.
    times = (np.arange(t, dtype=np.float32) * seconds * np.float32(cfg.position_id_per_second)).astype(
        np.int64
    )
    rows, columns = np.divmod(np.arange(h * w), w)
    return np.stack([np.repeat(times, h * w), np.tile(rows, t), np.tile(columns, t)])
