"""Engines for targets out of a bundle: a new bundle with `engines/<target>/`; the bundle given is only read.

A target that this machine can build for gets engine files. For another one everything is written that doesn't
take that machine: the graphs, the plugins' kernels and what `crab-edge build-engine` needs to finish there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from crab_edge.bundle import Bundle, BundleWriter
from crab_edge.engines._tensorrt_check import IN_PLACE, INSTALL, numbers
from crab_edge.errors import BundleError, InputError
from crab_edge.manifest import ENGINES, EngineGraph, EngineInfo, EngineProfile, Manifest, TensorInfo
from crab_edge.memory import available_bytes
from crab_edge.shape import ModelShape
from crab_edge.sizes import WeightRecipe, of_manifest

from . import device_package
from .engine_build import Job, build_apart
from .graph import GraphBuilder
from .plugin_nodes import Product
from .plugin_products import PluginProducts
from .targets import Estimate, Route, Target, check, memory_estimate, target
from .tensorrt_graph import rewrite_audio, rewrite_decoder, rewrite_vision
from .tensorrt_products import Products
from .tensorrt_source import Source

Progress = Callable[[str, float], None]
GRAPHS: tuple[Literal["vision", "audio", "decoder"], ...] = ("vision", "audio", "decoder")
CAPACITY = 2048
"""Tokens of a cache by default: ten seconds with both streams take about 650, a question and answer 300."""
WORKSPACE = 1 << 30
PREFILL, DECODE = (1, 256, 512), (1, 1, 8)
"""Tokens of one pass: smallest, tuned for, largest. A longer prompt goes through in parts."""
FRAME_PATCHES = 256
FRAMES, CHUNKS = (1, 5, 32), (1, 5, 32)
"""Pairs of frames, and two-second chunks of sound, of one pass; ten seconds are five of each."""
# Graphs below this keep their weights inside.
_INSIDE = 64 << 20
_DTYPES = {1: "float32", 10: "float16", 7: "int64", 6: "int32"}


@dataclass(frozen=True)
class EngineOptions:
    """targets: names (`export.targets`); capacity: tokens of the cache; workspace: bytes that a layer may use
    while it runs; int4: who owns 4-bit products, None: the target's way.
    """

    targets: tuple[str, ...]
    capacity: int = CAPACITY
    workspace: int = WORKSPACE
    int4: Route | None = None


def check_targets(
    options: EngineOptions, recipe: WeightRecipe, shape: ModelShape
) -> list[tuple[Target, Estimate]]:
    """The targets with what their engines take. InputError for unknown names, settings that a target can't
    take, and where building here would need more memory than there is.
    """
    if not 64 <= options.capacity <= shape.max_positions:
        raise InputError(
            f"--capacity: expected 64 to {shape.max_positions} (the model's positions), "
            f"got {options.capacity}"
        )
    found = []
    memory = available_bytes()
    for name in dict.fromkeys(options.targets):
        one = target(name)
        check(one, recipe, shape, int4=options.int4)
        needs = memory_estimate(
            one, recipe, shape, cache=options.capacity, prefill=PREFILL[2], workspace=options.workspace
        )
        if memory is not None and one.builds_here() and needs.build > memory:
            raise InputError(
                f"--target {name}: building takes about {needs.build / 1e9:.2f} GB of memory, but "
                f"{memory / 1e9:.2f} GB are available; close other programs, or build on a machine with more"
            )
        found.append((one, needs))
    return found


def add_engines(
    bundle: Path | str,
    out: Path | str,
    options: EngineOptions,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Publishes `out`: what is in `bundle`, with engines for the targets, those it had for them replaced.

    progress: what is being done, and the share that is done; report: gets the estimate of each target and,
    where it can't be built here, the command that builds it. Returns the path of the new bundle.
    Raises InputError, BundleError, or EngineError when a build fails; then nothing is published.
    """
    opened = Bundle.open(bundle)
    sizes = of_manifest(opened.manifest)
    if sizes is None:
        raise BundleError(
            f"{opened.path}: says nothing of its sizes (an old bundle of a model of its own); export it again"
        )
    shape, recipe = sizes
    targets = check_targets(options, recipe, shape)
    with BundleWriter(out, overwrite) as writer:
        _check_disk(writer.out, opened.manifest, [needs for _, needs in targets])
        for one, needs in targets:
            report(f"{one.name}: {', '.join(needs.lines())}; a cache of {options.capacity} tokens")
        _take_files(opened, writer, [one.name for one, _ in targets])
        engines = dict(opened.manifest.engines)
        for number, (one, _) in enumerate(targets):
            say = _part(progress, number, len(targets))
            engines[one.name] = _Writing(opened, one, options, writer, say).info()
            if not engines[one.name].built:
                report(f"{one.name}: {_elsewhere(one, engines[one.name].build_command)}")
        manifest = opened.manifest.model_copy(update={"engines": engines, "created": ""})
        return writer.commit(manifest)


class _Writing:
    """One target's graphs and engines."""

    def __init__(
        self, opened: Bundle, one: Target, options: EngineOptions, writer: BundleWriter, say: Progress
    ) -> None:
        self.opened = opened
        self.target = one
        self.options = options
        self.writer = writer
        self.say = say
        self.folder = f"{ENGINES}/{one.name}"
        self.built = one.builds_here()
        self.kernels: dict[str, Product] = {}
        self.nodes: dict[str, int] = {}

    def info(self) -> EngineInfo:
        """Writes everything; what the manifest says of it."""
        with tempfile.TemporaryDirectory(
            prefix=f".{self.writer.out.name}.graphs.", dir=self.writer.out.parent
        ) as at:
            place = Path(at) if self.built else self.writer.path(f"{self.folder}/graph").parent
            graphs = {}
            for number, name in enumerate(GRAPHS):
                self.say(f"{self.target.name}: rewriting the {name} graph", number / 6)
                graphs[name] = self._rewrite(name, place)
            digests = self._package(place)
            least = numbers(self.target.min_tensorrt)
            if self.target.kind == "tensorrt":
                least = max(least, IN_PLACE)
            version = ".".join(map(str, least))
            if self.built:
                version = self._build(graphs, place)
        one = self.target
        file = "engine" if self.built else "onnx"
        return EngineInfo(
            kind=one.kind,
            library=one.library,  # type: ignore[arg-type]
            version=version,
            sm=list(one.sm),
            capacity=self.options.capacity,
            plugins=digests,
            graphs={
                name: graph.model_copy(update={"file": f"{self.folder}/{name}.{file}"})
                for name, graph in graphs.items()
            },
            built=self.built,
            build_command=self._command(),
        )

    def _command(self) -> str:
        if not self.built:
            return device_package.build_command(self.target.name)
        return f"crab-edge export --bundle BUNDLE --target {self.target.name} --out NEW_BUNDLE"

    def _rewrite(self, name: Literal["vision", "audio", "decoder"], place: Path) -> EngineGraph:
        """The graph as `name.onnx` in the folder `place`, with its inputs, outputs and profiles."""
        path = place / f"{name}.onnx"
        source = Source(self.opened.graph(name))
        files = self.opened.manifest.files
        stored = sum(info.size for file, info in files.items() if file.startswith(f"{name}.onnx"))
        graph = GraphBuilder(name, path.with_name(f"{path.name}.data") if stored > _INSIDE else None)
        products = PluginProducts(self.target, self.options.int4) if self.target.plugins else Products()
        if name == "decoder":
            rewrite_decoder(source, graph, products, self.options.capacity)
        else:
            {"vision": rewrite_vision, "audio": rewrite_audio}[name](source, graph, products)
        graph.save(path)
        if isinstance(products, PluginProducts):
            self.kernels |= products.kernels
            self.nodes[name] = products.nodes.count
        return describe(graph, name, path.name, self.options.capacity, self.folder)

    def _package(self, place: Path) -> dict[str, str]:
        """Kernels, and what the machine that builds needs; their SHA-256 by name."""
        if self.built and not self.target.plugins:
            return {}
        kernels = None
        if self.kernels:
            from .plugin_compile import compile_products

            def compiling(what: str, share: float) -> None:
                self.say(f"{self.target.name}: {what}", 0.5 + share / 2)

            kernels = compile_products(self.kernels.values(), self.target.sm[0], compiling)
        return device_package.write(place, self.target, self.nodes, kernels, self.options.workspace)

    def _build(self, graphs: dict[Literal["vision", "audio", "decoder"], EngineGraph], place: Path) -> str:
        """The engines; the library's version."""
        version = ""
        for number, (name, graph) in enumerate(graphs.items()):
            self.say(f"{self.target.name}: building the {name} engine", 0.5 + number / 6)
            source, count = place / f"{name}.onnx", self.nodes.get(name, 0)
            job = Job(
                self.target.library,
                source,
                self.writer.path(f"{self.folder}/{name}.engine"),
                graph,
                self.target.sm,
                self.options.workspace,
                place / device_package.KERNELS if count else None,
                count,
            )
            version = build_apart(job)
            for used in place.glob(f"{source.name}*"):
                used.unlink()
        return version


def describe(graph: GraphBuilder, name: str, file: str, capacity: int, folder: str) -> EngineGraph:
    """A rewritten graph as the manifest has it."""
    axes: dict[str, dict[str, tuple[int, int, int]]] = {
        "vision": {"frames": {"patches": _times(FRAMES, FRAME_PATCHES)}},
        "audio": {"chunks": {"chunks": CHUNKS}},
        "decoder": {"prefill": {"S": _below(PREFILL, capacity)}, "decode": {"S": DECODE}},
    }[name]
    outputs = [_tensor(value) for value in graph.outputs]
    caches = [one.name for one in outputs if one.name.startswith("present.")]
    return EngineGraph(
        file=f"{folder}/{file}",
        inputs=[_tensor(value) for value in graph.inputs],
        outputs=outputs,
        aliases={cache: cache.replace("present.", "past.", 1) for cache in caches},
        profiles=[EngineProfile(name=profile, axes=bounds) for profile, bounds in axes.items()],
    )


def _tensor(value: onnx.ValueInfoProto) -> TensorInfo:
    kind = value.type.tensor_type
    shape: list[int | str] = [axis.dim_param or axis.dim_value for axis in kind.shape.dim]
    return TensorInfo(name=value.name, dtype=_DTYPES[kind.elem_type], shape=shape)  # type: ignore[arg-type]


def _times(bounds: tuple[int, int, int], factor: int) -> tuple[int, int, int]:
    low, tuned, high = bounds
    return low * factor, tuned * factor, high * factor


def _below(bounds: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
    low, tuned, high = bounds
    return low, min(tuned, limit), min(high, limit)


def _elsewhere(one: Target, command: str) -> str:
    """What to do about a target that this machine can't build for."""
    if one.kind == "rtx":
        return f"can't be built here, {one.library} isn't installed; {INSTALL[one.library]}, then: {command}"
    return f"can't be built here; on {one.machine} run: {command}"


def _part(progress: Progress | None, number: int, count: int) -> Progress:
    """Progress of one of `count` equal parts."""

    def say(what: str, share: float) -> None:
        if progress is not None:
            progress(what, (number + share) / count)

    return say


def _take_files(opened: Bundle, writer: BundleWriter, replaced: Sequence[str]) -> None:
    """The bundle's files but the engines that are made anew."""
    skipped = tuple(f"{ENGINES}/{name}/" for name in replaced)
    for name in opened.manifest.files:
        if not name.startswith(skipped):
            device_package.take(opened.path / name, writer.path(name))


def _check_disk(out: Path, manifest: Manifest, estimates: Sequence[Estimate]) -> None:
    """InputError unless the bundle, all engines and one target's graphs beside them fit."""
    engines = [needs.engines for needs in estimates]
    needed = manifest.total_size + sum(engines) + max(engines, default=0)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise InputError(
            f"{out.parent}: the engines need {needed / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
            "make room or choose another --out"
        )
