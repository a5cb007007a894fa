"""The machines an engine can be exported for: what each takes, and whether a recipe suits it.

Sources. TensorRT-RTX: tried with 1.7.1 (which compute capabilities, blocks and types its builder takes).
TensorRT: NVIDIA's documentation ("Quantization Schemes": INT4 in blocks of 64 or 128; INT8 by tensor or by
channel only) and release notes (plugins defined in Python since 10.6, compiled ahead of time since 10.9).
JetPack 6.2 brings TensorRT 10.3, JetPack 7.2 brings 10.16.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from crab_edge.errors import EngineError, InputError
from crab_edge.shape import ModelShape
from crab_edge.sizes import PLANES, WeightRecipe, data_bytes, graph_bytes, tensors

Kind = Literal["rtx", "tensorrt"]
Route = Literal["dequantize", "plugin"]

LIBRARIES: dict[Kind, str] = {"rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
LOWEST_SM = MappingProxyType({"fp16": 75, "bf16": 80, "int8": 75, "int4": 80, "fp8": 89, "fp4": 100})
"""The first compute capability (major * 10 + minor) that has a type."""
AHEAD_OF_TIME = "10.9"
"""The first TensorRT whose Python-defined plugins lie compiled in the engine."""

KERNEL_SMS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
"""Capabilities that the plugins' kernels are made for."""
_RTX_SMS = (75, 80, 86, 89, 120, 121)
_CUDA_SMS = (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
# What the low-bit kernels take: crab_edge.lowbit.BLOCKS.
_KERNEL_BLOCKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Target:
    """One kind of machine.

    kind: the library that builds and runs the engine. sm: the engine's compute capabilities, 10 * major +
    minor. min_tensorrt: the oldest release of that library. plugins: whether plugins compiled ahead of time
    exist there. int4_route: who owns 4-bit products by default: a `DequantizeLinear` before a `MatMul`, which
    the library fuses, or our plugin. blocks4, blocks8: widths of the blocks that the library's dequantising
    takes at 4 and 8 bits (none: such weights go to the plugin).
    """

    name: str
    kind: Kind
    sm: tuple[int, ...]
    min_tensorrt: str
    plugins: bool
    int4_route: Route
    blocks4: tuple[int, ...]
    blocks8: tuple[int, ...]
    machine: str

    @property
    def library(self) -> str:
        """The Python module of the library."""
        return LIBRARIES[self.kind]

    def route(self, bits: int, block: int, int4: Route | None = None) -> Route:
        """Who owns a product of `bits` in blocks of `block`.

        At 4 bits it is what was asked for (`int4`), else the target's own way, or, where the library doesn't
        take the block, the plugin; at 8 bits the library if it takes the block.
        """
        if bits == 4 and int4 is not None:
            return int4
        taken = self.blocks4 if bits == 4 else self.blocks8
        if not self.plugins or (block in taken and not (bits == 4 and self.int4_route == "plugin")):
            return "dequantize"
        return "plugin"

    def builds_here(self) -> bool:
        """Whether this machine can build the engine: the library is installed, and TensorRT's has its GPU.

        TensorRT-RTX builds without a GPU for every capability; TensorRT tunes on the very GPU it builds for.
        """
        if importlib.util.find_spec(self.library) is None:
            return False
        if self.kind == "rtx":
            return True
        from crab_edge.engines._cuda import driver

        try:
            found = driver().gpus()
        except EngineError:
            return False
        return bool(found) and found[0].sm in self.sm


def _rtx(name: str, sm: tuple[int, ...]) -> Target:
    blocks = (16, 32, 64, 128)
    machine = "a GPU of " + ", ".join(f"sm_{one}" for one in sm)
    return Target(name, "rtx", sm, "1.0", False, "dequantize", blocks, blocks, machine)


def _tensorrt(name: str, sm: int, int4_route: Route, machine: str) -> Target:
    return Target(name, "tensorrt", (sm,), AHEAD_OF_TIME, True, int4_route, (64, 128), (), machine)


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        one.name: one
        for one in (
            _rtx("rtx", (86, 89, 120)),
            # INT4 by DequantizeLinear hasn't been shown to work on Orin; an 8-bit one that Thor builds fails
            # there (NVIDIA/TensorRT#4832).
            _tensorrt("jetson-orin", 87, "plugin", "a Jetson Orin with JetPack 7.2 or newer"),
            _tensorrt("jetson-thor", 110, "dequantize", "a Jetson Thor with JetPack 7.2 or newer"),
            *(
                _tensorrt(f"cuda-sm{sm}", sm, "dequantize", f"a machine with a GPU of sm_{sm} and TensorRT")
                for sm in _CUDA_SMS
            ),
        )
    }
)


def target(name: str) -> Target:
    """The target of that name; `rtx-smNN` is TensorRT-RTX for one capability. InputError lists the names."""
    if name in TARGETS:
        return TARGETS[name]
    single = re.fullmatch(r"rtx-sm(\d+)", name)
    if single and int(single[1]) in _RTX_SMS:
        return _rtx(name, (int(single[1]),))
    known = ", ".join(n for n in TARGETS if not n.startswith("cuda"))
    raise InputError(
        f"--target {name}: no such target; choose one of: {known}, "
        f"rtx-smNN (NN one of {_numbers(_RTX_SMS)}), cuda-smNN (NN one of {_numbers(_CUDA_SMS)})"
    )


def partial_blocks(shape: ModelShape, recipe: WeightRecipe) -> list[tuple[str, int, int]]:
    """(linear, K, block) of the low-bit products whose K doesn't fill its last block."""
    if recipe.bits == 32:
        return []
    return [
        (name, width, block)
        for name, width, bits in _products(shape, recipe)
        if bits != 32 and width % (block := recipe.block_of(bits))
    ]


def check(
    target: Target,
    recipe: WeightRecipe,
    shape: ModelShape,
    *,
    compute: str = "fp16",
    kv: str = "fp16",
    int4: Route | None = None,
) -> None:
    """Raises one InputError that names everything about `recipe` that `target` can't take, and the command
    that makes a recipe it can.

    compute, kv: types of activations and of the key/value cache. int4: who is to own 4-bit products (None:
    the target's way). Encoder linears with partial blocks pass: the exporter fills them up with zeros.
    """
    problems = list(_problems(target, recipe, shape, compute, kv, int4))
    if not problems:
        return
    text = "; ".join(problem for problem, _ in problems)
    ways = dict.fromkeys(way for _, way in problems)
    raise InputError(f"--target {target.name}: {text}; {', '.join(ways)}")


def _problems(
    target: Target, recipe: WeightRecipe, shape: ModelShape, compute: str, kv: str, int4: Route | None
) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do) one by one."""
    lowest = min(target.sm)
    for what, kind in (("activations", compute), ("the key/value cache", kv)):
        needs = LOWEST_SM.get(kind)
        if needs is None or kind not in ("fp16", "bf16", "fp8"):
            yield f"{what} of type {kind}: expected fp16, bf16 or fp8", "choose fp16"
        elif lowest < needs:
            yield (
                f"{what} of type {kind} need sm_{needs}, the target has sm_{lowest}",
                f"choose fp16 for {what}",
            )
    bits = sorted({bits for _, _, bits in _products(shape, recipe)} - {32})
    if 4 in bits and lowest < LOWEST_SM["int4"]:
        yield (
            f"4-bit weights need sm_{LOWEST_SM['int4']}, the target has sm_{lowest}",
            "export the bundle with --bits 8 or 32",
        )
    if int4 == "plugin" and not target.plugins:
        yield (
            f"{target.library} has no plugins, 4-bit products can't go to one",
            "leave --int4 out",
        )
    yield from _block_problems(target, recipe, bits, int4)
    yield from _kernel_problems(target, recipe, bits, int4)
    yield from _seam_problems(shape, recipe)


def _block_problems(
    target: Target, recipe: WeightRecipe, bits: list[int], int4: Route | None
) -> Iterator[tuple[str, str]]:
    for width in bits:
        block = recipe.block_of(width)
        route = target.route(width, block, int4)
        if route == "plugin":
            taken, owner = _KERNEL_BLOCKS, "the plugin"
        else:
            taken = target.blocks4 if width == 4 else target.blocks8
            owner = target.library
        if block not in taken:
            where = f"{width}-bit weights in blocks of {block}: {owner} takes {_numbers(taken) or 'none'}"
            plugin = ", or leave --int4 dequantize out" if width == 4 and int4 == "dequantize" else ""
            yield where, f"export the bundle with --block {taken[-1] if taken else 128}{plugin}"


def _kernel_problems(
    target: Target, recipe: WeightRecipe, bits: list[int], int4: Route | None
) -> Iterator[tuple[str, str]]:
    owned = [width for width in bits if target.route(width, recipe.block_of(width), int4) == "plugin"]
    missing = sorted(set(target.sm) - set(KERNEL_SMS))
    if owned and missing and target.plugins:
        yield (
            f"{owned[0]}-bit weights go to the plugin, which has no kernel for sm_{missing[0]}, only for "
            f"{_numbers(KERNEL_SMS)}",
            "run the bundle with --engine onnxruntime",
        )


def _seam_problems(shape: ModelShape, recipe: WeightRecipe) -> Iterator[tuple[str, str]]:
    """Decoder products of partial blocks: nothing may follow a block that isn't full."""
    decoder = {name: (k, b) for name, k, b in partial_blocks(shape, recipe) if not _tower(name)}
    if decoder:
        listed = ", ".join(f"{name} (K={k}, block {b})" for name, (k, b) in decoder.items())
        widths = [k for name, k, bits in _products(shape, recipe) if bits != 32 and not _tower(name)]
        whole = [block for block in (128, 64, 32, 16) if not any(width % block for width in widths)]
        way = f"export the bundle with --block {whole[0]}" if whole else "export the bundle with --bits 32"
        yield f"partial blocks in {listed}", way


def _tower(name: str) -> bool:
    return name.startswith(("vision.", "audio."))


def _products(shape: ModelShape, recipe: WeightRecipe) -> Iterator[tuple[str, int, int]]:
    """(name, K, bits) of every kind of product."""
    for name, _, k in shape.decoder_linears:
        yield name, k, recipe.bits
        if shape.adapter is not None:
            yield f"{name}.router", k, recipe.adapter_bits
            bits = recipe.bits if recipe.experts in PLANES else recipe.adapter_bits
            yield f"{name}.experts", shape.adapter.rank * shape.adapter.experts, bits
    yield "lm_head", shape.hidden, recipe.head_bits
    v, a = shape.vision, shape.audio
    pixels = v["in_channels"] * v["temporal_patch_size"] * v["patch_size"] ** 2
    widths = {
        "vision.patch_embed": pixels,
        "vision.attn": v["hidden_size"],
        "vision.mlp.down": v["intermediate_size"],
        "vision.merger": v["hidden_size"] * v["spatial_merge_size"] ** 2,
        "audio.attn": a["d_model"],
        "audio.fc2": a["encoder_ffn_dim"],
    }
    for name, k in widths.items():
        yield name, k, recipe.tower_bits


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


@dataclass(frozen=True)
class Estimate:
    """Bytes. engines: the weights of all engines together, as stored. build: memory at most while the
    largest is built. run: memory of a process with all engines, the key/value cache and activations.
    """

    engines: int
    build: int
    run: int

    def lines(self) -> list[str]:
        """For people, one line a figure."""
        return [
            f"engines about {self.engines / 1e9:.2f} GB",
            f"building takes about {self.build / 1e9:.2f} GB of memory",
            f"running takes about {self.run / 1e9:.2f} GB",
        ]


# A build holds the file's weights, the network's copy of them and the engine that is being written.
_COPIES = 3
# CUDA's and the library's own memory, in a process that builds and one that runs.
_LIBRARY = 1_000_000_000
_HALF = 2


def memory_estimate(
    target: Target,
    recipe: WeightRecipe,
    shape: ModelShape,
    *,
    cache: int = 4096,
    prefill: int = 512,
    workspace: int = 1 << 30,
) -> Estimate:
    """What building and running the engines takes, by arithmetic.

    cache: capacity of the key/value cache in tokens (Smax). prefill: the most tokens of one pass. workspace:
    bytes that the builder may use for a layer. Scales and floats count 2 bytes where the bundle has 4.
    """
    entries = tensors(shape, recipe)
    sizes = {name: _stored(graph_bytes(entries[name])) for name in ("decoder", "vision", "audio")}
    engines = sum(sizes.values())
    read = max(data_bytes(entries[name]) for name in sizes)
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * cache * _HALF
    # Gate, up and their product at once, beside three states of the hidden width, and the attention's scores.
    states = prefill * _HALF * (3 * shape.intermediate + 3 * shape.hidden)
    scores = shape.heads * prefill * cache * _HALF
    run = engines + kv + states + scores + 4 * shape.vocab + _LIBRARY
    build = read + (_COPIES - 1) * max(sizes.values()) + workspace + _LIBRARY
    if target.kind == "tensorrt":
        # It times tactics, so the engine's memory at run time is taken as well.
        build += kv + states + scores
    return Estimate(engines, build, run)


def _stored(kinds: dict[str, int]) -> int:
    """Bytes of an engine's weights: the bundle's codes, scales and floats as 16 bits."""
    return kinds.get("codes", 0) + (kinds.get("scales", 0) + kinds.get("float", 0)) // 2
