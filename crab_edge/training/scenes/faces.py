"""Faces: the parts of the Open Peeps drawings put together, as pictures of 224 x 224 pixels.

The package keeps every part as a line `name: (components, colors) => `<svg>`` with slots for colours. A
person is drawn in three layers, so that one person can show every expression: body and head, the expression,
and what lies over the face (beard, glasses).
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from crab_edge.errors import DependencyError, MediaError

SIDE = 224
SKINS = ("ffdbb4", "edb98a", "d08b5b", "ae5d29", "694d3d")
CLOTHES = ("e78276", "ffcf77", "fdea6b", "78e185", "9ddadb", "8fa7df", "e279c7", "c8c8c8", "5a6b8c")
HAIRS = ("2c1b18", "e8e1e1", "ecdcbf", "d6b370", "b58143", "a55728", "724133", "4a312c", "c93305")
_PART = re.compile(r"^    (\w+): \(components, colors\) => `(.*)`,$", re.MULTILINE)
_SLOT = re.compile(r"\$\{escape\.xml\(`\$\{colors\.(\w+)\}`\)\}")
_PLACES = {
    "head": "matrix(.99789 0 0 1 156 62)",
    "face": "translate(315 248)",
    "facialHair": "translate(279 400)",
    "accessories": "translate(203 303)",
}


@dataclass(frozen=True)
class Person:
    """What one person is made of; colours are six hexadecimal digits, "" is no such part."""

    head: str
    skin: str
    clothing: str
    hair: str
    beard: str = ""
    glasses: str = ""


class Peeps:
    """The parts of the unpacked package (`lib`)."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def parts(self) -> dict[str, dict[str, str]]:
        """Kind -> name -> SVG with colour slots. MediaError when the files aren't of the known form."""
        found = {}
        for kind in _PLACES:
            text = (self.root / "components" / f"{kind}.js").read_text("utf-8")
            found[kind] = dict(_PART.findall(text))
            if not found[kind]:
                raise MediaError(f"{self.root}: no drawings of the kind {kind}; fetch the package again")
        return found

    @cached_property
    def _body(self) -> str:
        text = (self.root / "index.js").read_text("utf-8")
        match = re.search(r'body: `(<g fill-rule="evenodd".*?</g>)<g transform=', text, re.DOTALL)
        if match is None:
            raise MediaError(f"{self.root}: no drawing of the body; fetch the package again")
        return match.group(1)

    def under(self, person: Person) -> np.ndarray:
        """Body and head without a face, uint8 [224, 224, 4]."""
        return self._draw(self._body + self._placed("head", person.head), person)

    def over(self, person: Person) -> np.ndarray | None:
        """Beard and glasses, or None."""
        parts = [("facialHair", person.beard), ("accessories", person.glasses)]
        body = "".join(self._placed(kind, name) for kind, name in parts if name)
        return self._draw(body, person) if body else None

    def expression(self, name: str) -> np.ndarray:
        """Eyes and mouth, uint8 [224, 224, 4]."""
        return self._draw(self._placed("face", name), Person("", "ffffff", "ffffff", "000000"))

    def _placed(self, kind: str, name: str) -> str:
        return f'<g transform="{_PLACES[kind]}">{self.parts[kind][name]}</g>'

    def _draw(self, body: str, person: Person) -> np.ndarray:
        colours = {"skin": person.skin, "clothing": person.clothing, "headContrast": person.hair}
        body = _SLOT.sub(lambda slot: f"#{colours[slot.group(1)]}", body)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 704 704" fill="none">{body}</svg>'
        return np.asarray(draw_svg(svg, SIDE))


def draw_svg(svg: str, width: int) -> Image.Image:
    """An SVG text as an RGBA picture."""
    try:
        import resvg_py
    except ImportError as error:
        raise DependencyError(
            "resvg-py is needed to draw SVG pictures; pip install 'crab-edge[train]'"
        ) from error
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=width, dpi=96.0))
    return Image.open(io.BytesIO(data)).convert("RGBA")
