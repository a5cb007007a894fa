"""What a model takes on a device: tokens, weights, cache and activations, before anything is run.

Weights are exact arithmetic (`crab_edge.sizes`). What ONNX Runtime makes of them on a CPU, and what a
prompt's activations take, are formulas that were fitted to measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from crab_edge.errors import InputError
from crab_edge.shape import ModelShape
from crab_edge.sizes import WIDE_BLOCK, WeightRecipe, graph_bytes, tensors

GRAPHS = ("decoder", "vision", "audio")
# Interpreter, ONNX Runtime, decoding libraries and a clip's frames: `ask` on a small bundle, graphs left out.
PROCESS = 150_000_000
# Floats that live at once for a token, in widths of the MLP and of the model.
_MLP_WIDTHS, _WIDTHS = 8, 5
# System prompt, lead sentence, question and the chat's marks.
TEXT_TOKENS = 80
AUDIO_TOKENS_PER_S = 25
TOKENS_PER_GRID = 64
PATCHES = 256
SHORTEST_WINDOW = 10.0
CHUNK = 1024
WIDE = 2048
WIDE_CHUNK = 512


def prefill_chunk(hidden: int) -> int:
    """Tokens of a prompt that go through the decoder at a time: fewer in wide models with their activations.

    Every engine takes the same, so that answers don't depend on the machine's memory.
    """
    return CHUNK if hidden <= WIDE else WIDE_CHUNK


@dataclass(frozen=True)
class Wish:
    """A clip and how it is shown: `frames` and `seconds` of sound in each window of `window_s`.

    device_bytes: the memory that is there; answer: tokens that an answer may have; low_memory: encoders are
    closed before the decoder opens (see the engine's option).
    """

    seconds: float
    frames: int
    window_s: float
    device_bytes: int
    answer: int = 512
    kv_dtype: str = "float32"
    low_memory: bool = False

    @property
    def windows(self) -> int:
        """Prompts that the clip becomes; a tail under a second joins the last one (`Clip.windows`)."""
        return max(1, math.ceil((self.seconds - 1) / self.window_s - 1e-9))

    @property
    def shown_s(self) -> float:
        """Seconds of sound in the longest window."""
        last = self.seconds - (self.windows - 1) * self.window_s
        return last if self.windows == 1 else max(self.window_s, last)

    @property
    def grids(self) -> int:
        """Pairs of frames: what the vision encoder takes as one."""
        return (self.frames + 1) // 2


@dataclass(frozen=True)
class Plan:
    """What `wish` takes of memory and disk, all in bytes, and its tokens."""

    wish: Wish
    recipe: WeightRecipe
    disk: int
    tokens: dict[str, int]
    memory: dict[str, int]
    max_positions: int

    @property
    def peak(self) -> int:
        """The most that is resident at once."""
        return self.memory["peak"]

    @property
    def fits(self) -> bool:
        """Whether memory and the model's positions suffice."""
        return self.peak <= self.wish.device_bytes and self.tokens["total"] <= self.max_positions

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        wish = self.wish
        return {
            "windows": wish.windows,
            "window_s": wish.window_s,
            "frames": wish.frames,
            "block": self.recipe.block,
            "bits": self.recipe.bits,
            "kv_dtype": wish.kv_dtype,
            "low_memory": wish.low_memory,
            "disk_bytes": self.disk,
            "tokens": dict(self.tokens),
            "memory_bytes": dict(self.memory),
            "device_bytes": wish.device_bytes,
            "fits": self.fits,
        }


def plan(shape: ModelShape, recipe: WeightRecipe, wish: Wish) -> Plan:
    """Predict `wish` for a model of `shape` stored by `recipe`. InputError for a wish that makes no sense."""
    sensible = 0 <= wish.seconds < math.inf and wish.frames >= 0 and 0 < wish.window_s < math.inf
    if not sensible or (not wish.frames and not wish.seconds):
        raise InputError(
            f"a clip of {wish.seconds:g} s with {wish.frames} frames in windows of {wish.window_s:g} s can't "
            "be planned; expected lengths above 0"
        )
    entries = tensors(shape, recipe)
    tokens = _tokens(wish)
    held = {name: _resident(entries[name]) for name in GRAPHS}
    mapped = {name: graph_bytes(entries[name]).get("scales", 0) for name in GRAPHS}
    kv = _cache(shape, wish, tokens["total"])
    prompt = tokens["prompt"]
    decoding = _decoder_activations(shape, recipe, min(prompt, prefill_chunk(shape.hidden)), prompt)
    seeing = _vision_activations(shape, wish.grids)
    towers = held["vision"] + held["audio"]
    opening = max(mapped.values())
    logits = 4 * shape.vocab
    encode = PROCESS + towers + max(seeing, mapped["vision"])
    decode = PROCESS + held["decoder"] + kv + max(decoding, mapped["decoder"]) + logits
    if not wish.low_memory:
        encode += held["decoder"] + opening
        decode += towers
    memory = {
        "process": PROCESS,
        **held,
        "cache": kv,
        "activations": max(decoding, seeing),
        "peak": max(encode, decode),
    }
    disk = sum(tensor.size for graph in entries.values() for tensor in graph)
    return Plan(wish, recipe, disk, tokens, memory, shape.max_positions)


def _tokens(wish: Wish) -> dict[str, int]:
    video = TOKENS_PER_GRID * wish.grids
    audio = math.ceil(AUDIO_TOKENS_PER_S * wish.shown_s)
    prompt = video + audio + TEXT_TOKENS
    return {
        "video": video,
        "audio": audio,
        "text": TEXT_TOKENS,
        "prompt": prompt,
        "answer": wish.answer,
        "total": prompt + wish.answer,
    }


def _resident(graph: list[Any]) -> int:
    """The packed copy that ONNX Runtime's CPU kernels make: codes, scales, and a sum for every block."""
    kinds = graph_bytes(graph)
    return kinds.get("codes", 0) + 2 * kinds.get("scales", 0) + kinds.get("float", 0)


def _cache(shape: ModelShape, wish: Wish, tokens: int) -> int:
    width = 2 if wish.kv_dtype == "float16" else 4
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * width


def _decoder_activations(shape: ModelShape, recipe: WeightRecipe, chunk: int, total: int) -> int:
    floats = _MLP_WIDTHS * shape.intermediate + _WIDTHS * shape.hidden
    return 4 * chunk * floats + 4 * shape.heads * chunk * total


def _vision_activations(shape: ModelShape, grids: int) -> int:
    v = shape.vision
    floats = _MLP_WIDTHS * v["intermediate_size"] + _WIDTHS * v["hidden_size"]
    return 4 * grids * PATCHES * (floats + v["num_heads"] * PATCHES)


def nearest(
    shape: ModelShape, recipe: WeightRecipe, wish: Wish, *, fixed: bool = False
) -> tuple[Plan, list[str]] | None:
    """The plan closest to `wish` that fits, and what was changed; None when nothing does.

    Tried in the order of what a user notices least: encoders closed before the decoder opens, a cache of half
    precision, a wider block, a shorter window with its share of the frames, fewer frames. `fixed`: the bundle
    is made, so that its recipe and cache stay.
    """
    for changed_recipe, changed_wish, changes in _steps(recipe, wish, fixed):
        found = plan(shape, changed_recipe, changed_wish)
        if found.fits:
            return found, changes
    return None


def _steps(recipe: WeightRecipe, wish: Wish, fixed: bool) -> Iterator[tuple[WeightRecipe, Wish, list[str]]]:
    changes: list[str] = []
    yield recipe, wish, changes
    if not wish.low_memory:
        wish, changes = replace(wish, low_memory=True), [*changes, "encoders closed before the decoder opens"]
        yield recipe, wish, changes
    if wish.kv_dtype != "float16" and not fixed:
        wish, changes = replace(wish, kv_dtype="float16"), [*changes, "cache in float16"]
        yield recipe, wish, changes
    if recipe.bits != 32 and recipe.block < WIDE_BLOCK and not fixed:
        recipe = replace(recipe, block=WIDE_BLOCK, block8=max(WIDE_BLOCK, recipe.block8))
        changes = [*changes, f"block {WIDE_BLOCK}"]
        yield recipe, wish, changes
    window = min(wish.window_s, wish.seconds)
    shorter: list[str] = []
    while window > SHORTEST_WINDOW:
        half = max(SHORTEST_WINDOW, window / 2)
        frames = max(2, round(wish.frames * half / window))
        wish, window = replace(wish, window_s=half, frames=frames), half
        shorter = [f"windows of {half:g} s with {frames} frames"]
        yield recipe, wish, [*changes, *shorter]
    for fewer in (16, 10, 8, 6, 4, 2):
        if fewer < wish.frames:
            less = [f"windows of {window:g} s"] if shorter else []
            yield recipe, replace(wish, frames=fewer), [*changes, *less, f"{fewer} frames"]
