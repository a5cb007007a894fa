"""Box and points -> mask of the object, and masks as run lengths, arrays and files.

SAM 2 segments where its weights are given, GrabCut (OpenCV) where they aren't; `Mask.source` says which.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crab_edge.errors import InputError, TaskError
from crab_edge.results import Box, Mask, Points, Result

Bits = NDArray[np.bool_]
Frame = NDArray[np.uint8]

TOOLS = ("auto", "sam2", "grabcut")
#: Where SAM 2's weights are, when no argument says it.
WEIGHTS_VARIABLE = "CRAB_EDGE_SAM2"

_chosen: ContextVar[tuple[str, Path | None]] = ContextVar("crab_edge_mask_tool", default=("auto", None))


@contextmanager
def using(tool: str = "auto", weights: str | Path | None = None) -> Iterator[None]:
    """Within the block, `segment` without arguments uses this tool and these weights."""
    _checked(tool)
    token = _chosen.set((tool, Path(weights) if weights is not None else None))
    try:
        yield
    finally:
        _chosen.reset(token)


def choose(tool: str = "auto", weights: str | Path | None = None) -> tuple[str, Path | None]:
    """The tool that `segment` would use and SAM 2's weights, after `using` and the environment were asked.

    DependencyError when the tool's package is missing, InputError for weights that aren't there.
    """
    _checked(tool)
    set_tool, set_weights = _chosen.get()
    tool = set_tool if tool == "auto" else tool
    if weights is None:
        weights = set_weights or os.environ.get(WEIGHTS_VARIABLE) or None
    if tool == "auto":
        tool = "grabcut" if weights is None else "sam2"
    if tool == "grabcut":
        from crab_edge import masks_grabcut

        masks_grabcut.opencv()
        return tool, None
    if weights is None:
        raise InputError(
            "SAM 2 needs weights: a folder with its ONNX encoder and decoder or a .pt checkpoint; "
            f"name it with --sam2 or {WEIGHTS_VARIABLE}, or use GrabCut"
        )
    path = Path(weights)
    if not path.exists():
        raise InputError(f"{path}: no such SAM 2 weights; give a folder with the ONNX export or a checkpoint")
    return tool, path


def segment(
    frame: Frame,
    box: Box | None,
    points: Points | None,
    *,
    tool: str = "auto",
    weights: str | Path | None = None,
) -> Mask:
    """The mask of the object in `box` (left, top, right, bottom) that the `points` lie on.

    frame: uint8 [H, W, 3], RGB; box and points in its pixels, at least one of them. The mask has the frame's
    size. tool: "sam2", "grabcut" or "auto" = SAM 2 when weights are given (argument, `using`, the variable
    CRAB_EDGE_SAM2), else GrabCut. weights: a folder with SAM 2's ONNX encoder and decoder, or a checkpoint of
    the `sam2` package. TaskError when there's neither box nor point; DependencyError, InputError as `choose`.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise InputError(f"expected a frame uint8 [H, W, 3], got {frame.dtype} {list(frame.shape)}")
    if box is None and (points is None or not points.xy):
        raise TaskError("a mask needs a box or a point of the object, got neither")
    used, path = choose(tool, weights)
    corners = None if box is None else (box.x1, box.y1, box.x2, box.y2)
    xy = () if points is None else points.xy
    if used == "grabcut":
        from crab_edge import masks_grabcut

        bits = masks_grabcut.segment(frame, corners, xy)
    else:
        from crab_edge import masks_sam2

        assert path is not None
        bits = masks_sam2.segment(frame, corners, xy, path)
    label = box.label if box is not None else points.label if points is not None else ""
    return from_bits(bits, label, used)


def add_masks(
    results: Sequence[Result],
    frame: Frame,
    *,
    size: tuple[int, int] | None = None,
    tool: str = "auto",
    weights: str | Path | None = None,
) -> tuple[Result, ...]:
    """The results with a mask for every object that has a box or points; the masks come last.

    frame: uint8 [H, W, 3] or [1, H, W, 3]. size: (width, height) of the frame that the coordinates belong to,
    and of the masks; the frame's own by default. A frame of another size is segmented as it is.
    """
    picture = frame[0] if frame.ndim == 4 else frame
    height, width = picture.shape[:2]
    own_width, own_height = size or (width, height)
    across, down = width / own_width, height / own_height
    out = list(results)
    for box, points in objects(results):
        mask = segment(
            picture,
            None if box is None else _scaled_box(box, across, down),
            None if points is None else _scaled_points(points, across, down),
            tool=tool,
            weights=weights,
        )
        out.append(resized(mask, own_width, own_height))
    return tuple(out)


def objects(results: Sequence[Result]) -> list[tuple[Box | None, Points | None]]:
    """Boxes with the points of the same label that follow them (or come before), one pair an object."""
    found: list[tuple[Box | None, Points | None]] = []
    for result in results:
        if not isinstance(result, Box | Points):
            continue
        box, points = found[-1] if found else (None, None)
        last = box.label if box is not None else points.label if points is not None else None
        # Points may come unnamed when the sentence before them names the object.
        same = last is not None and (result.label == last or not result.label or not last)
        if isinstance(result, Box) and same and box is None:
            found[-1] = (result, points)
        elif isinstance(result, Points) and same and points is None:
            found[-1] = (box, result)
        elif isinstance(result, Points) and same and points is not None:
            found[-1] = (box, replace(points, xy=points.xy + result.xy))
        else:
            found.append((result, None) if isinstance(result, Box) else (None, result))
    return found


def encode(bits: Bits) -> tuple[int, ...]:
    """Run lengths of bool [H, W], column by column, the first run being zeros (COCO's uncompressed form)."""
    flat = np.asarray(bits, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]]))
    first = (0,) if flat.size and flat[0] else ()
    return (*first, *(int(run) for run in runs)) if flat.size else ()


def decode(mask: Mask) -> Bits:
    """bool [H, W] of a mask; InputError when its run lengths don't fill it."""
    counts = np.asarray(mask.counts, dtype=np.int64)
    if (counts < 0).any() or int(counts.sum()) != mask.height * mask.width:
        raise InputError(
            f"the mask of {mask.label!r} has runs of {int(counts.sum())} pixels, "
            f"expected {mask.height} x {mask.width}"
        )
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape((mask.height, mask.width), order="F")


def from_bits(bits: Bits, label: str, source: str) -> Mask:
    """A mask of bool [H, W]."""
    height, width = bits.shape
    return Mask(label, int(height), int(width), encode(bits), source)


def resized_bits(bits: Bits, width: int, height: int) -> Bits:
    """bool [H, W] -> bool [height, width], nearest pixel."""
    if bits.shape == (height, width):
        return bits
    picture = Image.fromarray(bits.astype(np.uint8) * 255)
    return np.asarray(picture.resize((width, height), Image.Resampling.NEAREST)) > 0


def resized(mask: Mask, width: int, height: int) -> Mask:
    """The mask stretched to another frame size, nearest pixel."""
    if (mask.width, mask.height) == (width, height):
        return mask
    return from_bits(resized_bits(decode(mask), width, height), mask.label, mask.source)


def read(path: str | Path) -> Bits:
    """bool [H, W] of a mask picture: what isn't black is the object (Crab+ reference)."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("L")) > 0
    except OSError as error:
        raise InputError(f"{path}: the mask can't be read ({error}); complete the data set") from error


def read_frame(path: str | Path, side: int | None = None) -> Frame:
    """uint8 [H, W, 3] of a picture; with `side`, stretched to a square (Lanczos, as Crab+'s mask stage)."""
    try:
        with Image.open(path) as picture:
            rgb = picture.convert("RGB")
            if side is not None:
                rgb = rgb.resize((side, side), Image.Resampling.LANCZOS)
            return np.asarray(rgb)
    except OSError as error:
        raise InputError(f"{path}: the frame can't be read ({error}); name the data with --data") from error


def located(path: str | Path, folder: Path | None) -> Path:
    """A picture of a list: as named, or in the task's data folder (lists may hold their author's paths)."""
    given = Path(path)
    if given.is_file() or folder is None:
        return given
    parts = given.parts
    if given.is_absolute() and folder.name in parts[:-1]:
        return folder.joinpath(*parts[parts.index(folder.name) + 1 :])
    return folder / given


def _checked(tool: str) -> None:
    if tool not in TOOLS:
        raise InputError(f"unknown mask tool {tool!r}; the tools are {', '.join(TOOLS)}")


def _scaled_box(box: Box, across: float, down: float) -> Box:
    return Box(box.label, box.x1 * across, box.y1 * down, box.x2 * across, box.y2 * down)


def _scaled_points(points: Points, across: float, down: float) -> Points:
    return Points(points.label, tuple((x * across, y * down) for x, y in points.xy))
