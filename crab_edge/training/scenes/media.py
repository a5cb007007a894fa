"""Media files: mono wav, and mp4 with H.264 and AAC."""

from __future__ import annotations

import wave as wave_file
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from crab_edge.training.scenes.sounds import RATE


def write_wav(path: Path, wave: np.ndarray, rate: int = RATE) -> None:
    """Mono 16-bit PCM."""
    with wave_file.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes())


def write_mp4(
    path: Path,
    images: list[Image.Image],
    fps: int,
    wave: np.ndarray | None,
    *,
    crf: int = 23,
    audio_rate: int = 48000,
    bit_rate: int = 96_000,
) -> None:
    """H.264 (4:2:0) and, with a wave (float32 mono 16 kHz), AAC. The same input gives the same streams."""
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        video = container.add_stream(
            "libx264", rate=fps, options={"crf": str(crf), "preset": "veryfast", "threads": "1"}
        )
        video.width, video.height = images[0].size
        video.pix_fmt = "yuv420p"
        video.time_base = Fraction(1, fps)
        audio = container.add_stream("aac", rate=audio_rate, layout="mono") if wave is not None else None
        if audio is not None:
            audio.bit_rate = bit_rate
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_image(image)
            frame.pts = number
            frame.time_base = Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None and wave is not None:
            import soxr

            samples = soxr.resample(wave, RATE, audio_rate).astype(np.float32)
            for start in range(0, samples.size, 1024):
                frame = av.AudioFrame.from_ndarray(
                    samples[None, start : start + 1024], format="fltp", layout="mono"
                )
                frame.sample_rate = audio_rate
                frame.pts = start
                frame.time_base = Fraction(1, audio_rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode(None))
