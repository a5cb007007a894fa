"""Router weights as colours: a picture of a heat map, and the triangle that explains its mixtures."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# The first three differ by 40 units of CIE Lab or more under each kind of colour blindness (Machado et al.,
# 2009), also in lightness, and mix to a grey; the rest is from Okabe and Ito's palette.
COLOURS: tuple[tuple[int, int, int], ...] = (
    (0, 100, 200),
    (210, 40, 60),
    (190, 220, 60),
    (204, 121, 167),
    (0, 158, 115),
    (86, 180, 233),
    (230, 159, 0),
    (128, 128, 128),
)
SHARPNESS = 2.0
_STEPS = (24, 20, 16, 12, 8, 6, 4, 3, 2, 1)
_TRIANGLE = 56


def rgb_text(colour: tuple[int, int, int]) -> str:
    """As CSS writes it."""
    return "#" + "".join(f"{part:02x}" for part in colour)


def ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = (part / 255 for part in colour)
    return "#000" if 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2 > 0.18 else "#fff"


def mix(weights: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Weights [..., experts] that sum to 1 -> colours uint8 [..., 3], mixed as light (in linear RGB).

    The mixture leans towards the stronger experts, because trained routers stay near the middle.
    """
    leaning = weights**SHARPNESS
    linear = (np.array(COLOURS[: weights.shape[-1]]) / 255) ** 2.2
    light = leaning / leaning.sum(axis=-1, keepdims=True) @ linear
    return np.rint(255 * np.clip(light, 0, 1) ** (1 / 2.2)).astype(np.uint8)


def data_uri(weights: NDArray[np.floating], rows: Sequence[tuple[int, int]]) -> str:
    """A PNG of weights [rows, columns, experts], one pixel a column, each row from its top to its bottom.

    Pixels outside all rows are transparent. Weights are rounded until a palette of 255 colours holds them.
    """
    colours, index = _palette(weights)
    pixels = np.full((rows[-1][1], weights.shape[1]), 255, np.uint8)
    for (top, bottom), line in zip(rows, index, strict=True):
        pixels[top:bottom] = line
    return _png(pixels, colours)


def _palette(weights: NDArray[np.floating]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    for steps in _STEPS:
        rounded = np.rint(weights * steps)
        total = rounded.sum(axis=-1, keepdims=True)
        mixed = mix(np.where(total > 0, rounded / np.maximum(total, 1), weights))
        colours, index = np.unique(mixed.reshape(-1, 3), axis=0, return_inverse=True)
        if len(colours) < 256:
            break
    return colours, index.reshape(weights.shape[:-1]).astype(np.uint8)


def _png(pixels: NDArray[np.uint8], colours: NDArray[np.uint8]) -> str:
    """Palette indices [H, W], 255 meaning transparent, as a data URI."""
    from PIL import Image

    image = Image.fromarray(pixels, "P")
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    image.putpalette(palette.tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True, transparency=255)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def legend_triangle(names: Sequence[str]) -> str:
    """For three experts: all mixtures as a triangle, each expert at its corner; else nothing."""
    if len(names) != 3:
        return ""
    size, height = _TRIANGLE, round(_TRIANGLE * 0.87)
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    second, third = x - (1 - y) / 2, 1 - y
    # Corners: first at the bottom left, second at the bottom right, third on top.
    weights = np.stack([1 - second - third, second, third], axis=-1)
    inside = (weights >= -1e-9).all(axis=-1)
    colours, index = _palette(np.clip(weights, 0, 1) / np.clip(weights, 0, 1).sum(axis=-1, keepdims=True))
    uri = _png(np.where(inside, index, 255).astype(np.uint8), colours)
    return (
        f'<svg role="img" aria-label="{", ".join(names)}" width="{size + 24}" height="{height + 18}">'
        f'<image x="12" y="10" width="{size}" height="{height}" preserveAspectRatio="none" href="{uri}"/>'
        f'<text x="3" y="{height + 14}">1</text><text x="{size + 16}" y="{height + 14}">2</text>'
        f'<text x="{size // 2 + 9}" y="8">3</text></svg>'
    )
