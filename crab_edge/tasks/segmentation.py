"""The pixels of an object: what sounds (AVSBench S4 and MS3), or what an expression names (Ref-AVS).

A model answers with a box and up to three points on the object; `crab_edge.masks` makes a mask of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from crab_edge.errors import InputError
from crab_edge.results import Box, Choice, MaskFile, Points, Result, Unparsed
from crab_edge.tasks import grammars
from crab_edge.tasks import text as read
from crab_edge.tasks.base import FRAME_SIDE, MODEL_CONTEXT, MediaContext, Parsed, Record, Task, required
from crab_edge.tasks.recipes import IMAGE_AUDIO_5TH, IMAGE_AUDIO_10TH

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: A list may name its masks itself; otherwise they lie beside the frames, as the official evaluation has it.
MASK_FIELDS = ("mask_path", "gt_mask_path", "mask", "gt_mask")
_POINTS = 3
_SOUNDING = "The object making the sound in the video"
_NAMED = re.compile(
    r"\bobjects?(?: (?:that is |that are )?(?:making|producing) (?:the )?sounds?)?"
    r"(?: (?:in|within) the (?:video frame|video|image|frame|picture))? (?:is|are) ",
    re.IGNORECASE | re.ASCII,
)
_LABEL_END = re.compile(
    r"[.,]? (?:and )?(?:with )?(?:its|the|three) (?:coordinates?|bounding box|box|points?|pixel points?)"
    r"|<|[(\[] ?-?[0-9]",
    re.IGNORECASE | re.ASCII,
)


def _label(text: str) -> str:
    """What the first sentence of the official form names, or nothing."""
    match = _NAMED.search(text)
    if match is None:
        return ""
    part = text[match.end() :]
    stop = _LABEL_END.search(part)
    return (part[: stop.start()] if stop else part).strip(" .,;:")


def _box_and_points(text: str, label: str, context: MediaContext) -> list[Result]:
    """The first box and the last three points, which are what the official evaluation takes."""
    out: list[Result] = []
    boxes, points = read.spots(text)
    for values in boxes[:1]:
        box = read.frame_box(values, context)
        out.append(box if isinstance(box, Unparsed) else Box(label, *box))
    kept: list[tuple[float, float]] = []
    for values in points[-_POINTS:]:
        point = read.frame_point(values, context)
        if isinstance(point, Unparsed):
            out.append(point)
        else:
            kept.append(point)
    if kept:
        out.append(Points(label, tuple(kept)))
    return out


def _parse_avs(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """Official validity: a point at least, and three where there is no box."""
    text = read.clean(answer)
    label = _label(text)
    out = _box_and_points(text, label, context)
    if not out:
        named: list[Result] = [Choice(label)] if label else []
        return (*named, Unparsed(f"no box and no points in {read.quote(text)}"))
    if not any(isinstance(result, Unparsed) for result in out):
        points = [len(result.xy) for result in out if isinstance(result, Points)]
        if not points:
            out.append(Unparsed("no points on the object"))
        elif points[0] < _POINTS and not read.only(Box, out):
            out.append(Unparsed(f"no box, and {points[0]} of {_POINTS} points"))
    return tuple(out)


def _parse_ref(answer: str, context: MediaContext = MODEL_CONTEXT) -> Parsed:
    """Choice "false", or "true" with a box, points or both; a false anywhere counts, as officially."""
    text = read.clean(answer)
    said = {block.text.lower().strip(read.EDGES) for block in read.blocks(text, ("answer",))}
    if said & {"false", "no"}:
        return (Choice("false"),)
    if not said & {"true", "yes"}:
        return (Unparsed(f"neither true nor false in an <answer>: {read.quote(text)}"),)
    found = _box_and_points(text, _label(text), context)
    return (Choice("true"), *(found or [Unparsed("no box and no points")]))


def _spots(results: Sequence[Result], context: MediaContext) -> str:
    """ "Its bounding box is [x1,y1,x2,y2] and its points are [x,y],[x,y]." or what there is of it."""
    across, down = FRAME_SIDE / context.width, FRAME_SIDE / context.height
    parts = []
    for box in read.only(Box, results)[:1]:
        x1, x2 = read.whole_range(box.x1 * across, box.x2 * across)
        y1, y2 = read.whole_range(box.y1 * down, box.y2 * down)
        parts.append(f"its bounding box is [{x1},{y1},{x2},{y2}]")
    for points in read.only(Points, results)[:1]:
        pixels = [(_pixel(x * across), _pixel(y * down)) for x, y in points.xy]
        parts.append("its points are " + ",".join(f"[{x},{y}]" for x, y in pixels))
    sentence = " and ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""


def _pixel(value: float) -> int:
    return min(FRAME_SIDE - 1, max(0, int(value + 0.5)))


def _subject(subject: str, results: Sequence[Result]) -> str:
    labels = [r.label for r in results if isinstance(r, (Box, Points))]
    return f"{subject} is {labels[0]}. " if labels and labels[0] else ""


def _render_avs(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    for choice in read.only(Choice, results):
        return f"{_SOUNDING} is {choice.value}."
    return _subject(_SOUNDING, results) + _spots(results, context)


def _render_ref(results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str:
    for choice in read.only(Choice, results):
        if choice.value == "false":
            return "<answer>false</answer> The object is absent."
        sentences = _subject("The object", results) + _spots(results, context)
        return f"<answer>true</answer> {sentences}".strip()
    return ""


def _mask_path(record: Record) -> Path:
    """Where a record's mask lies. Official layout: S4 and MS3 frames/K.jpg -> labels_rgb/K.png; Ref-AVS
    media/.../frames/K.jpg -> gt_mask/.../fid_F/0000K.png."""
    for name in MASK_FIELDS:
        if record.get(name):
            return Path(str(record[name]))
    image = PurePosixPath(str(required(record, "visual_path", "image_path")).replace("\\", "/"))
    if image.parent.name != "frames":
        raise InputError(f"a record lacks the field {MASK_FIELDS[0]}, and {image} isn't in a folder frames/")
    if "fid" not in record:
        return Path(image.parent.parent / "labels_rgb" / f"{image.stem}.png")
    clip = [("gt_mask" if part == "media" else part) for part in image.parent.parent.parts]
    return Path(*clip, f"fid_{record['fid']}", f"0000{image.stem}.png")


def _truth_avs(record: Record) -> Parsed:
    return (MaskFile(str(required(record, "a_obj")), _mask_path(record)),)


def _truth_ref(record: Record) -> Parsed:
    """The null split's objects are absent: no mask. Splits: test_s (seen), test_u (unseen), test_n (null)."""
    split = str(record.get("split", "")).lower()
    said = _parse_ref(str(record.get("output", "")))
    if split.endswith("_n") or split == "null" or said[0] == Choice("false"):
        return (Choice("false"),)
    return (Choice("true"), MaskFile(_expression(record), _mask_path(record)))


def _expression(record: Record) -> str:
    return str(required(record, "description", "object"))


def _lower(question: str) -> str:
    return question.strip().lower()


def add_mask(results: Parsed, picture: NDArray[np.uint8]) -> Parsed:
    """The results and, where they hold a box or points, the mask of it in the picture's own pixels."""
    box = next((result for result in results if isinstance(result, Box)), None)
    points = next((result for result in results if isinstance(result, Points)), None)
    if box is None and points is None:
        return results
    from crab_edge.masks import segment

    return (*results, segment(picture, box, points))


_AVS_INSTRUCTION = (
    "Please identify the category of the object producing the sound in the video frame. Then, provide the "
    "bounding box and three pixel points of the object that is making the sound within the frame."
)
_REF_INSTRUCTION = (
    "Please analyze the video frame and audio to find the object described as <des>{question}</des>. Answer "
    'with "true" or "false" whether the object exists. If it exists, respond with a sentence identifying the '
    "object's name, its bounding box, and three pixel points; if not, state that the object is absent."
)
_SPOT_GRAMMAR = (
    'spots: ". Its bounding box is [" box " and its points are " point "," point "," point "."\n'
    f"OBJECT: {grammars.OBJECT}\n{grammars.box((',', ',', ',', ']'))}{grammars.POINT}"
)


def _avs(name: str) -> Task:
    return Task(
        name=name,
        family="segmentation",
        media=IMAGE_AUDIO_5TH,
        requires=frozenset({"image", "audio"}),
        instruction=_AVS_INSTRUCTION,
        parse=_parse_avs,
        render=_render_avs,
        truth=_truth_avs,
        form=(
            f"{_SOUNDING} is LABEL. Its bounding box is [X1,Y1,X2,Y2] and its points are "
            "[X,Y],[X,Y],[X,Y]. ; 0..224, X1 < X2, Y1 < Y2; points 0..223"
        ),
        grammar=f'start: "{_SOUNDING} is " OBJECT spots\n{_SPOT_GRAMMAR}',
        opens=(_SOUNDING,),
        metric="avs",
        targets=("label_content",),
        finish=add_mask,
        truth_files=MASK_FIELDS,
    )


TASKS = (
    _avs("s4"),
    _avs("ms3"),
    Task(
        name="ref_avs",
        family="segmentation",
        media=IMAGE_AUDIO_10TH,
        requires=frozenset({"image", "audio"}),
        instruction=_REF_INSTRUCTION,
        needs_question=True,
        question=_expression,
        wording=_lower,
        parse=_parse_ref,
        render=_render_ref,
        truth=_truth_ref,
        form=(
            "<answer>true</answer> The object is LABEL. Its bounding box is [X1,Y1,X2,Y2] and its points are "
            "[X,Y],[X,Y],[X,Y]. or <answer>false</answer> The object is absent."
        ),
        grammar=(
            'start: "<answer>true</answer> The object is " OBJECT spots\n'
            f'    | "<answer>false</answer> The object is absent."\n{_SPOT_GRAMMAR}'
        ),
        opens=("<answer>",),
        metric="ref-avs",
        targets=("output",),
        finish=add_mask,
        truth_files=MASK_FIELDS,
    ),
)
