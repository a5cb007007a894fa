"""Reading the tagged part of an answer. Every pattern is bounded, so that any text is read in linear time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from crab_edge.results import Result, Unparsed
from crab_edge.tasks.base import FRAME_SIDE, MediaContext

_STOP = re.compile(r"</s>|<\|im_end\|>|<\|endoftext\|>", re.IGNORECASE | re.ASCII)
_WORDS = (
    "zero one two three four five six seven eight nine ten "
    "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
).split()
NUMBER_WORDS = {word: value for value, word in enumerate(_WORDS)}
_DIGITS = r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?"
_WORD = "|".join(sorted(_WORDS, key=len, reverse=True))
_SECONDS = rf"(?:{_DIGITS}|{_WORD})(?: ?(?:seconds|second|secs|sec|s)\b)?"
_BETWEEN = r"(?: ?(?:-|–|~|to) ?| ?[,;] ?| )"
_RANGE = re.compile(rf"[(\[] ?({_SECONDS}){_BETWEEN}({_SECONDS}) ?[)\]]", re.IGNORECASE | re.ASCII)
_BARE_RANGE = re.compile(rf"(?<![\w.])({_SECONDS}){_BETWEEN}({_SECONDS})(?![\w.])", re.IGNORECASE | re.ASCII)
_BOX = re.compile(
    rf"[(\[] ?({_DIGITS}) ?, ?({_DIGITS}) ?"
    rf"(?:[)\]] ?,? ?[(\[]|,) ?({_DIGITS}) ?, ?({_DIGITS}) ?[)\]]",
    re.ASCII,
)
# A pair of corners in <obj>, four numbers in one bracket (a box), or two (a point).
_SPOT = re.compile(
    rf"< ?obj ?> ?\( ?({_DIGITS}) ?, ?({_DIGITS}) ?\) ?,? ?\( ?({_DIGITS}) ?, ?({_DIGITS}) ?\)|"
    rf"[(\[] ?({_DIGITS}) ?, ?({_DIGITS})(?: ?, ?({_DIGITS}) ?, ?({_DIGITS}))? ?[)\]]",
    re.IGNORECASE | re.ASCII,
)
EDGES = " .,;:!?\"'`"


def clean(text: str) -> str:
    """The answer up to its end mark, white space runs as one space."""
    stop = _STOP.search(text)
    return " ".join((text[: stop.start()] if stop else text).split())


def quote(text: str, length: int = 40) -> str:
    """A short piece of an answer for a reason."""
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def number(text: str) -> float:
    """The value of a number that one of the patterns matched: digits or a word, with or without a unit."""
    digits = re.match(_DIGITS, text)
    if digits:
        return float(digits.group())
    return float(NUMBER_WORDS[text.lower().split()[0]])


@dataclass(frozen=True)
class Block:
    """The text between a tag and the next tag; `tag` is lower case."""

    tag: str
    text: str


def blocks(text: str, names: Sequence[str]) -> Iterator[Block]:
    """The contents of `<name>...</name>` in order. A tag that isn't closed ends where the next one opens."""
    tag = re.compile(rf"< ?(/?) ?({'|'.join(map(re.escape, names))}) ?>", re.IGNORECASE | re.ASCII)
    opened: str | None = None
    start = 0
    for match in tag.finditer(text):
        if opened is not None:
            yield Block(opened, text[start : match.start()])
        opened = None if match.group(1) else match.group(2).lower()
        start = match.end()
    if opened is not None:
        yield Block(opened, text[start:])


@dataclass(frozen=True)
class Found:
    """A match with the text before it, back to the previous match."""

    before: str
    values: tuple[float, ...]


def _found(pattern: re.Pattern[str], text: str) -> tuple[list[Found], str]:
    found = []
    end = 0
    for match in pattern.finditer(text):
        found.append(Found(text[end : match.start()], tuple(number(value) for value in match.groups())))
        end = match.end()
    return found, text[end:]


def ranges(text: str) -> tuple[list[Found], str]:
    """`(s e)`, `(s,e)`, `[s-e]`, `(two s to 7 s)`... in order, and the text after the last one."""
    return _found(_RANGE, text)


def bare_ranges(text: str) -> tuple[list[Found], str]:
    """As `ranges`, the brackets being optional: `0,8`."""
    return _found(_BARE_RANGE, text)


def boxes(text: str) -> tuple[list[Found], str]:
    """`(x1,y1)(x2,y2)`, `[x1,y1,x2,y2]` and mixtures of both, in order, and the text after the last one."""
    return _found(_BOX, text)


def spots(text: str) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """(boxes, points): `[x1,y1,x2,y2]` or `<obj>(x1,y1)(x2,y2)</obj>`, and `[x,y]`, each in order."""
    boxes: list[tuple[float, ...]] = []
    points: list[tuple[float, ...]] = []
    for match in _SPOT.finditer(text):
        values = tuple(number(value) for value in match.groups() if value is not None)
        (boxes if len(values) == 4 else points).append(values)
    return boxes, points


def clip_range(values: Sequence[float], context: MediaContext) -> tuple[float, float] | Unparsed:
    """Window seconds -> clip seconds, cut at the end of window and clip; nonsense gives the reason."""
    start, end = values
    said = f"{start:g} to {end:g} s"
    if start < 0:
        return Unparsed(f"the range {said} begins before the clip")
    if end <= start:
        return Unparsed(f"the range {said} is {'empty' if end == start else 'reversed'}")
    if context.start_s + start >= context.end_s:
        length = context.end_s - context.start_s
        return Unparsed(f"the range {said} begins after the clip's end at {length:g} s")
    return context.start_s + start, min(context.start_s + end, context.end_s)


def frame_box(values: Sequence[float], context: MediaContext) -> tuple[float, float, float, float] | Unparsed:
    """A box in the model's 224x224 frame -> pixels of the original frame; nonsense gives the reason."""
    x1, y1, x2, y2 = values
    said = f"({x1:g},{y1:g})({x2:g},{y2:g})"
    if min(values) < 0 or max(values) > FRAME_SIDE:
        return Unparsed(f"the box {said} leaves the {FRAME_SIDE}x{FRAME_SIDE} frame")
    if x2 <= x1 or y2 <= y1:
        return Unparsed(f"the box {said} is {'reversed' if x2 < x1 or y2 < y1 else 'empty'}")
    across, down = context.width / FRAME_SIDE, context.height / FRAME_SIDE
    return x1 * across, y1 * down, x2 * across, y2 * down


def frame_point(values: Sequence[float], context: MediaContext) -> tuple[float, float] | Unparsed:
    """A point in the model's frame (pixels 0..223) -> the original frame; nonsense gives the reason."""
    x, y = values
    if min(values) < 0 or max(values) >= FRAME_SIDE:
        return Unparsed(f"the point ({x:g},{y:g}) leaves the {FRAME_SIDE}x{FRAME_SIDE} frame")
    return x * context.width / FRAME_SIDE, y * context.height / FRAME_SIDE


def whole_range(low: float, high: float) -> tuple[int, int]:
    """The nearest whole numbers, widened where both would be the same."""
    first, last = math.floor(low + 0.5), math.floor(high + 0.5)
    if first == last:
        first, last = math.floor(low), math.ceil(high)
    return first, max(last, first + 1)


def only(kind: type, results: Sequence[Result]) -> list:
    """The results of one type, in order."""
    return [result for result in results if isinstance(result, kind)]
