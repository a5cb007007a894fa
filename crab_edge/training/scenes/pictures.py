"""Picture files -> cut-outs: RGBA uint8 arrays cropped to what is visible, and how alike two of them are."""

from __future__ import annotations

import io
import unicodedata
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from crab_edge.errors import DependencyError

SIDE = 224


def load_cutout(path: Path, side: int = SIDE, opaque: bool = False) -> np.ndarray | None:
    """uint8 [h, w, 4], longest side at most `side`; None if the file shows nothing, can't be drawn, or is an
    opaque rectangle (a photo with its background) and `opaque` doesn't allow that."""
    try:
        image = _draw_svg(path, side) if path.suffix.lower() == ".svg" else Image.open(path).convert("RGBA")
    except (OSError, ValueError, SyntaxError):
        return None
    return finish(image, side, opaque)


def load_poses(paths: list[Path], side: int = SIDE) -> list[np.ndarray] | None:
    """The pictures of one figure at one scale, no side above `side`; None if one of them can't be used."""
    images = []
    for path in paths:
        cutout = load_cutout(path, side=4 * side)
        if cutout is None:
            return None
        images.append(Image.fromarray(cutout))
    scale = min(side / max(max(image.size) for image in images), 1.0)
    sizes = [(max(1, round(i.width * scale)), max(1, round(i.height * scale))) for i in images]
    return [
        np.array(i.convert("RGBa").resize(s, Image.Resampling.LANCZOS).convert("RGBA"), np.uint8)
        for i, s in zip(images, sizes, strict=True)
    ]


def load_emoji(font: Path, character: str, side: int = SIDE) -> np.ndarray | None:
    """A glyph of a colour bitmap font (109 px strikes) as a cut-out; None if the font lacks it."""
    image = Image.new("RGBA", (160, 160))
    try:
        ImageDraw.Draw(image).text((10, 10), character, font=_font(str(font)), embedded_color=True)
    except OSError:
        return None
    colours = np.asarray(image)[..., :3].reshape(-1, 3)
    return finish(image, side) if colours.any() else None


def load_photo(path: Path, side: int = 400) -> np.ndarray | None:
    """uint8 [h, w, 3] with the longest side `side`; None if the file can't be read."""
    try:
        image = Image.open(path).convert("RGB")
    except OSError:
        return None
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def emoji_stem(character: str) -> str:
    """The name by which emoji sets file a character: its code point in capital hexadecimal."""
    return f"{ord(character):04X}"


def emoji_name(character: str) -> str:
    return unicodedata.name(character, "unnamed").lower()


def is_silhouette(cutout: np.ndarray) -> bool:
    """Whether nearly all that is visible is black: an outline that tells too little."""
    shown = cutout[cutout[..., 3] > 128][:, :3]
    return bool(shown.size) and float(np.percentile(shown.max(axis=1), 92)) < 60


def thumbnail(cutout: np.ndarray, size: int = 16) -> np.ndarray:
    """float32 [size, size, 4] of the cut-out stretched to a square, colours weighted by alpha."""
    image = Image.fromarray(cutout).convert("RGBa").resize((size, size), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255.0


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Mean absolute difference of two thumbnails, the smaller of as is and mirrored (0 = equal)."""
    return float(min(np.abs(a - b).mean(), np.abs(a - b[:, ::-1]).mean()))


@lru_cache(maxsize=4)
def _font(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, 109)


def _draw_svg(path: Path, side: int) -> Image.Image:
    try:
        import resvg_py
    except ImportError as error:
        raise DependencyError(
            "resvg-py is needed to draw SVG pictures; pip install 'crab-edge[train]'"
        ) from error
    # Sizes in mm or pt need a resolution; without one resvg takes them for zero.
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=side * 2, dpi=96.0))))
    image = image.convert("RGBA")
    box = image.getchannel("A").getbbox()
    if box is None:
        return image
    # Many drawings fill a small part of their page: draw again so that the part has `side` pixels.
    share = max(box[2] - box[0], box[3] - box[1]) / (side * 2)
    if share < 0.45:
        width = min(round(side / share), 2600)
        image = Image.open(
            io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=width, dpi=96.0)))
        )
    return image.convert("RGBA")


def finish(image: Image.Image, side: int, opaque: bool = False) -> np.ndarray | None:
    """A drawn picture as a cut-out of at most `side` pixels, or None (see `load_cutout`)."""
    alpha = image.getchannel("A").point(lambda v: 0 if v < 24 else v)
    box = alpha.getbbox()
    if box is None:
        return None
    image.putalpha(alpha)
    image = image.crop(box)
    # Premultiplied while resizing, or transparent pixels would bleed their colour into the edge.
    if max(image.size) > side:
        scale = side / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    pixels = np.array(image, np.uint8)
    if min(pixels.shape[:2]) < 12 or max(pixels.shape[:2]) < 40:
        return None
    cover = float((pixels[..., 3] > 128).mean())
    # Full cover is a photo with its background; next to none can't be seen.
    return None if (cover > 0.97 and not opaque) or cover < 0.04 else pixels
