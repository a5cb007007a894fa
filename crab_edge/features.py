"""Pixels -> patches and samples -> log-mel, in numpy.

Both give what transformers' own processors give for Qwen2.5-Omni on the same input
(`Qwen2VLImageProcessorPil`, `Qwen2VLVideoProcessor`, `WhisperFeatureExtractor` with `padding="max_length"`,
stripped of the padding), so that the exported encoders see in the field what they saw in training.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crab_edge.errors import BundleError, InputError

QWEN_SYSTEM_PROMPT = (
    "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving auditory "
    "and visual inputs, as well as generating text and speech."
)
_LOG_FLOOR = 1e-10


class FeatureConfig(BaseModel):
    """What the encoders were trained on; `features.json` of a model or a bundle.

    `n_fft` and `hop` are in samples at `sample_rate` (Hz); `image_size` in pixels (square); `patch` in
    pixels; `temporal_patch` in frames; `merge` in patches a side; `mean` and `std` of RGB in 0..1;
    `audio_chunk` in mel frames (2 s); `seconds_per_grid` is the time between two temporal patches as the
    positions count it (fixed by the reference whatever the clip's length); `position_id_per_second` in ids.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_mels: int = Field(128, gt=0)
    n_fft: int = Field(400, gt=0)
    hop: int = Field(160, gt=0)
    sample_rate: int = Field(16000, gt=0)
    image_size: int = Field(224, gt=0)
    patch: int = Field(14, gt=0)
    temporal_patch: int = Field(2, gt=0)
    merge: int = Field(2, gt=0)
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    audio_chunk: int = Field(200, gt=0)
    system_prompt: str = QWEN_SYSTEM_PROMPT
    seconds_per_grid: float = Field(2.0, gt=0)
    position_id_per_second: int = Field(25, gt=0)

    @classmethod
    def load(cls, path: str | Path) -> FeatureConfig:
        """Read `features.json`. BundleError if it is missing, malformed or has a field unknown here."""
        path = Path(path)
        try:
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise BundleError(f"{path}: can't be read ({error.strerror}); export the model again") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise BundleError(f"{path}: {where}: {first['msg']}; export the model again") from error

    def save(self, path: str | Path) -> None:
        """Write `features.json`."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


@lru_cache(maxsize=8)
def _pixel_table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """float32 [3, 256]: every byte normalised for every channel, rounded as the processor rounds it."""
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]


def patches(
    frames: NDArray[np.uint8], cfg: FeatureConfig
) -> tuple[NDArray[np.float32], tuple[int, int, int]]:
    """Cut RGB frames into the vision encoder's patches.

    frames: uint8 [F, image_size, image_size, 3]. A number of frames that isn't a multiple of `temporal_patch`
    is filled up by repeating the last one (a still image becomes two equal frames), as the official
    processors do. Returns float32 [T * G * G, 3 * temporal_patch * patch * patch] with merge groups
    contiguous, and the grid (T, G, G) in patches; at the default sizes G = 16 and a row has 1176 values.
    Equal to transformers' Qwen2VLImageProcessorPil, bit for bit.
    """
    size, p, m, tp = cfg.image_size, cfg.patch, cfg.merge, cfg.temporal_patch
    frames = np.asarray(frames)
    if (
        frames.ndim != 4
        or frames.shape[0] == 0
        or frames.shape[1:] != (size, size, 3)
        or frames.dtype != np.uint8
    ):
        raise InputError(
            f"expected uint8 frames of shape [F>0, {size}, {size}, 3], got {frames.dtype} "
            f"{list(frames.shape)}; take them from VideoTrack.frames or StillImage.pixels"
        )
    missing = -frames.shape[0] % tp
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    t, g = frames.shape[0] // tp, size // p
    # Bytes are rearranged first (a quarter of the memory traffic of float32), then looked up.
    cut = frames.reshape(t, tp, g // m, m, p, g // m, m, p, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    cut = np.ascontiguousarray(cut).reshape(t * g * g, 3, tp * p * p)
    table = _pixel_table(cfg.mean, cfg.std)
    out = np.empty(cut.shape, np.float32)
    for channel in range(3):
        out[:, channel] = table[channel][cut[:, channel]]
    return out.reshape(t * g * g, 3 * tp * p * p), (t, g, g)


@lru_cache(maxsize=4)
def _mel_filters(n_mels: int, n_fft: int, sample_rate: int) -> NDArray[np.float64]:
    """float64 [n_mels, n_fft // 2 + 1]: Slaney's triangular filters from 0 Hz to half the rate, of equal
    area.

    Slaney's scale is linear below 1 kHz (200/3 Hz a mel) and logarithmic above (a factor of 6.4 in 27 mels).
    """
    knee_hz, knee_mel, step = 1000.0, 15.0, math.log(6.4) / 27.0
    top_mel = knee_mel + math.log(sample_rate / 2 / knee_hz) / step
    mels = np.linspace(0.0, top_mel, n_mels + 2)
    edges = np.where(mels < knee_mel, mels * 200.0 / 3.0, knee_hz * np.exp(step * (mels - knee_mel)))
    bins = np.linspace(0, sample_rate // 2, n_fft // 2 + 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (bins - low) / (centre - low), (high - bins) / (high - centre)
    return np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low))


def log_mel(wave: NDArray[np.float32], cfg: FeatureConfig) -> NDArray[np.float32]:
    """Whisper's log-mel spectrogram of a mono signal.

    wave: float32 [n], n > 0, at `cfg.sample_rate`. Returns float32 [n_mels, ceil(n / hop)].
    The signal counts as followed by silence without end (the official extractor pads it to 300 s): the last
    frames see those zeros, and the floor of 8 decades hangs from the loudest frame that touches the signal.
    """
    wave = np.asarray(wave)
    if wave.ndim != 1 or wave.size == 0:
        raise InputError(f"expected a mono signal of at least one sample, got shape {list(wave.shape)}")
    n, half, hop = wave.size, cfg.n_fft // 2, cfg.hop
    valid = -(-n // hop)
    touched = max(valid, -(-(n + half) // hop))
    padded = np.zeros(max((touched - 1) * hop + cfg.n_fft, 2 * half + n), np.float64)
    padded[half : half + n] = wave.astype(np.float32, copy=False)
    padded[:half] = padded[2 * half : half : -1]  # reflected; zeros where it is short
    windows = np.lib.stride_tricks.sliding_window_view(padded, cfg.n_fft)[::hop][:touched]
    hann = np.hanning(cfg.n_fft + 1)[:-1]
    # complex64 as in the official numpy path: both then round alike near the floor.
    spectrum = np.fft.rfft(windows * hann, axis=-1).astype(np.complex64)
    power = np.abs(spectrum, dtype=np.float64) ** 2.0
    mel = _mel_filters(cfg.n_mels, cfg.n_fft, cfg.sample_rate) @ power.T
    log = np.log10(np.maximum(mel, _LOG_FLOOR))
    log = np.maximum(log, log.max() - 8.0)[:, :valid]
    return ((log + 4.0) / 4.0).astype(np.float32)


def audio_chunks(
    mel: NDArray[np.float32], cfg: FeatureConfig
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Split a spectrogram into the audio encoder's chunks.

    mel: float32 [n_mels, L], L > 0. Returns float32 [C, n_mels, audio_chunk], the last chunk filled up with
    zeros, and int64 [C], the valid frames of each; C = ceil(L / audio_chunk).
    """
    n_mels, length = mel.shape
    if length == 0:
        raise InputError("expected a spectrogram of at least one frame, got none")
    count = -(-length // cfg.audio_chunk)
    padded = np.zeros((n_mels, count * cfg.audio_chunk), np.float32)
    padded[:, :length] = mel
    chunks = padded.reshape(n_mels, count, cfg.audio_chunk).transpose(1, 0, 2)
    lengths = np.full(count, cfg.audio_chunk, np.int64)
    lengths[-1] = length - (count - 1) * cfg.audio_chunk
    return np.ascontiguousarray(chunks), lengths


def audio_token_count(mel_frames: int) -> int:
    """Tokens the audio encoder makes of so many mel frames: a convolution of stride 2, then pairs."""
    return max(0, ((mel_frames - 1) // 2 + 1 - 2) // 2 + 1)


def vision_token_count(grid: tuple[int, int, int], cfg: FeatureConfig) -> int:
    """Tokens that the vision encoder makes of a grid (T, H, W) in patches: merge groups."""
    t, h, w = grid
    return t * (h // cfg.merge) * (w // cfg.merge)
