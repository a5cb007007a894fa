"""Makes real small media files for tests of any room, with PyAV and Pillow.

Frame i of every video shows its own number as black and white cells (`frame_number` reads it back after
decoding and stretching), so that a test can tell exactly which frames it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

_BITS, _ROWS = 8, 2


def numbered_frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]: 16 cells, lowest bit at the top left; turned pictures don't read back."""
    cells = (
        np.array([(number >> bit) & 1 for bit in range(_BITS * _ROWS)], np.uint8).reshape(_ROWS, _BITS) * 200
        + 28
    )
    rows = np.arange(height) * _ROWS // height
    columns = np.arange(width) * _BITS // width
    return np.repeat(cells[rows][:, columns, None], 3, axis=2)


def frame_number(frame: np.ndarray) -> int:
    """The number shown by a frame of any size."""
    height, width = frame.shape[:2]
    cells = [
        int(frame[(2 * r + 1) * height // (2 * _ROWS), (2 * c + 1) * width // (2 * _BITS)].mean() > 128)
        for r in range(_ROWS)
        for c in range(_BITS)
    ]
    return sum(bit << i for i, bit in enumerate(cells))


def tone(seconds: float, rate: int = 16000, hertz: float = 440.0) -> np.ndarray:
    """float32 [n]: a sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def video(
    path: str | Path,
    *,
    seconds: float = 2.0,
    fps: int = 10,
    width: int = 64,
    height: int = 48,
    sound: bool | np.ndarray = True,
    rate: int = 16000,
    codec: str | None = None,
    audio_codec: str | None = None,
    times: Sequence[float] | None = None,
    gop: int = 12,
    b_frames: int = 0,
    sound_from_s: float = 0.0,
    empty_sound: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video; the container comes from the suffix.

    times: presentation times in s instead of a constant rate. sound: True for a tone as long as the video, or
    samples. sound_from_s: the sound track starts so much later. empty_sound: a sound track without a packet.
    """
    import av

    path = Path(path)
    defaults = {".webm": ("libvpx-vp9", "libopus"), ".gif": ("gif", ""), ".avi": ("mpeg4", "libmp3lame")}
    default_video, default_audio = defaults.get(path.suffix, ("libx264", "aac"))
    ticks = fps if times is None else fps * 100
    times = list(times) if times is not None else [i / fps for i in range(max(1, round(seconds * fps)))]
    with av.open(str(path), "w", options=options or {}) as out:
        track = out.add_stream(codec or default_video, rate=fps)
        track.width, track.height = width, height
        name = codec or default_video
        track.pix_fmt = {"gif": "rgb8", "prores_ks": "yuv422p10le"}.get(name, "yuv420p")
        track.codec_context.gop_size = gop
        track.codec_context.time_base = Fraction(1, ticks)
        if b_frames:
            track.codec_context.max_b_frames = b_frames
        if name == "libx264":
            track.options = {"preset": "ultrafast", "bf": str(b_frames)}
        elif name == "libx265":
            track.options = {"preset": "ultrafast", "x265-params": "log-level=none"}
        speaker = None
        if (sound is not False or empty_sound) and default_audio:
            speaker = out.add_stream(
                audio_codec or default_audio, rate=48000 if "opus" in default_audio else rate
            )
            speaker.layout = "mono"
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
            frame.pts, frame.time_base = round(time * ticks), Fraction(1, ticks)
            out.mux(track.encode(frame))
        out.mux(track.encode(None))
        if speaker is not None and not empty_sound:
            wave = tone(times[-1] + 1 / fps, rate) if sound is True else np.asarray(sound, np.float32)
            _encode(out, speaker, wave, rate, sound_from_s)
    return path


def sound(
    path: str | Path,
    wave: np.ndarray | None = None,
    *,
    rate: int = 16000,
    channels: int = 1,
    cover: bool = False,
) -> Path:
    """Write a sound file by suffix (.wav .mp3 .flac .ogg .m4a); one second of tone by default, on all
    channels.

    cover: attach a picture, as music files have.
    """
    import av

    path = Path(path)
    codec = {".wav": "pcm_s16le", ".mp3": "libmp3lame", ".flac": "flac", ".ogg": "libopus", ".m4a": "aac"}[
        path.suffix
    ]
    wave = tone(1.0, rate) if wave is None else np.asarray(wave, np.float32)
    with av.open(str(path), "w", format="mp4" if path.suffix == ".m4a" else None) as out:
        track = out.add_stream(codec, rate=48000 if codec == "libopus" else rate)
        track.layout = "mono" if channels == 1 else "stereo"
        art = None
        if cover:
            art = out.add_stream("mjpeg", rate=1)
            art.width, art.height, art.pix_fmt = 64, 48, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
        if wave.size:
            if art is not None:
                picture = av.VideoFrame.from_ndarray(numbered_frame(5), format="rgb24").reformat(
                    format="yuvj420p"
                )
                picture.pts = 0
                out.mux(art.encode(picture))
                out.mux(art.encode(None))
            _encode(out, track, wave, rate, 0.0, channels)
        else:
            out.start_encoding()
    return path


def _encode(out, stream, wave: np.ndarray, rate: int, start_s: float, channels: int = 1) -> None:
    import av

    layout = "mono" if channels == 1 else "stereo"
    resampler = av.AudioResampler(stream.codec_context.format, layout, stream.codec_context.sample_rate)
    step = 1024
    for first in range(0, wave.size, step):
        block = np.repeat(wave[None, first : first + step], channels, axis=0)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(block), format="fltp", layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = first + round(start_s * rate)
        for piece in resampler.resample(frame):
            out.mux(stream.encode(piece))
    for piece in resampler.resample(None):
        out.mux(stream.encode(piece))
    out.mux(stream.encode(None))


def picture(path: str | Path, mode: str = "RGB", width: int = 64, height: int = 48) -> Path:
    """Write a still of `numbered_frame(5)` in a PIL mode; alpha modes are transparent in the lower half."""
    from PIL import Image

    rgb = Image.fromarray(numbered_frame(5, width, height))
    if mode == "I;16":
        grey = np.asarray(rgb.convert("L"), np.uint16) * 257
        image = Image.fromarray(grey)
    elif mode in ("RGBA", "LA"):
        alpha = np.full((height, width), 255, np.uint8)
        alpha[height // 2 :] = 0
        image = rgb.convert(mode)
        image.putalpha(Image.fromarray(alpha))
    else:
        image = rgb.convert(mode)
    image.save(path)
    return Path(path)


def truncated(source: Path, path: str | Path, share: float = 0.5) -> Path:
    """The first part of a file."""
    content = source.read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])
    return Path(path)


def rotated(source: Path, path: str | Path, quarter_turns_clockwise: int) -> Path:
    """A copy of an mp4 whose video track asks to be shown turned, as phones write it."""
    content = bytearray(source.read_bytes())
    matrix = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}[quarter_turns_clockwise]
    a, b, c, d = (value << 16 for value in matrix)
    identity = b"".join(
        v.to_bytes(4, "big", signed=True) for v in (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    )
    turned = b"".join(v.to_bytes(4, "big", signed=True) for v in (a, b, 0, c, d, 0, 0, 0, 1 << 30))
    start = content.index(identity, content.index(b"tkhd"))
    content[start : start + len(turned)] = turned
    Path(path).write_bytes(content)
    return Path(path)
