"""Media recipes: which streams a task takes, how many frames, which part of the audio, the lead sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crab_edge.errors import InputError

SAMPLE_RATE = 16_000

#: Audio rules that divide the waveform and keep one unit: name -> number of units.
_SINGLE_UNIT = {"unit5": 5, "unit10": 10}
#: Below this the 20 s re-windowing would shorten audio that fits anyway.
_REWINDOW_FROM_S = 40.0
_NUMBER = {2: "two", 3: "three"}
KINDS = ("video", "image", "audio")
_PLURAL = {"video": "videos", "image": "images", "audio": "audio clips"}


@dataclass(frozen=True)
class MediaRecipe:
    """The media part of a prompt. Two tasks with equal recipes share one prompt prefix.

    `frames` are per video (1 for a still); `audio` is the rule of `slice_audio`: "whole", "rewindow20",
    "first4", "unit5" or "unit10"; `windowed` says that clips over ten seconds are cut into windows. Several
    videos are shown as one, several audios heard as one, joined without a separator (Crab+ reference);
    `audio_first` puts the audio before the visual.
    """

    name: str
    videos: int = 0
    images: int = 0
    audios: int = 0
    frames: int = 10
    audio: str = "whole"
    windowed: bool = False
    audio_first: bool = False

    def count(self, kind: str) -> int:
        """How many streams of a kind it takes."""
        return {"video": self.videos, "image": self.images, "audio": self.audios}[kind]

    @property
    def streams(self) -> frozenset[str]:
        """The streams it can use, of "video", "image", "audio"."""
        return frozenset(kind for kind in KINDS if self.count(kind))

    @property
    def units(self) -> int:
        """Of how many parts of the audio one is heard; 0 when the audio isn't divided."""
        return _SINGLE_UNIT.get(self.audio, 0)

    def lead(self, has_visual: bool, has_audio: bool) -> str:
        """The sentence before the media; a missing stream is left out of it, never replaced by zeros."""
        visual = audio = ""
        if has_visual and (self.videos or self.images):
            visual = counted("video", self.videos) if self.videos else counted("image", self.images)
        if has_audio and self.audios:
            audio = counted("audio", self.audios)
        named = [name for name in (visual, audio) if name]
        if not named:
            raise InputError(f"media recipe {self.name}: the clip has none of its streams")
        plural = (self.videos or self.images) > 1 if visual else self.audios > 1
        return f"{'These are' if plural else 'This is'} {' and '.join(named)}:"

    def slice_audio(self, wave: NDArray[np.float32], index: int | None = None) -> NDArray[np.float32]:
        """The part of the audio that the model hears.

        wave: float32 [n], mono, 16 kHz. Crab+ reference: with u = n // units samples,
        - "rewindow20": 60 units; the ten windows [i - 0.5, i + 1.5] for i = 0, 6, ... 54, joined to 20 units;
          the first one begins before the audio and is filled with zeros there. Under 40 s: the whole audio.
        - "first4": the first four seconds, zero-padded to exactly 64,000 samples.
        - "unit5", "unit10": unit `index` alone.
        """
        if wave.ndim != 1:
            raise InputError(f"expected a mono waveform [n], got an array of shape {list(wave.shape)}")
        if self.audio == "whole":
            return wave
        if self.audio == "rewindow20":
            return wave if len(wave) < _REWINDOW_FROM_S * SAMPLE_RATE else _rewindow(wave)
        if self.audio == "first4":
            kept = wave[: 4 * SAMPLE_RATE]
            return np.pad(kept, (0, 4 * SAMPLE_RATE - len(kept)))
        if self.audio in _SINGLE_UNIT:
            units = _SINGLE_UNIT[self.audio]
            if index is None or not 0 <= index < units:
                raise InputError(f"the audio rule {self.audio} needs an index 0..{units - 1}, got {index}")
            length = len(wave) // units
            return wave[index * length : (index + 1) * length]
        raise InputError(f"unknown audio rule {self.audio!r} in media recipe {self.name}")


def counted(kind: str, count: int) -> str:
    """ "a video", "an audio", "two audio clips"."""
    if count == 1:
        return f"{'a' if kind == 'video' else 'an'} {kind}"
    return f"{_NUMBER.get(count, count)} {_PLURAL[kind]}"


def _rewindow(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    unit = len(wave) // 60
    before = unit // 2
    padded = np.concatenate([np.zeros(before, wave.dtype), wave])
    # Shifted by `before`, the window that starts at i - 0.5 units starts at i units.
    return np.concatenate([padded[i * unit : (i + 2) * unit] for i in range(0, 60, 6)])


VIDEO_10 = MediaRecipe("video10+audio", videos=1, audios=1, frames=10, windowed=True)
VIDEO_10_REWINDOW = MediaRecipe("video10+audio20", videos=1, audios=1, frames=10, audio="rewindow20")
IMAGE_AUDIO = MediaRecipe("image+audio", images=1, audios=1, frames=1)
#: As VIDEO_10, but one answer about the whole clip however long it is.
VIDEO_10_WHOLE = MediaRecipe("video10+audio, whole clip", videos=1, audios=1, frames=10)
VIDEO_4 = MediaRecipe("video4+audio4", videos=1, audios=1, frames=4, audio="first4")
IMAGE_AUDIO_5TH = MediaRecipe("image+audio 1/5", images=1, audios=1, frames=1, audio="unit5")
IMAGE_AUDIO_10TH = MediaRecipe("image+audio 1/10", images=1, audios=1, frames=1, audio="unit10")
TWO_VIDEOS = MediaRecipe("audio+2 videos", videos=2, audios=1, frames=10, audio_first=True)
TWO_AUDIOS = MediaRecipe("video+2 audios", videos=1, audios=2, frames=10)
