"""Words on pictures: fonts that have the characters, chips that can be read on any background."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from crab_edge_apps._text import printable
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

# Pillow carries a Latin font; for other scripts it finds these by name where a system has them.
_OTHER_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "DejaVuSans.ttf",
    "Arial Unicode.ttf",
)
_SMOOTH = 4
"""Shapes are drawn so many times larger and shrunk, since Pillow draws them with hard edges."""


@lru_cache(maxsize=64)
def _font(name: str | None, size: int) -> Any:
    if name is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def _has(name: str | None, character: str) -> bool:
    """Whether a font draws a character as something else than its sign for missing ones."""
    if character.isspace():
        return True
    font = _font(name, 16)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def font_for(text: str, size: int) -> tuple[Any, str]:
    """A font of `size` pixels and the text as it can draw it.

    A character that no font here has is spelled as its code point.
    """
    names = [None, *(name for name in _OTHER_FONTS if _font(name, 16) is not None)]
    for name in names:
        if all(_has(name, character) for character in text):
            return _font(name, size), text
    spelled = "".join(c if _has(None, c) else f"[U+{ord(c):04X}]" for c in text)
    return _font(None, size), spelled


def one_line(text: str) -> str:
    """Text without line breaks and control characters."""
    return printable(" ".join(text.split()), keep="")


def shortened(text: str, font: Any, width: int) -> str:
    """The text, cut with an ellipsis if it is wider than `width` pixels; "" where not even that fits."""
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "...") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "..." if low else ""


def wrapped(text: str, font: Any, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of `width` pixels; the last one is shortened."""
    out: list[str] = []
    rest = text
    while rest and len(out) < lines - 1 and font.getlength(rest) > width:
        count = 1
        while count < len(rest) and font.getlength(rest[: count + 1]) <= width:
            count += 1
        blank = rest.rfind(" ", 0, count + 1)
        # Scripts without blanks, and words longer than a line, are cut anywhere.
        place = blank if blank > count // 3 else count
        out.append(rest[:place].rstrip())
        rest = rest[place:].lstrip()
    if rest:
        out.append(shortened(rest, font, width))
    return out


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever stands out more (contrast of WCAG 2)."""

    def linear(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(value) for value in colour)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (0, 0, 0) if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else (255, 255, 255)


def chip(text: str, colour: Colour, size: int, width: int, icons: tuple[str, ...] = ()) -> Image.Image:
    """An RGBA plate of `colour` with text on it, at most `width` pixels wide.

    `icons`: of "audio" (a loudspeaker), "visual" (an eye), before the text.
    """
    font, text = font_for(one_line(text), size)
    ascent, descent = font.getmetrics()
    pad_x, pad_y, gap = max(2, round(0.4 * size)), max(1, round(0.16 * size)), max(2, round(0.3 * size))
    side = ascent
    before = len(icons) * (side + gap)
    text = shortened(text, font, max(0, width - 2 * pad_x - before))
    total = 2 * pad_x + before + (round(font.getlength(text)) if text else -gap if icons else 0)
    plate = rounded((max(1, min(total, width)), ascent + descent + 2 * pad_y), colour, 235, round(0.3 * size))
    ink = ink_on(colour)
    left = pad_x
    for name in icons:
        plate.alpha_composite(_icon(name, side, ink), (left, pad_y + (descent + 1) // 2))
        left += side + gap
    ImageDraw.Draw(plate).text((left, pad_y + ascent), text, font=font, fill=(*ink, 255), anchor="ls")
    return plate


def panel(lines: list[str], size: int, width: int, most: int) -> Image.Image:
    """An RGBA dark plate with paragraphs in white, `width` pixels wide at most, `most` lines a paragraph."""
    pad = max(3, round(0.5 * size))
    rows: list[tuple[Any, str]] = []
    for line in lines:
        font, text = font_for(one_line(line), size)
        rows += [(font, row) for row in wrapped(text, font, max(1, width - 2 * pad), most)]
    ascent, descent = rows[0][0].getmetrics()
    step = ascent + descent + max(1, size // 8)
    wide = max(round(font.getlength(row)) for font, row in rows) + 2 * pad
    plate = rounded((min(wide, width), step * len(rows) + pad), (0, 0, 0), 165, round(0.4 * size))
    pen = ImageDraw.Draw(plate)
    for number, (font, row) in enumerate(rows):
        place = (pad, pad // 2 + number * step + ascent)
        pen.text(place, row, font=font, fill=(255, 255, 255, 255), anchor="ls")
    return plate


def rounded(size: tuple[int, int], colour: Colour, alpha: int, radius: int) -> Image.Image:
    """An RGBA rectangle with smooth round corners."""
    width, height = size
    shape = Image.new("L", (_SMOOTH * width, _SMOOTH * height))
    corner = _SMOOTH * min(radius, width // 2, height // 2)
    box = (0, 0, _SMOOTH * width - 1, _SMOOTH * height - 1)
    ImageDraw.Draw(shape).rounded_rectangle(box, corner, fill=alpha)
    plate = Image.new("RGBA", size, (*colour, 0))
    plate.putalpha(shape.resize(size, Image.Resampling.BOX))
    return plate


def dot(radius: int, colour: Colour) -> Image.Image:
    """An RGBA disc in a white ring with a dark rim."""
    side = _SMOOTH * (2 * radius + 1)
    picture = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(picture)
    for share, fill in ((0.0, (0, 0, 0, 160)), (0.12, (255, 255, 255, 255)), (0.34, (*colour, 255))):
        edge = share * side / 2
        pen.ellipse((edge, edge, side - 1 - edge, side - 1 - edge), fill=fill)
    return picture.resize((2 * radius + 1, 2 * radius + 1), Image.Resampling.BOX)


@lru_cache(maxsize=32)
def _icon(name: str, side: int, ink: Colour) -> Image.Image:
    scale = _SMOOTH * side
    shape = Image.new("L", (scale, scale))
    pen = ImageDraw.Draw(shape)
    line = max(1, round(0.09 * scale))

    def at(*shares: float) -> list[float]:
        return [share * (scale - 1) for share in shares]

    if name == "audio":
        pen.polygon(at(0.04, 0.36, 0.22, 0.36, 0.48, 0.12, 0.48, 0.88, 0.22, 0.64, 0.04, 0.64), fill=255)
        for reach in (0.17, 0.38):
            pen.arc(at(0.48 - reach, 0.5 - reach, 0.48 + reach, 0.5 + reach), -48, 48, fill=255, width=line)
    elif name == "visual":
        # Two circles meet in a lens; the pupil is cut out and put back smaller.
        pen.ellipse(at(-0.06, 0.22, 1.06, 1.34), fill=255)
        lower = Image.new("L", shape.size)
        ImageDraw.Draw(lower).ellipse(at(-0.06, -0.34, 1.06, 0.78), fill=255)
        shape = Image.composite(shape, Image.new("L", shape.size), lower)
        pen = ImageDraw.Draw(shape)
        pen.ellipse(at(0.29, 0.29, 0.71, 0.71), fill=0)
        pen.ellipse(at(0.38, 0.38, 0.62, 0.62), fill=255)
    else:
        raise ValueError(f"no icon {name!r}")
    icon = Image.new("RGBA", (side, side), (*ink, 0))
    icon.putalpha(shape.resize((side, side), Image.Resampling.BOX))
    return icon
