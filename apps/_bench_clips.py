"""Clips for timing batches: the packaged one, begun at another place and encoded again for each."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np

PACKAGED = "assets/sample.mp4"
SECONDS = 10.0
"""Length of a clip, at most that of the packaged one."""


def write_clips(folder: Path, count: int, advance: Callable[[], None] = lambda: None) -> list[Path]:
    """`count` MP4 files in `folder`, all of one length and all with other pictures and sound at each second.

    Clip i is the packaged clip, pictures and sound turned by the same share of its length, and a little
    brighter or darker: no two have a byte, a frame or a sample in common that a cache could find again.
    """
    import av

    import crab_edge

    source = str(Path(crab_edge.__file__).parent / PACKAGED)
    with av.open(source) as container:
        rate = Fraction(container.streams.video[0].average_rate or 25)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(source) as container:
        sound_rate = container.streams.audio[0].codec_context.sample_rate
        resampler = av.AudioResampler("s16", "mono", sound_rate)
        blocks = [
            piece.to_ndarray()[0]
            for frame in container.decode(audio=0)
            for piece in resampler.resample(frame)
        ]
    frames, wave = frames[: round(SECONDS * rate)], np.concatenate(blocks)[: round(SECONDS * sound_rate)]
    paths = []
    for number in range(count):
        share = number / count
        path = folder / f"clip{number:04d}.mp4"
        turned = np.roll(frames, -round(share * len(frames)), axis=0)
        gain = 0.9 + 0.2 * ((number * 0.618034) % 1)
        brighter = (turned * np.float32(gain)).clip(0, 255).astype(np.uint8)
        _write(path, brighter, rate, np.roll(wave, -round(share * len(wave))), sound_rate)
        paths.append(path)
        advance()
    return paths


def _write(path: Path, frames: np.ndarray, rate: Fraction, wave: np.ndarray, sound_rate: int) -> None:
    import av

    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        audio = out.add_stream("aac", rate=sound_rate)
        audio.layout = "mono"
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        block = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
        block.sample_rate, block.pts = sound_rate, 0
        out.mux(audio.encode(block))
        out.mux(audio.encode(None))
