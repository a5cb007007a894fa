"""Still pictures of every kind become upright RGB."""

import numpy as np
import pytest

from crab_edge.clip import Clip, StillImage
from tests import media


def still(path) -> StillImage:
    return Clip.open([path]).images[0]


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "I;16"])
def test_modes(tmp_path, mode):
    path = media.picture(tmp_path / ("p.tiff" if mode == "CMYK" else "p.png"), mode)
    image = still(path)
    pixels = image.pixels()
    assert (image.width, image.height) == (64, 48)
    assert pixels.shape == (224, 224, 3) and pixels.dtype == np.uint8
    assert media.frame_number(pixels) == 5
    centres = pixels[56::112, 14::28].astype(int)
    assert np.minimum(abs(centres - 28), abs(centres - 228)).max() <= (40 if mode == "P" else 2)


def test_black_and_white(tmp_path):
    assert set(np.unique(still(media.picture(tmp_path / "p.png", "1", 224, 224)).pixels())) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_white(tmp_path, mode):
    pixels = still(media.picture(tmp_path / "p.png", mode)).pixels()
    assert (pixels[120:] == 255).all() and media.frame_number(pixels) & 255 == 5


def test_bicubic_stretch_is_pillows(tmp_path):
    """The reference resizes with PIL's default filter, aspect ratio not kept."""
    from PIL import Image

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 300, 3), dtype=np.uint8))
    noise.save(tmp_path / "p.png")
    np.testing.assert_array_equal(still(tmp_path / "p.png").pixels(), np.asarray(noise.resize((224, 224))))


def test_exif_orientation_is_applied(tmp_path):
    from PIL import Image

    picture = Image.fromarray(media.numbered_frame(5, 64, 48)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for display
    picture.save(tmp_path / "p.jpg", exif=exif, quality=95)
    image = still(tmp_path / "p.jpg")
    assert (image.width, image.height) == (64, 48) and media.frame_number(image.pixels()) == 5


def test_4k(tmp_path):
    image = still(media.picture(tmp_path / "p.jpg", width=3840, height=2160))
    assert (image.width, image.height) == (3840, 2160) and media.frame_number(image.pixels()) == 5
