"""Scenes -> tensors. Everything is a function of (seed, split, index), so a run resumes by its step number
alone.

Batches are made in one worker process beside the trainer: rendering, patches, spectrograms, packing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from crab_edge.features import FeatureConfig, audio_chunks, log_mel, patches
from crab_edge.prompt import MediaItem, PromptBuilder
from crab_edge.tasks.recipes import IMAGE_AUDIO, TWO_VIDEOS
from crab_edge.training.heads import cell_targets
from crab_edge.training.packing import collate, pack

TOKEN_S = 0.04
PICTURE = IMAGE_AUDIO.lead(True, False)


class Scenes(Protocol):
    """What training needs of a source of scenes (`scenes.SceneSource`, `SyntheticScenes`, `AvuieScenes`)."""

    def clip(self, index: int) -> Any: ...
    def still(self, index: int) -> Any: ...
    def audio(self, index: int) -> tuple[np.ndarray, list[tuple[str, float, float]]]: ...


@dataclass(frozen=True)
class Vocabulary:
    """The classes in a fixed order."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {label: i for i, label in enumerate(self.labels)})

    def index(self, label: str) -> int:
        """Class number of a label, -1 when it has none."""
        return self._index.get(label, -1)  # type: ignore[attr-defined]


def box_arrays(scene: Any, vocabulary: Vocabulary, at_s: float | None) -> tuple[np.ndarray, np.ndarray]:
    """(boxes float32 [n, 4], classes int64 [n]) of a scene, those visible at `at_s` when it is given."""
    rows = [
        (box[1:5], vocabulary.index(box[0]))
        for box in scene.boxes
        if at_s is None or len(box) < 7 or box[5] <= at_s < box[6]
    ]
    rows = [r for r in rows if r[1] >= 0]
    boxes = np.array([r[0] for r in rows], np.float32).reshape(-1, 4)
    return boxes, np.array([r[1] for r in rows], np.int64)


def activity(sounds: Sequence[tuple[str, float, float]], tokens: int, vocabulary: Vocabulary) -> np.ndarray:
    """uint8 [tokens, classes]: who sounds in each 40 ms token."""
    out = np.zeros((tokens, len(vocabulary.labels)), np.uint8)
    middle = (np.arange(tokens) + 0.5) * TOKEN_S
    for label, start, end in sounds:
        number = vocabulary.index(label)
        if number >= 0:
            out[(middle >= start) & (middle < end), number] = 1
    return out


def spans(sounds: Sequence[tuple[str, float, float]], tokens: int) -> np.ndarray:
    """int64 [tokens, 2]: the whole second at which what sounds alone in a token began; in silence the one at
    which the last sound ended; -1 where there is none.
    """
    out = np.full((tokens, 2), -1, np.int64)
    for token in range(tokens):
        at = (token + 0.5) * TOKEN_S
        sounding = [s for s in sounds if s[1] <= at < s[2]]
        ended = [s[2] for s in sounds if s[2] <= at]
        if len(sounding) == 1:
            out[token, 0] = int(sounding[0][1] + 0.5)
        elif not sounding and ended:
            out[token, 1] = int(max(ended) + 0.5)
    return out


def scene_sounds(scene: Any) -> list[tuple[str, float, float]]:
    """The sounds of a scene, empty when the source doesn't tell."""
    return [(s[0], float(s[1]), float(s[2])) for s in (getattr(scene, "sounds", None) or [])]


def audio_features(wave: np.ndarray, cfg: FeatureConfig) -> tuple[np.ndarray, np.ndarray, int]:
    """(chunks float32 [C, mel, 200], lengths int64 [C], mel frames); at least 1 s, as the reference pads."""
    if len(wave) < cfg.sample_rate:
        wave = np.pad(wave, (0, cfg.sample_rate - len(wave)))
    mel = log_mel(np.asarray(wave, np.float32), cfg)
    chunks, lengths = audio_chunks(mel, cfg)
    return chunks, lengths, mel.shape[1]


class AudioBatches:
    """Batches for the audio tower: chunks, lengths and activity at every token."""

    def __init__(self, scenes: Scenes, vocabulary: Vocabulary, cfg: FeatureConfig, batch: int) -> None:
        self.scenes, self.vocabulary, self.cfg, self.batch = scenes, vocabulary, cfg, batch

    def __call__(self, step: int) -> dict[str, Tensor]:
        chunks, lengths, truth, clip = [], [], [], []
        for row in range(self.batch):
            wave, sounds = self.scenes.audio(step * self.batch + row)
            c, n, _ = audio_features(wave, self.cfg)
            tokens = int((((n - 1) // 2 + 1) // 2).sum())
            chunks.append(c)
            lengths.append(n)
            truth.append(activity(sounds, tokens, self.vocabulary))
            clip.append(np.full(tokens, row, np.int64))
        return {
            "chunks": torch.from_numpy(np.concatenate(chunks)),
            "lengths": torch.from_numpy(np.concatenate(lengths).astype(np.int64)),
            "activity": torch.from_numpy(np.concatenate(truth)),
            "clip": torch.from_numpy(np.concatenate(clip)),
        }


class VisionBatches:
    """Batches for the vision tower: patches of stills and their cells' truth."""

    def __init__(self, scenes: Scenes, vocabulary: Vocabulary, cfg: FeatureConfig, batch: int) -> None:
        self.scenes, self.vocabulary, self.cfg, self.batch = scenes, vocabulary, cfg, batch

    def __call__(self, step: int) -> dict[str, Tensor]:
        pixels, label, target, weight = [], [], [], []
        for row in range(self.batch):
            scene = self.scenes.still(step * self.batch + row)
            pixels.append(patches(scene.image[None], self.cfg)[0])
            truth = cell_targets(*box_arrays(scene, self.vocabulary, None))
            for store, value in zip((label, target, weight), truth, strict=True):
                store.append(value)
        return {
            "patches": torch.from_numpy(np.concatenate(pixels)),
            "cell_label": torch.from_numpy(np.stack(label)),
            "cell_box": torch.from_numpy(np.stack(target)),
            "cell_weight": torch.from_numpy(np.stack(weight)),
        }


def group_by_lead(samples: Sequence[Any], rng: np.random.Generator, limit: int) -> tuple[str, list[Any]]:
    """One lead sentence of a scene, drawn by its share of the samples, and up to `limit` of its samples: one
    of each task first, the others by chance.
    """
    leads = [s.lead for s in samples]
    lead = leads[int(rng.integers(len(leads)))]
    chosen = [s for s in samples if s.lead == lead]
    if len(chosen) > limit:
        order = rng.permutation(len(chosen))
        tasks = [chosen[i].task for i in order]
        rank = [(tasks.index(task) != place, place) for place, task in enumerate(tasks)]
        kept = [order[place] for _, place in sorted(rank)[:limit]]
        chosen = [chosen[i] for i in sorted(kept)]
    return lead, chosen


def _visual(
    scene: Any, lead: str, cfg: FeatureConfig, vocabulary: Vocabulary
) -> tuple[MediaItem, dict] | None:
    if "video" in lead and scene.frames is not None:
        pixels, grid = patches(scene.frames, cfg)
        item = MediaItem.visual("video", grid, cfg)
        # Frame i of ten lies at i/9 of the clip; a slice holds frames 2t and 2t+1.
        times = [(2 * t + 0.5) / max(len(scene.frames) - 1, 1) * scene.duration_s for t in range(grid[0])]
    elif "image" in lead and scene.image is not None:
        pixels, grid = patches(scene.image[None], cfg)
        item = MediaItem.visual("image", grid, cfg)
        times = [None]
    else:
        return None
    truth = [cell_targets(*box_arrays(scene, vocabulary, at)) for at in times]
    return item, {
        "patches": pixels,
        "cell_label": np.stack([t[0] for t in truth]),
        "cell_box": np.stack([t[1] for t in truth]),
        "cell_weight": np.stack([t[2] for t in truth]),
    }


def _audio(
    scene: Any, lead: str, cfg: FeatureConfig, vocabulary: Vocabulary
) -> tuple[MediaItem, dict] | None:
    if "audio" not in lead or scene.wave is None:
        return None
    chunks, lengths, frames = audio_features(scene.wave, cfg)
    item = MediaItem.audio(frames)
    tokens = int((((lengths - 1) // 2 + 1) // 2).sum())
    return item, {
        "chunks": chunks,
        "lengths": lengths.astype(np.int64),
        "activity": activity(scene_sounds(scene), tokens, vocabulary),
        "second": np.minimum(np.arange(tokens) * TOKEN_S, 224).astype(np.int64),
        "span": np.minimum(spans(scene_sounds(scene), tokens), 224),
    }


EMPTY = {
    "patches": ((0, 1176), np.float32),
    "cell_label": ((0, 64), np.int64),
    "cell_box": ((0, 64, 4), np.float32),
    "cell_weight": ((0, 64), np.float32),
    "lengths": ((0,), np.int64),
    "second": ((0,), np.int64),
    "span": ((0, 2), np.int64),
}


def language_batch(
    scenes: Sequence[tuple[Any, str, Sequence[Any]]],
    builder: PromptBuilder,
    vocabulary: Vocabulary,
) -> dict[str, Tensor]:
    """Batch of (scene, lead, samples): packed text, both towers' inputs, the throw-away heads' truth."""
    cfg = builder.cfg
    packed, parts = [], []
    for scene, lead, samples in scenes:
        items = []
        media = [_visual(scene, lead, cfg, vocabulary), _audio(scene, lead, cfg, vocabulary)]
        for made in reversed(media) if lead == TWO_VIDEOS.lead(True, True) else media:
            if made is not None:
                items.append(made[0])
                parts.append(made[1])
        asked = [(s.instruction, s.answer) for s in samples]
        only = [s.metadata.get("loss") == "coordinates" for s in samples]
        packed.append(pack(builder, lead, items, asked, only))
    out = collate(packed, builder.special.pad)
    empty = {
        **EMPTY,
        "chunks": ((0, cfg.n_mels, cfg.audio_chunk), np.float32),
        "activity": ((0, len(vocabulary.labels)), np.uint8),
    }
    for name, (shape, dtype) in empty.items():
        found = [p[name] for p in parts if name in p]
        joined = np.concatenate(found) if found else np.zeros(shape, dtype)
        out[name] = torch.from_numpy(np.ascontiguousarray(joined))
    return out


class LanguageBatches:
    """Batches for the decoder: `kind(step)` says whether a step sees clips, stills or crowded pictures.

    `drills(scene, lead, random)`: further samples for each scene; `crowded`: where crowded pictures are from.
    """

    def __init__(
        self,
        scenes: Scenes,
        builder_args: tuple[str, FeatureConfig],
        vocabulary: Vocabulary,
        *,
        batch: int,
        stills_per_clip: int,
        questions: int,
        kind: Callable[[int], str],
        seed: int,
        drills: Callable[[Any, str, np.random.Generator], list[Any]] | None = None,
        crowded: Any = None,
    ) -> None:
        self.drills, self.crowded = drills, crowded
        self.scenes, self.builder_args, self.vocabulary = scenes, builder_args, vocabulary
        self.batch, self.stills, self.questions, self.kind, self.seed = (
            batch,
            batch * stills_per_clip,
            questions,
            kind,
            seed,
        )
        self._builder: PromptBuilder | None = None

    @property
    def builder(self) -> PromptBuilder:
        """Made where it is used: tokenizers don't like being carried into another process."""
        if self._builder is None:
            self._builder = PromptBuilder(*self.builder_args)
        return self._builder

    def __call__(self, step: int) -> dict[str, Tensor]:
        kind = self.kind(step)
        render, size = {
            "clip": (self.scenes.clip, self.batch),
            "still": (self.scenes.still, self.stills),
            "crowded": (getattr(self.crowded, "still", None), self.stills),
        }[kind]
        rows = []
        for row in range(size):
            index = step * self.stills + row
            scene = render(index)
            rng = np.random.default_rng([self.seed, 77, index])
            lead, chosen = PICTURE, []
            if scene.samples:
                lead, chosen = group_by_lead(scene.samples, rng, self.questions)
            if self.drills is not None:
                chosen = [*chosen, *self.drills(scene, lead, rng)]
            rows.append((scene, lead, chosen))
        return language_batch(rows, self.builder, self.vocabulary)


class _Steps(Dataset):
    def __init__(self, make: Callable[[int], Any], first: int, count: int, stride: int, offset: int) -> None:
        self.make, self.first, self.count, self.stride, self.offset = make, first, count, stride, offset

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        return self.make((self.first + i) * self.stride + self.offset)


def _polite(_: int) -> None:
    torch.set_num_threads(1)
    os.nice(5)


def batches(
    make: Callable[[int], Any], first: int, last: int, *, workers: int, world: int = 1, rank: int = 0
) -> Iterator[Any]:
    """make(step) for step in [first, last), in order, rendered ahead by `workers` processes."""
    loader = DataLoader(
        _Steps(make, first, max(last - first, 0), world, rank),
        batch_size=None,
        shuffle=False,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_polite if workers else None,
        # Its own, or the loader would draw from the state that a checkpoint restores.
        generator=torch.Generator(),
    )
    return iter(loader)
