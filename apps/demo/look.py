"""What a clip looks and sounds like at a glance: thumbnails and a spectrogram, small enough for the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crab_edge.clip import Window

if TYPE_CHECKING:
    from crab_edge.clip import AudioTrack, Clip, VideoTrack

COLUMNS = 900
ROWS = 64
# The same number as most media recipes, so that a short clip's frames are decoded for both at once.
THUMBNAILS = 10
_THUMBNAIL_HEIGHT = 72
_RATE = 16_000
_FFT = 512
_LOWEST_HZ, _HIGHEST_HZ = 70.0, 7600.0
_RANGE_DB = 62.0
_READ_S = 10.0
_LOOKS_PER_COLUMN = 6


@dataclass(frozen=True)
class Look:
    """A clip at a glance. Pictures are data URIs; `thumbnails`: (seconds, picture), evenly over the clip."""

    duration_s: float
    thumbnails: tuple[tuple[float, str], ...]
    spectrogram: str | None
    aspect: float


def look_at(clip: Clip) -> Look:
    """Decodes what the time line shows. Raises MediaError like every decoding."""
    duration = clip.duration_s
    thumbnails: tuple[tuple[float, str], ...] = ()
    aspect = 16 / 9
    if clip.videos:
        video = clip.videos[0]
        aspect = video.width / video.height
        thumbnails = _thumbnails(video, aspect)
    spectrogram = None
    if clip.audios and duration > 0:
        spectrogram = _png(levels(clip.audios[0], duration))
    return Look(duration, thumbnails, spectrogram, aspect)


def _thumbnails(video: VideoTrack, aspect: float) -> tuple[tuple[float, str], ...]:
    from PIL import Image

    frames = video.frames(THUMBNAILS)
    width = max(24, min(4 * _THUMBNAIL_HEIGHT, round(_THUMBNAIL_HEIGHT * aspect)))
    out = []
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((width, _THUMBNAIL_HEIGHT), Image.Resampling.LANCZOS)
        time_s = video.duration_s * number / max(1, len(frames) - 1)
        out.append((min(time_s, video.duration_s), jpeg(picture, 72)))
    return tuple(out)


def levels(
    audio: AudioTrack, duration_s: float, columns: int = COLUMNS, rows: int = ROWS
) -> NDArray[np.float32]:
    """float32 [rows, columns] in 0..1: power over time (the whole clip) and log frequency, low ones last.

    Read ten seconds at a time; of long clips a few moments of each column are looked at.
    """
    power = np.zeros((columns, rows))
    frequencies = np.geomspace(_HIGHEST_HZ, _LOWEST_HZ, rows) / (_RATE / _FFT)
    below = np.floor(frequencies).astype(int)
    part = frequencies - below
    shape = np.hanning(_FFT)
    step_s = duration_s / columns
    looks = int(np.clip(round(step_s * _RATE / _FFT), 1, _LOOKS_PER_COLUMN))
    start_s = 0.0
    while start_s < min(duration_s, audio.duration_s):
        window = Window(start_s, min(start_s + _READ_S, duration_s))
        if not audio.audible(window):
            break
        wave = audio.waveform(window)
        first, last = np.ceil(np.array([start_s, window.end_s]) / step_s - 1e-9).astype(int)
        places = (np.arange(first, min(last, columns)) * step_s - start_s)[:, None]
        begins = ((places + np.arange(looks) * step_s / looks) * _RATE).astype(int)
        padded = np.concatenate([wave, np.zeros(_FFT, np.float32)])
        begins = np.minimum(begins, wave.size)
        cut = padded[begins[..., None] + np.arange(_FFT)] * shape
        spectrum = (np.abs(np.fft.rfft(cut)) ** 2).mean(axis=1)
        power[first : first + len(places)] = spectrum[:, below] * (1 - part) + spectrum[:, below + 1] * part
        start_s = window.end_s
    decibels = 10 * np.log10(np.maximum(power.T, 1e-12))
    top = max(float(decibels.max()), -20.0)
    return np.clip((decibels - top) / _RANGE_DB + 1, 0, 1).astype(np.float32)


def _png(shades: NDArray[np.float32]) -> str:
    """0..1 as the opacity of a PNG: the page's style gives the colours."""
    from PIL import Image

    alpha = (shades**1.4 * 255).round().astype(np.uint8)
    picture = Image.fromarray(np.stack([np.zeros_like(alpha), alpha], axis=-1), "LA")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return _uri("image/png", buffer)


def jpeg(picture: object, quality: int) -> str:
    """A PIL picture as a data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)  # type: ignore[attr-defined]
    return _uri("image/jpeg", buffer)


def _uri(kind: str, buffer: io.BytesIO) -> str:
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
