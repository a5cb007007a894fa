"""Sound files -> recordings: mono float32 at 16 kHz, trimmed and levelled, and events filled with them."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soxr

RATE = 16000
MIN_SECONDS = 0.15
MAX_SECONDS = 10.0
LEVEL = 0.1


def decode(path: Path) -> np.ndarray:
    """float32 [n] mono 16 kHz of any sound file; empty if it holds no sound that PyAV can read."""
    pieces, rate = [], RATE
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                return np.zeros(0, np.float32)
            rate = container.streams.audio[0].rate
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            for frame in container.decode(audio=0):
                pieces += [f.to_ndarray()[0] for f in resampler.resample(frame)]
            pieces += [f.to_ndarray()[0] for f in resampler.resample(None)]
    except (av.FFmpegError, OSError):
        return np.zeros(0, np.float32)
    if not pieces:
        return np.zeros(0, np.float32)
    return soxr.resample(np.concatenate(pieces).astype(np.float32), rate, RATE).astype(np.float32)


def clean(wave: np.ndarray, max_seconds: float = MAX_SECONDS) -> np.ndarray | None:
    """Without leading and trailing silence, at one loudness; None if silent or shorter than 0.15 s."""
    peak = float(np.abs(wave).max()) if wave.size else 0.0
    if peak < 1e-3:
        return None
    hop = 160
    frames = wave[: wave.size // hop * hop].reshape(-1, hop)
    loud = np.flatnonzero(np.abs(frames).max(axis=1) > 0.03 * peak)
    if loud.size == 0:
        return None
    wave = wave[max(loud[0] - 1, 0) * hop : (loud[-1] + 2) * hop][: int(max_seconds * RATE)]
    return level(wave) if wave.size >= MIN_SECONDS * RATE else None


def level(wave: np.ndarray, target: float = LEVEL) -> np.ndarray:
    """Scaled so that its loud parts have RMS `target`, peaks held under 0.95."""
    hop = 1600
    padded = np.pad(wave, (0, -wave.size % hop)).reshape(-1, hop)
    power = np.sort((padded**2).mean(axis=1))
    loud = float(np.sqrt(power[-max(1, power.size // 3) :].mean()))
    gain = target / max(loud, 1e-4)
    return (wave * min(gain, 0.95 / max(float(np.abs(wave).max()), 1e-4))).astype(np.float32)


def fill(wave: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` samples of sound: a random stretch of a long recording, or a short one repeated with pauses.

    Repeats stand close (at most 0.4 s apart), so that the event counts as one. The edges fade over 10 ms.
    """
    if wave.size >= count:
        first = int(random.integers(wave.size - count + 1))
        out = wave[first : first + count].copy()
    else:
        out = np.zeros(count, np.float32)
        gap = int(random.uniform(0.0, min(0.4, 0.6 * wave.size / RATE)) * RATE)
        at = 0
        while at < count:
            piece = wave[: count - at]
            out[at : at + piece.size] = piece
            at += wave.size + gap
    edge = min(160, count // 2)
    ramp = np.linspace(0.0, 1.0, edge, dtype=np.float32)
    out[:edge] *= ramp
    out[count - edge :] *= ramp[::-1]
    return out
