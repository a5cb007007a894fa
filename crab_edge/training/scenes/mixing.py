"""Mixing: sound events -> one mono 16 kHz waveform."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crab_edge.training.scenes.catalogue import Asset
from crab_edge.training.scenes.sounds import LEVEL, RATE, fill


@dataclass(frozen=True)
class SoundEvent:
    """A recording that sounds from `start_s` to `end_s`, `gain_db` above the common level."""

    label: str
    asset: Asset
    start_s: float
    end_s: float
    gain_db: float


def mix(events: list[SoundEvent], duration_s: float, random: np.random.Generator, train: bool) -> np.ndarray:
    """float32 [duration * 16000]; training varies speed and colour of the recordings. Peaks stay under 1."""
    out = np.zeros(int(duration_s * RATE), np.float32)
    for event in events:
        wave = event.asset.wave()
        if train:
            wave = vary(wave, random)
        start, end = int(event.start_s * RATE), min(int(event.end_s * RATE), out.size)
        out[start:end] += fill(wave, end - start, random) * np.float32(10 ** (event.gain_db / 20))
    if random.random() < 0.6:
        out += _ambience(out.size, random) * np.float32(LEVEL * 10 ** (random.uniform(-38, -20) / 20))
    peak = float(np.abs(out).max()) if out.size else 0.0
    return out * np.float32(0.98 / peak) if peak > 0.98 else out


def vary(wave: np.ndarray, random: np.random.Generator) -> np.ndarray:
    if random.random() < 0.6:
        speed = float(random.uniform(0.87, 1.15))
        at = np.arange(int(wave.size / speed), dtype=np.float32) * np.float32(speed)
        whole = at.astype(np.int32)
        np.minimum(whole, wave.size - 2, out=whole)
        part = at - whole
        wave = wave[whole] * (1 - part) + wave[whole + 1] * part
    if random.random() < 0.4:
        # A tilt of the spectrum: another microphone, another distance.
        tilt = np.float32(random.uniform(-0.5, 0.5))
        wave = wave + np.concatenate([np.zeros(1, np.float32), wave[:-1]]) * tilt
    return wave


def _ambience(count: int, random: np.random.Generator) -> np.ndarray:
    """Noise between white and low rumble, RMS 1; a stretch of noise drawn once per process, rolled."""
    pool = _noise()[int(random.integers(2))]
    shift = int(random.integers(pool.size - count)) if pool.size > count else 0
    return np.resize(pool[shift : shift + count], count)


_POOL: list[np.ndarray] = []


def _noise() -> list[np.ndarray]:
    if not _POOL:
        white = np.random.default_rng(7).standard_normal(RATE * 20).astype(np.float32)
        spectrum = np.fft.rfft(white)
        spectrum /= np.sqrt(np.maximum(np.arange(spectrum.size), 200.0))
        pink = np.fft.irfft(spectrum, white.size).astype(np.float32)
        _POOL.extend([white, pink / pink.std()])
    return _POOL
