"""Drawing: a plan of objects over a background -> frames, and the box of every object in 224-pixel units."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from crab_edge.training.scenes.catalogue import Asset, ClassInfo

FRAME = 224
# Even sides, as H.264 wants them.
CANVASES = ((320, 240), (240, 320), (400, 226), (288, 288), (320, 256), (352, 240))


@dataclass
class Thing:
    """An object of a scene. Positions are shares of the canvas; times are seconds."""

    info: ClassInfo
    picture: Asset
    cutout: Image.Image
    size: float
    start: tuple[float, float]
    end: tuple[float, float]
    visible: tuple[float, float]
    sound: tuple[float, float] | None = None

    @property
    def moves(self) -> bool:
        return self.start != self.end

    def centre(self, time: float, duration: float) -> tuple[float, float]:
        part = time / duration if duration else 0.0
        return (
            self.start[0] + (self.end[0] - self.start[0]) * part,
            self.start[1] + (self.end[1] - self.start[1]) * part,
        )

    def place(self, time: float, duration: float, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in canvas pixels, clipped to the canvas."""
        x, y = self.centre(time, duration)
        left = round(x * canvas[0] - self.cutout.width / 2)
        top = round(y * canvas[1] - self.cutout.height / 2)
        return (
            max(left, 0),
            max(top, 0),
            min(left + self.cutout.width, canvas[0]),
            min(top + self.cutout.height, canvas[1]),
        )

    def box(self, time: float, duration: float, canvas: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels of the 224x224 frame."""
        left, top, right, bottom = self.place(time, duration, canvas)
        across, down = FRAME / canvas[0], FRAME / canvas[1]
        return round(left * across), round(top * down), round(right * across), round(bottom * down)


@dataclass
class Stage:
    """Canvas, background and objects, back to front."""

    canvas: tuple[int, int]
    background: Image.Image
    things: list[Thing] = field(default_factory=list)

    def draw(self, times: list[float], duration: float) -> list[Image.Image]:
        """RGB images of canvas size, one a time."""
        images = []
        for time in times:
            image = self.background.copy()
            for thing in self.things:
                if thing.visible[0] <= time < thing.visible[1]:
                    x, y = thing.centre(time, duration)
                    corner = (
                        round(x * self.canvas[0] - thing.cutout.width / 2),
                        round(y * self.canvas[1] - thing.cutout.height / 2),
                    )
                    image.paste(thing.cutout, corner, thing.cutout)
            images.append(image)
        return images


def stretch(images: list[Image.Image]) -> np.ndarray:
    """uint8 [n, 224, 224, 3], as the reference resizes frames: straight, bicubic with antialiasing."""
    out = np.empty((len(images), FRAME, FRAME, 3), np.uint8)
    previous: Image.Image | None = None
    for index, image in enumerate(images):
        if image is previous:
            out[index] = out[index - 1]
        else:
            out[index] = np.asarray(image.resize((FRAME, FRAME), Image.Resampling.BICUBIC))
        previous = image
    return out


def draw_background(
    asset: Asset, canvas: tuple[int, int], random: np.random.Generator, train: bool
) -> Image.Image:
    """A random crop of a photo with the canvas's aspect, maybe mirrored, with its light changed."""
    photo = Image.fromarray(asset.array())
    aspect = canvas[0] / canvas[1]
    share = float(random.uniform(0.55 if train else 0.7, 1.0))
    height = min(photo.height, photo.width / aspect) * share
    width = height * aspect
    left = float(random.uniform(0, photo.width - width))
    top = float(random.uniform(0, photo.height - height))
    image = photo.resize(canvas, Image.Resampling.BILINEAR, box=(left, top, left + width, top + height))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    spread = 0.25 if train else 0.1
    return _relight(image, random, spread)


def draw_cutout(
    asset: Asset, canvas: tuple[int, int], size: float, random: np.random.Generator, train: bool
) -> Image.Image:
    """The picture with its larger side `size` of the frame's side, mirrored, turned and recoloured a little.

    The frame is the square the canvas is stretched to, so `size` counts after that stretch.
    """
    image = Image.fromarray(asset.array()).convert("RGBa")
    scale = size / max(image.width / canvas[0], image.height / canvas[1])
    wide, high = max(4, round(image.width * scale)), max(4, round(image.height * scale))
    angle = float(random.uniform(-12, 12) if train else random.uniform(-5, 5))
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.resize((wide, high), Image.Resampling.BILINEAR, reducing_gap=1.5)
    if random.random() < (0.6 if train else 0.4) and abs(angle) > 1.0:
        image = image.rotate(angle, Image.Resampling.BILINEAR, expand=True)
        image = image.crop(image.getchannel("a").point(lambda v: 255 if v > 40 else 0).getbbox())
        # Turning makes the box larger; bring it back to the size asked for.
        grown = max(image.width / canvas[0], image.height / canvas[1]) / size
        if grown > 1.0:
            image = image.resize(
                (max(4, round(image.width / grown)), max(4, round(image.height / grown))),
                Image.Resampling.BILINEAR,
            )
    image = image.convert("RGBA")
    alpha = image.getchannel("A")
    colours = image.convert("RGB")
    if train and random.random() < 0.4:
        colours = _turn_hue(colours, int(random.integers(-10, 11)))
    out = _relight(colours, random, 0.2 if train else 0.08)
    out.putalpha(alpha)
    return out


def _relight(image: Image.Image, random: np.random.Generator, spread: float) -> Image.Image:
    gain, contrast = 1 + random.uniform(-spread, spread), 1 + random.uniform(-spread, spread)
    table = np.clip((np.arange(256) - 128) * contrast * gain + 128 * gain, 0, 255).astype(np.uint8)
    return image.point(list(table) * 3)


def _turn_hue(image: Image.Image, steps: int) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(v + steps) % 256 for v in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
