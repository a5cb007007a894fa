"""The prompts on which an export is calibrated and measured: real clips, else seeded synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crab_edge import tasks
from crab_edge.errors import CrabError, InputError
from crab_edge.features import FeatureConfig
from crab_edge.resolved import Part, Shown, Spent, misfit, resolve, streams, windows

if TYPE_CHECKING:
    from crab_edge.clip import Clip

Media = Sequence["Path | str | Sequence[Path | str]"]


@dataclass(frozen=True)
class Example:
    """One prompt: which clip, what is shown of it, and the instruction."""

    clip: str
    name: str
    shown: Shown
    instruction: str


@dataclass(frozen=True)
class ExampleSet:
    """`inputs` says where they come from: "media", "sample" (the packaged clip) or "synthetic"."""

    inputs: str
    examples: tuple[Example, ...]

    def split(self) -> tuple[ExampleSet, ExampleSet, bool]:
        """Prompts to calibrate on, prompts to compare on, and whether these show other clips.

        Of several clips the last quarter (at least one) is held out; a single clip has to serve for both.
        """
        clips = list(dict.fromkeys(example.clip for example in self.examples))
        if len(clips) == 1 or self.inputs == "synthetic":
            return self, self, False
        held_out = set(clips[-max(1, len(clips) // 4) :])
        kept = tuple(example for example in self.examples if example.clip not in held_out)
        rest = tuple(example for example in self.examples if example.clip in held_out)
        return ExampleSet(self.inputs, kept), ExampleSet(self.inputs, rest), True


def gather(media: Media | None, features: FeatureConfig, seed: int = 0) -> ExampleSet:
    """Examples from `media` (each entry a file, a folder of clips, or the files of one clip).

    Without media, the clip that ships with the package; without that one, synthetic scenes. Raises
    MediaError for what can't be decoded and InputError when no task takes any of the clips.
    """
    if media:
        return ExampleSet("media", _from_clips(media))
    sample = _packaged_sample()
    if sample is not None:
        return ExampleSet("sample", _from_clips([sample]))
    return ExampleSet("synthetic", synthetic(features, seed))


def _packaged_sample() -> Path | None:
    from crab_edge.bundle import sample_clip

    try:
        return sample_clip()
    except CrabError:
        return None


def _from_clips(media: Media) -> tuple[Example, ...]:
    from crab_edge.clip import Clip

    examples: list[Example] = []
    for files in clips_of(media):
        examples += _of_clip(Clip.open(files), "+".join(Path(file).name for file in files))
    if not examples:
        raise InputError(
            "no task takes any of the calibration media without a question; give clips with sound"
        )
    return tuple(examples)


def clips_of(media: Media) -> Iterator[list[Path]]:
    """The files of each clip."""
    for entry in media:
        if not isinstance(entry, (str, Path)):
            yield [Path(file) for file in entry]
        elif Path(entry).is_dir():
            yield from ([file] for file in sorted(Path(entry).iterdir()) if file.is_file())
        else:
            yield [Path(entry)]


def _of_clip(clip: Clip, name: str) -> Iterator[Example]:
    """Every task that the clip suits and that needs no question, on its first window; equal prompts once."""
    for task in tasks.distinct(tasks.applicable(streams(clip))):
        if task.needs_question or misfit(clip, task) is not None:
            continue
        recipe = task.recipe_for(streams(clip))
        shown = resolve(clip, recipe, windows(clip, recipe)[0], Spent())
        yield Example(name, f"{name}:{task.name}", shown, task.prompt())


def synthetic(features: FeatureConfig, seed: int = 0) -> tuple[Example, ...]:
    """Two prompts of drifting colours and chirps: a video of 4 frames with 3.3 s of sound, and an image
    with 1 s.
    """
    rng = np.random.default_rng(seed)
    cases = (("video", 4, 3.3, "ave"), ("image", 1, 1.0, "arig"))
    examples = []
    for kind, frames, seconds, task in cases:
        pixels = _drift(rng, frames, features.image_size)
        wave = _chirp(rng, round(seconds * features.sample_rate), features.sample_rate)
        visual = Part(kind, f"synthetic:{kind}:{seed}", lambda pixels=pixels: pixels)
        sound = Part("audio", f"synthetic:{kind}:audio:{seed}", wave)
        recipe = tasks.get(task).media
        shown = Shown(recipe.lead(True, True), (visual, sound))
        examples.append(Example("synthetic", f"synthetic:{task}", shown, tasks.get(task).prompt()))
    return tuple(examples)


def _drift(rng: np.random.Generator, frames: int, size: int) -> NDArray[np.uint8]:
    """uint8 [frames, size, size, 3]: one coarse picture, shifted from frame to frame."""
    coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    picture = np.kron(coarse, np.ones((size // 8, size // 8, 1), np.uint8))
    return np.stack([np.roll(picture, 9 * i, axis=1) for i in range(frames)])


def _chirp(rng: np.random.Generator, samples: int, rate: int) -> NDArray[np.float32]:
    """float32 [samples]: a rising tone over noise."""
    seconds = np.arange(samples) / rate
    tone = np.sin(2 * np.pi * (300 + 200 * seconds) * seconds)
    return (0.3 * tone + 0.02 * rng.standard_normal(samples)).astype(np.float32)
