"""Still images. Used by `crab_edge.clip` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import MediaError
from crab_edge.media_io import reason, shown

IMAGE_SIZE = 224
# First bytes -> Pillow's name of the format. Pillow's own search would also take MPEG streams and page
# formats.
_MAGIC = (
    (b"\xff\xd8\xff", ("JPEG",)),
    (b"\x89PNG\r\n\x1a\n", ("PNG",)),
    (b"GIF8", ("GIF",)),
    (b"BM", ("BMP",)),
    (b"II*\0", ("TIFF",)),
    (b"MM\0*", ("TIFF",)),
    (b"\0\0\0\x0cjP  \r\n\x87\n", ("JPEG2000",)),
    (b"\xff\x4f\xff\x51", ("JPEG2000",)),
    (b"\0\0\1\0", ("ICO",)),
    *((b"P%d" % i, ("PPM",)) for i in range(1, 7)),
)
_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis"}


def stretch(picture: Any) -> NDArray[np.uint8]:
    """A PIL RGB image as uint8 [224, 224, 3]: bicubic with antialiasing, as the reference."""
    from PIL import Image

    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def sniff(path: Path) -> Literal["still", "animation"] | None:
    """A picture, one that FFmpeg plays, or (None) anything else. MediaError for HEIC and AVIF."""
    with path.open("rb") as file:
        head = file.read(16)
    if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
        # FFmpeg would take one tile of it for the picture.
        raise MediaError(f"{shown(path)}: HEIC and AVIF pictures aren't supported; save it as JPEG or PNG")
    formats = next((names for magic, names in _MAGIC if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        formats = ("WEBP",)
    if formats is None:
        return None
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=formats) as image:
            moving = image.format in ("GIF", "PNG", "WEBP") and getattr(image, "n_frames", 1) > 1
            if moving and image.format == "WEBP":
                raise MediaError(
                    f"{shown(path)}: animated WebP isn't supported; convert it to mp4, "
                    "or give it as --image to use its first picture"
                )
            return "animation" if moving else "still"
    except UnidentifiedImageError:
        return None
    except MediaError:
        raise
    except Exception as error:  # on damaged files Pillow raises whatever its parsers stumble over
        raise MediaError(
            f"{shown(path)}: a picture that can't be read ({reason(error)}); save it again"
        ) from error


class StillImage:
    """One picture: `path`, `width` and `height` in pixels as a viewer shows it (EXIF orientation applied)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        upright = self._open()
        self.width, self.height = upright.size
        self._pixels = stretch(upright)
        self._pixels.flags.writeable = False

    def pixels(self) -> NDArray[np.uint8]:
        """uint8 [224, 224, 3] RGB, stretched; transparent parts on white. Read-only."""
        return self._pixels

    def original(self) -> NDArray[np.uint8]:
        """uint8 [height, width, 3] RGB in its own size; decoded again at each call."""
        return np.asarray(self._open())

    def _open(self) -> Any:
        """The picture upright as PIL RGB."""
        from PIL import Image, ImageOps

        try:
            with Image.open(self.path) as image:
                return _rgb(ImageOps.exif_transpose(image), self.path)
        except MediaError:
            raise
        except Exception as error:  # on damaged files Pillow raises whatever its parsers stumble over
            raise MediaError(
                f"{shown(self.path)}: a picture that can't be read ({reason(error)}); get a whole copy"
            ) from error


def _rgb(image: Any, path: Path) -> Any:
    """Any PIL mode to RGB."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, np.float64)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise MediaError(
                f"{shown(path)}: pixels of type {image.mode} aren't supported; save it as 8-bit PNG"
            )
        # 16-bit grey: the upper byte, where Pillow would clip.
        return Image.fromarray((values / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")
