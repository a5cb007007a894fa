"""The layer over pictures of one size: made when something begins or ends, put on every frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from crab_edge_apps._draw.results import PALETTE, Shown, colours
from crab_edge_apps._draw.text import Colour, chip, dot, panel
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from crab_edge import masks
from crab_edge.results import Box, Caption, Choice, Event, Mask, Points, Result

Picture = NDArray[np.uint8]

_MASK_ALPHA = 105
_PANEL_LINES = 3
_MOST_LANES = 6
"""Bars of the time line at most; more would hide the picture."""


@dataclass(frozen=True)
class _Sprite:
    """A picture with transparency at a place of the frame, ready to be laid over it."""

    x: int
    y: int
    added: NDArray[np.uint16]
    kept: NDArray[np.uint16]

    @classmethod
    def of(cls, picture: Image.Image, x: int, y: int, width: int, height: int) -> _Sprite | None:
        """What of an RGBA picture lies inside a frame of that size; None if nothing does."""
        inside = (max(0, -x), max(0, -y), min(picture.width, width - x), min(picture.height, height - y))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            return None
        rgba = np.asarray(picture.crop(inside), np.uint16)
        alpha = rgba[..., 3:]
        return cls(x + inside[0], y + inside[1], rgba[..., :3] * alpha, 255 - alpha)

    def lay(self, frame: Picture) -> None:
        height, width = self.kept.shape[:2]
        place = frame[self.y : self.y + height, self.x : self.x + width]
        # At most 255 * 255 + 127: fits uint16.
        np.copyto(place, (place * self.kept + self.added + 127) // 255, casting="unsafe")


@dataclass(frozen=True)
class _Lane:
    """The events of one label: a bar of the time line and a chip while one lasts."""

    label: str
    colour: Colour
    events: tuple[Event, ...]

    def now(self, time_s: float | None) -> tuple[str, ...] | None:
        """How it is perceived at a time (None: at any), or None if it isn't."""
        going = [e for e in self.events if time_s is None or e.start_s <= time_s < e.end_s]
        ways = {way for event in going for way in event.modality.split("-")}
        return tuple(way for way in ("visual", "audio") if way in ways) if going else None


class Overlay:
    """What is drawn on pictures of `width` x `height`.

    duration_s: with it, a time line of the events lies along the lower edge. Without a time (stills), every
    event has its chip.
    """

    def __init__(
        self, width: int, height: int, results: Sequence[Shown], duration_s: float | None = None
    ) -> None:
        self.width, self.height = width, height
        short = min(width, height)
        self._line = max(2, round(short / 170))
        self._size = max(10, round(short / 27))
        self._gap = max(2, self._size // 4)
        self._duration_s = duration_s
        self._colours = colours(
            one.result.label for one in results if isinstance(one.result, (Event, Box, Points, Mask))
        )
        self._lanes = self._sorted_lanes(results)
        self._others = [one for one in results if not isinstance(one.result, Event)]
        self._line_top = height
        self._time_line: list[_Sprite] = []
        if duration_s and self._lanes:
            self._make_time_line(duration_s)
        # What was drawn last and for which state: made again only when something begins or ends.
        self._chips: tuple[Any, list[_Sprite]] = (None, [])
        self._things: tuple[Any, list[_Sprite]] = (None, [])
        self._taken: list[tuple[int, int, int, int]] = []

    def draw(self, frame: Picture, time_s: float | None) -> None:
        """Draws on a frame uint8 [height, width, 3], in place; `time_s` in the clip's seconds, None: all."""
        now = [
            one
            for one in self._others
            if time_s is None or one.window is None or one.window[0] <= time_s < one.window[1]
        ]
        if self._things[0] != now:
            self._things = now, self._make_things(now)
        going = tuple(lane.now(time_s) for lane in self._lanes)
        if self._chips[0] != going:
            self._chips = going, self._event_chips(going)
        for sprite in (*self._things[1], *self._time_line, *self._chips[1]):
            sprite.lay(frame)
        if time_s is not None and self._duration_s and self._time_line:
            x = round((self.width - 1) * min(1.0, max(0.0, time_s / self._duration_s)))
            half = max(1, self._line // 2)
            frame[self._line_top :, max(0, x - 2 * half) : x + 2 * half] //= 3
            frame[self._line_top :, max(0, x - half) : x + half] = 255

    def _put(self, sprites: list[_Sprite], picture: Image.Image, x: int, y: int) -> None:
        sprite = _Sprite.of(picture, x, y, self.width, self.height)
        if sprite is not None:
            sprites.append(sprite)

    def _colour(self, label: str) -> Colour:
        return self._colours.get(label.casefold(), PALETTE[0])

    # Events

    def _sorted_lanes(self, results: Sequence[Shown]) -> list[_Lane]:
        """A lane for each label, in order of time; the task stands before it where several told of events."""
        found: dict[tuple[str, str], list[Event]] = {}
        for one in results:
            if isinstance(one.result, Event):
                found.setdefault((one.task, one.result.label), []).append(one.result)
        several = len({task for task, _ in found}) > 1
        lanes = [
            _Lane(f"{task}: {label}" if several and task else label, self._colour(label), tuple(events))
            for (task, label), events in found.items()
        ]
        return sorted(lanes, key=lambda lane: min(event.start_s for event in lane.events))

    def _make_time_line(self, duration_s: float) -> None:
        """Bars along the lower edge: the upper half of one is what is seen, the lower half what is heard."""
        lanes = self._lanes[:_MOST_LANES]
        bar, space = max(4, 2 * (self._size // 4)), max(1, self._line // 2)
        strip = Image.new("RGBA", (self.width, space + len(lanes) * (bar + space)), (0, 0, 0, 150))
        pen = ImageDraw.Draw(strip)
        for number, lane in enumerate(lanes):
            y = space + number * (bar + space)
            for event in lane.events:
                left, right = (
                    round(self.width * min(1.0, max(0.0, end / duration_s)))
                    for end in (event.start_s, event.end_s)
                )
                upper = 0 if "visual" in event.modality else bar // 2
                lower = bar if "audio" in event.modality else bar // 2
                pen.rectangle(
                    (left, y + upper, max(left, right - 1), y + lower - 1), fill=(*lane.colour, 255)
                )
        self._line_top = self.height - strip.height
        self._put(self._time_line, strip, 0, self._line_top)

    def _event_chips(self, going: tuple[tuple[str, ...] | None, ...]) -> list[_Sprite]:
        """Chips in rows from the lower left upwards, for at most a third of the picture."""
        sprites: list[_Sprite] = []
        rows: list[list[Image.Image]] = [[]]
        room = self.width - 2 * self._gap
        for lane, ways in zip(self._lanes, going, strict=True):
            if ways is None:
                continue
            made = chip(lane.label, lane.colour, self._size, max(8, room), ways)
            used = sum(other.width + self._gap for other in rows[-1])
            if rows[-1] and used + made.width > room:
                rows.append([])
            rows[-1].append(made)
        y = self._line_top - self._gap
        for row in rows:
            if not row or y - row[0].height < self.height * 2 // 3 - row[0].height:
                break
            y -= row[0].height
            x = self._gap
            for made in row:
                self._put(sprites, made, x, y)
                x += made.width + self._gap
            y -= self._gap
        return sprites

    # Short answers, captions, boxes, points, masks

    def _make_things(self, now: Sequence[Shown]) -> list[_Sprite]:
        sprites: list[_Sprite] = []
        plate = self._text(now)
        self._taken = [] if plate is None else [(self._gap, self._gap, plate.width, plate.height)]
        self._objects(sprites, [one.result for one in now])
        if plate is not None:
            self._put(sprites, plate, self._gap, self._gap)
        return sprites

    def _text(self, now: Sequence[Shown]) -> Image.Image | None:
        lines: dict[str, list[str]] = {}
        for one in now:
            if isinstance(one.result, Choice):
                before = f"{one.question} " if one.question else f"{one.task}: " if one.task else ""
                lines.setdefault(before, []).append(one.result.value)
            elif isinstance(one.result, Caption):
                lines.setdefault("", []).append(one.result.text)
        if not any(any(words) for words in lines.values()):
            return None
        said = [before + " / ".join(words) for before, words in lines.items()]
        width = max(8, self.width - 2 * self._gap)
        return panel(said[:_PANEL_LINES], self._size, width, _PANEL_LINES)

    def _objects(self, sprites: list[_Sprite], results: Sequence[Result]) -> None:
        named = {(type(r), r.label.casefold()) for r in results if isinstance(r, (Box, Mask))}
        chips: list[tuple[str, tuple[float, float, float, float]]] = []
        for mask in (r for r in results if isinstance(r, Mask)):
            place = self._mask(sprites, mask)
            if place is not None and (Box, mask.label.casefold()) not in named:
                chips.append((mask.label, place))
        for box in (r for r in results if isinstance(r, Box)):
            chips.append((box.label, self._box(sprites, box)))
        for points in (r for r in results if isinstance(r, Points)):
            for x, y in points.xy:
                picture = dot(2 * self._line + 1, self._colour(points.label))
                self._put(sprites, picture, round(x) - picture.width // 2, round(y) - picture.height // 2)
            if points.xy and not any((kind, points.label.casefold()) in named for kind in (Box, Mask)):
                x, y = points.xy[0]
                reach = 3 * self._line + 2
                chips.append((points.label, (x - reach, y - reach, x + reach, y + reach)))
        # After all shapes, so that none lies over a label.
        for label, place in chips:
            if label:
                self._label(sprites, label, place)

    def _mask(self, sprites: list[_Sprite], mask: Mask) -> tuple[float, float, float, float] | None:
        bits = masks.resized_bits(masks.decode(mask), self.width, self.height)
        rows, columns = np.flatnonzero(bits.any(axis=1)), np.flatnonzero(bits.any(axis=0))
        if not rows.size:
            return None
        place = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
        bits = bits[place]
        rgba = np.zeros((*bits.shape, 4), np.uint8)
        rgba[bits] = (*self._colour(mask.label), _MASK_ALPHA)
        inside = _eroded(bits, self._line)
        rgba[bits & ~inside, 3] = 255
        # A dark rim, for backgrounds of the mask's own colour.
        rgba[inside & ~_eroded(inside, max(1, self._line // 2))] = (0, 0, 0, 150)
        x, y = int(columns[0]), int(rows[0])
        self._put(sprites, Image.fromarray(rgba), x, y)
        return x, y, x + bits.shape[1], y + bits.shape[0]

    def _box(self, sprites: list[_Sprite], box: Box) -> tuple[float, float, float, float]:
        left, right = (round(min(max(x, 0), self.width)) for x in sorted((box.x1, box.x2)))
        top, bottom = (round(min(max(y, 0), self.height)) for y in sorted((box.y1, box.y2)))
        rim, line = max(1, self._line // 2), self._line
        size = max(1, right - left) + 2 * rim, max(1, bottom - top) + 2 * rim
        picture = Image.new("RGBA", size)
        pen = ImageDraw.Draw(picture)
        # A dark rim on both sides of the line, for backgrounds of its own colour.
        edge = size[0] - 1, size[1] - 1
        pen.rectangle((0, 0, *edge), outline=(0, 0, 0, 130), width=line + 2 * rim)
        inner = (rim, rim, edge[0] - rim, edge[1] - rim)
        if inner[2] > inner[0] and inner[3] > inner[1]:
            pen.rectangle(inner, outline=(*self._colour(box.label), 255), width=line)
        # Its four sides alone: what is between them would only cost time and memory.
        wide = min(line + 2 * rim, *size)
        between = (wide, max(wide, size[1] - wide))
        sides = (
            (0, 0, size[0], wide),
            (0, size[1] - wide, size[0], size[1]),
            (0, between[0], wide, between[1]),
            (size[0] - wide, between[0], size[0], between[1]),
        )
        for side in sides:
            if side[0] < side[2] and side[1] < side[3]:
                self._put(sprites, picture.crop(side), left - rim + side[0], top - rim + side[1])
        return left, top, right, bottom

    def _label(self, sprites: list[_Sprite], label: str, place: tuple[float, float, float, float]) -> None:
        """The label at its object where there is room in the frame and no other label."""
        made = chip(label, self._colour(label), self._size, max(8, self.width * 3 // 5))
        left, top, right, bottom = (round(value) for value in place)
        inset = self._line + 1
        spots = [
            (left, top - made.height - 1),
            (left + inset, top + inset),
            (left, bottom + 1),
            (left + inset, bottom - made.height - inset),
            (right - made.width - inset, top + inset),
            (right - made.width - inset, bottom - made.height - inset),
        ]
        # Where all of these are taken: anywhere below the object's upper edge, else above it.
        spots += [(left, y) for y in (*range(top, self.height, 4), *range(top, 0, -4))]
        low = self._line_top
        inside = [
            (min(max(x, 0), max(0, self.width - made.width)), y)
            for x, y in spots
            if 0 <= y and y + made.height <= low
        ]
        x, y = next((spot for spot in inside if not self._crowded(*spot, made)), (inside or [(0, 0)])[0])
        self._taken.append((x, y, made.width, made.height))
        self._put(sprites, made, x, y)

    def _crowded(self, x: int, y: int, made: Image.Image) -> bool:
        return any(
            x < left + width and left < x + made.width and y < top + height and top < y + made.height
            for left, top, width, height in self._taken
        )


def _eroded(bits: NDArray[np.bool_], times: int) -> NDArray[np.bool_]:
    """A mask without its outermost `times` pixels; the picture's edge counts as outside."""
    for _ in range(times):
        framed = np.pad(bits, 1)
        bits = bits & framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return bits
