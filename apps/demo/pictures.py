"""Boxes, points and masks drawn on the clip's picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crab_edge.results import Answer, Box, Mask, Points, Result

if TYPE_CHECKING:
    from crab_edge.clip import Clip

_LONGEST = 1280


def placed(answer: Answer) -> list[Result]:
    """The results that have a place in the picture."""
    return [result for result in answer.parsed if isinstance(result, (Box, Points, Mask))]


def drawn(clip: Clip, answers: Sequence[Answer]) -> tuple[tuple[str, str], ...]:
    """(task, picture as a data URI) of each answer that speaks of places. Decodes: not for the event loop."""
    with_places = [answer for answer in answers if placed(answer)]
    picture = _picture(clip) if with_places else None
    if picture is None:
        return ()
    from crab_edge_apps._draw import annotate_image
    from crab_edge_apps.demo.look import jpeg
    from PIL import Image

    out = []
    for answer in with_places:
        image = Image.fromarray(annotate_image(picture, placed(answer)))
        image.thumbnail((_LONGEST, _LONGEST))
        out.append((answer.task, jpeg(image, 88)))
    return tuple(out)


def _picture(clip: Clip) -> NDArray[np.uint8] | None:
    """uint8 [H, W, 3]: the picture itself, or what a task was shown of the middle of a video."""
    if clip.images:
        return clip.images[0].original()
    if not clip.videos:
        return None
    from PIL import Image

    video = clip.videos[0]
    frame = Image.fromarray(video.frames(3)[1]).resize((video.width, video.height), Image.Resampling.BICUBIC)
    return np.asarray(frame)
