"""Results drawn on pictures and videos: boxes, points, masks, captions of events, short answers.

    picture = annotate_image(rgb, session.ask(task="arig").parsed)
    annotate_video("clip.mp4", session.ask(), "annotated.mp4")

Results are typed ones (`crab_edge.results`) or the dictionaries of `results_to_json`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from crab_edge_apps._draw.overlay import Overlay, Picture
from crab_edge_apps._draw.results import anything, shown
from crab_edge_apps._draw.video import annotate_video

from crab_edge.errors import InputError

__all__ = ["annotate_image", "annotate_video", "anything"]


def annotate_image(rgb: Picture, results: Iterable[Any], *, question: str | None = None) -> Picture:
    """A copy of a picture uint8 [H, W, 3] with results drawn on it.

    Coordinates are the picture's pixels; masks of another size are stretched. `question` stands before a
    short answer. Raises InputError for an array of another shape or type.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise InputError(f"expected a picture uint8 [H, W, 3], got {rgb.dtype} {list(rgb.shape)}")
    picture = np.array(rgb)
    results = [one._replace(question=question) for one in shown(results)]
    Overlay(rgb.shape[1], rgb.shape[0], results).draw(picture, None)
    return picture
