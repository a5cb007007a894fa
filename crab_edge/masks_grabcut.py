"""GrabCut: colour models of object and background, started from a box and points. Needs OpenCV only."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import DependencyError

Bits = NDArray[np.bool_]

#: Longer frames are made smaller first: its time grows with the pixels, its colour models hardly change.
LONGEST_SIDE = 512
_ROUNDS = 5
#: Radius in pixels of what a point marks, for a side of 224.
_RADIUS = 3.0


def opencv() -> Any:
    """The module `cv2`; DependencyError naming the extra when it isn't installed."""
    try:
        return importlib.import_module("cv2")
    except ModuleNotFoundError as error:
        way = "`pip install 'crab-edge[segment]'`"
        raise DependencyError(
            f"masks need OpenCV, which isn't installed; run {way} or give SAM 2's weights"
        ) from error


def segment(
    frame: NDArray[np.uint8],
    box: tuple[float, float, float, float] | None,
    points: Sequence[tuple[float, float]],
) -> Bits:
    """bool [H, W]: the object's pixels in frame uint8 [H, W, 3].

    Outside the box is background, around each point is object, the rest is found. Without a box the object
    may be anywhere, the frame's rim being background. Same input, same mask.
    """
    cv2 = opencv()
    height, width = frame.shape[:2]
    scale = min(1.0, LONGEST_SIDE / max(height, width))
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = frame
    if scale < 1:
        picture = cv2.resize(frame, small, interpolation=cv2.INTER_AREA)
    marks = _marks(
        (small[1], small[0]),
        None if box is None else tuple(value * scale for value in box),
        [(x * scale, y * scale) for x, y in points],
        cv2,
    )
    object_ = (marks == cv2.GC_PR_FGD) | (marks == cv2.GC_FGD)
    if object_.any() and not object_.all():
        cv2.setRNGSeed(0)
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        cv2.grabCut(bgr, marks, None, *models, _ROUNDS, cv2.GC_INIT_WITH_MASK)
        object_ = (marks == cv2.GC_PR_FGD) | (marks == cv2.GC_FGD)
    if scale < 1:
        whole = cv2.resize(object_.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        return whole > 0
    return object_


def _marks(
    shape: tuple[int, int],
    box: tuple[float, ...] | None,
    points: Sequence[tuple[float, float]],
    cv2: Any,
) -> NDArray[np.uint8]:
    height, width = shape
    rim = 0 if box is not None else 1
    x1, y1, x2, y2 = box or (rim, rim, width - rim, height - rim)
    left, top = min(max(0, round(x1)), width - 1), min(max(0, round(y1)), height - 1)
    right, bottom = max(left + 1, min(width, round(x2))), max(top + 1, min(height, round(y2)))
    if (right - left) * (bottom - top) == width * height and min(width, height) > 2:
        # Background needs pixels of its own to be modelled from.
        left, top, right, bottom = 1, 1, width - 1, height - 1
    marks = np.full(shape, cv2.GC_BGD, np.uint8)
    marks[top:bottom, left:right] = cv2.GC_PR_FGD if box is not None else cv2.GC_PR_BGD
    rows, columns = np.mgrid[0:height, 0:width]
    radius = max(1.0, _RADIUS * max(height, width) / 224)
    for x, y in points:
        marks[(columns - x) ** 2 + (rows - y) ** 2 <= radius**2] = cv2.GC_FGD
    return marks
