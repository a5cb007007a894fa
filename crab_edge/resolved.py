"""What one prompt shows of a clip: the recipe applied, decoded and turned into the encoders' inputs.

Two tasks whose recipes come to the same frames, the same samples and the same lead have equal keys, so that
they share encoder outputs and the prompt's prefix.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from crab_edge.errors import InputError, TaskError
from crab_edge.features import FeatureConfig, audio_chunks, log_mel, patches
from crab_edge.prompt import MediaItem
from crab_edge.tasks import MediaContext, MediaRecipe, Task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from crab_edge.clip import Clip, Window
    from crab_edge.engines import Engine

WINDOW_S = 10.0
LONGEST_WINDOW_S = 60.0
SHORTEST_STRIDE_S = 1.0
ABOUT_A_SECOND = 24_000  # samples


def streams(clip: Clip) -> tuple[str, ...]:
    """The kinds of a clip's streams, of "video", "image", "audio", one entry a stream."""
    counts = {"video": len(clip.videos), "image": len(clip.images), "audio": len(clip.audios)}
    return tuple(name for name, count in counts.items() for _ in range(count))


def check_stride(stride_s: float | None, window_s: float = WINDOW_S) -> None:
    """InputError unless windows that start so far apart leave nothing out and aren't too many."""
    if stride_s is not None and not SHORTEST_STRIDE_S <= stride_s <= window_s:
        raise InputError(
            f"a stride of {stride_s:g} s: expected {SHORTEST_STRIDE_S:g} to {window_s:g} s, a window's length"
        )


def widened(recipe: MediaRecipe, window_s: float, duration_s: float) -> MediaRecipe:
    """The recipe for windows of `window_s` instead of 10 s: as many frames a second, so 60 in a minute.

    Recipes that show a clip as a whole stay as they are.
    """
    if not recipe.windowed or window_s == WINDOW_S:
        return recipe
    shown = min(window_s, max(duration_s, WINDOW_S))
    return replace(recipe, frames=max(2, round(recipe.frames * shown / WINDOW_S)))


def check_window(window_s: float) -> None:
    """InputError for windows that are shorter than the model's own or longer than was ever tried."""
    if not WINDOW_S <= window_s <= LONGEST_WINDOW_S:
        raise InputError(
            f"windows of {window_s:g} s: expected {WINDOW_S:g} s, which the model was trained on, to "
            f"{LONGEST_WINDOW_S:g} s"
        )


def windows(
    clip: Clip, recipe: MediaRecipe, stride_s: float | None = None, window_s: float = WINDOW_S
) -> list[Window | None]:
    """The windows that a recipe cuts the clip into; [None] is the clip as a whole."""
    if not recipe.windowed:
        return [None]
    cut = clip.windows(window_s, stride_s)
    return list(cut) if len(cut) > 1 else [None]


def misfit(clip: Clip, task: Task) -> str | None:
    """Why `task` can't take the clip's streams, or None if it can."""
    try:
        recipe = task.recipe_for(streams(clip))
    except TaskError as error:
        return str(error)
    for kind, wanted, tracks in _counts(clip, recipe):
        if wanted and len(tracks) > wanted:
            files = ", ".join(sorted({track.path.name for track in tracks}))
            return (
                f"task {task.name} takes {wanted} {kind} stream, but {len(tracks)} were given ({files}); "
                "say which file is for what with --video, --image and --audio"
            )
    return None


def _counts(clip: Clip, recipe: MediaRecipe) -> tuple[tuple[str, int, Sequence[Any]], ...]:
    return (
        ("video", recipe.videos, clip.videos),
        ("image", recipe.images, clip.images),
        ("audio", recipe.audios, clip.audios),
    )


def heard(
    recipe: MediaRecipe, wave: NDArray[np.float32], frame: int | None
) -> tuple[NDArray[np.float32], bool]:
    """What a recipe hears of a waveform, and whether it had to guess which part.

    Without a `frame`, a sound of about a second is heard whole where one part in 5 or 10 would be, and of a
    longer one the first part. TaskError for a frame past the last part.
    """
    if not recipe.units:
        return recipe.slice_audio(wave), False
    if frame is not None and not 0 <= frame < recipe.units:
        raise TaskError(
            f"frame {frame}: the sound is divided in {recipe.units} parts; expected 0 to {recipe.units - 1}"
        )
    if frame is None and len(wave) <= ABOUT_A_SECOND:
        return wave, False
    return recipe.slice_audio(wave, frame or 0), frame is None


def unused(clip: Clip, recipe: MediaRecipe) -> list[str]:
    """Kinds of streams that the clip has and the recipe leaves out."""
    return [kind for kind, wanted, tracks in _counts(clip, recipe) if tracks and not wanted]


def context(clip: Clip, recipe: MediaRecipe, window: Window | None) -> MediaContext:
    """What the parsers need to return clip seconds and original pixels."""
    frame = (clip.videos if recipe.videos else clip.images) or clip.videos or clip.images
    size = {"width": frame[0].width, "height": frame[0].height} if frame else {}
    return MediaContext(duration_s=clip.duration_s, window=window, **size)


@dataclass
class Spent:
    """Seconds spent on one answer, by step; see `crab_edge.results.Timings`."""

    decode_s: float = 0.0
    features_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    generate_s: float = 0.0
    trace_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    held_tokens: int = 0


@dataclass
class Part:
    """One medium of a prompt, not yet encoded."""

    kind: Literal["video", "image", "audio"]
    key: str
    data: Any = field(repr=False)
    """A callable for the frames uint8 [F, 224, 224, 3], or the samples float32 [n]."""

    def encode(
        self, engine: Engine, cfg: FeatureConfig, spent: Spent
    ) -> tuple[MediaItem, NDArray[np.float32]]:
        """The placeholders and their embeddings [tokens, H]."""
        if self.kind == "audio":
            started = time.perf_counter()
            mel = log_mel(self.data, cfg)
            chunks, lengths = audio_chunks(mel, cfg)
            item = MediaItem.audio(mel.shape[1])
            spent.features_s += time.perf_counter() - started
            started = time.perf_counter()
            embeddings = engine.audio(chunks, lengths)
        else:
            started = time.perf_counter()
            frames = self.data()
            spent.decode_s += time.perf_counter() - started
            started = time.perf_counter()
            pixels, grid = patches(frames, cfg)
            item = MediaItem.visual(self.kind, grid, cfg)
            spent.features_s += time.perf_counter() - started
            started = time.perf_counter()
            embeddings = engine.vision(pixels)
        spent.encode_s += time.perf_counter() - started
        return item, embeddings


@dataclass(frozen=True)
class Shown:
    """The media part of one prompt: lead sentence and media in the order of the prompt."""

    lead: str
    parts: tuple[Part, ...]

    @property
    def key(self) -> tuple[str, ...]:
        """Equal keys mean equal prefixes."""
        return (self.lead, *(part.key for part in self.parts))


def resolve(
    clip: Clip, recipe: MediaRecipe, window: Window | None, spent: Spent, frame: int | None = None
) -> Shown:
    """Applies a recipe to a clip (or one window of it). Missing streams change the lead, nothing else.

    A stream that has ended before the window is missing there. Where a recipe takes several videos or
    several audios, the model sees them as one (Crab+ reference). `frame`: for recipes that hear one part of
    the audio, the picture's number among the parts.
    Frames are decoded only when they get encoded; the samples are decoded here, since they make the key.
    """
    span = "whole" if window is None else f"{window.start_s:.3f}-{window.end_s:.3f}"
    visual: list[Part] = []
    shown = [
        (number, video) for number, video in enumerate(clip.videos[: recipe.videos]) if video.visible(window)
    ]
    if shown:
        numbers = "+".join(str(number) for number, _ in shown)
        key = f"video:{clip.sha256}:{numbers}:{recipe.frames}:{span}"
        tracks = [video for _, video in shown]
        visual.append(
            Part("video", key, lambda: _joined([video.frames(recipe.frames, window) for video in tracks]))
        )
    for number, image in enumerate(clip.images[: recipe.images]):
        key = f"image:{clip.sha256}:{number}"
        visual.append(Part("image", key, lambda image=image: image.pixels()[None]))
    sound: list[Part] = []
    started = time.perf_counter()
    waves = [
        heard(recipe, audio.waveform(window), frame)[0]
        for audio in clip.audios[: recipe.audios]
        if audio.audible(window)
    ]
    if waves:
        wave = _joined(waves)
        digest = hashlib.blake2b(wave.tobytes(), digest_size=16).hexdigest()
        sound.append(Part("audio", f"audio:{digest}", wave))
    spent.decode_s += time.perf_counter() - started
    parts = (*sound, *visual) if recipe.audio_first else (*visual, *sound)
    return Shown(recipe.lead(bool(visual), bool(sound)), parts)


def _joined(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    """One after the other along the first axis; a single one as it is."""
    import numpy as np

    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
