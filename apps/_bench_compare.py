"""The decoder benchmark: contenders that take turns, each run in a fresh process, and what they add up to.

Contenders are the random decoder without adapters, the same with I-LoRA in every form asked for, a bundle's
own decoder, and beside them the float model in torch and llama.cpp with a byte-matched LoRA.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crab_edge_apps import _bench_decoder as graphs
from crab_edge_apps._bench_memory import fresh_read_bandwidth, machine

from crab_edge.errors import DependencyError, EngineError, InputError
from crab_edge.memory import available_bytes

if TYPE_CHECKING:
    from crab_edge_apps._bench_bundle import BundleDecoder

BASE = "no adapters"
BUNDLE = "the bundle"
TORCH = "torch bf16, official formula"
LLAMA = "llama.cpp Q4_0"
LLAMA_LORA = "llama.cpp Q4_0 + LoRA"
#: Other runtimes that can take part, and what has to be importable for each.
OTHERS = {"torch": ("torch", "transformers", "peft"), "llama": ("llama_cpp", "gguf")}
FORMS = ("residual4x2", "plane4", "unfolded8")
#: Smaller graphs live in the caches, where the machine's memory bandwidth bounds nothing.
CACHE_BYTES = 100_000_000
# The bandwidth test reads one stream a thread, which a decoder's several streams may beat by a little.
_BANDWIDTH_TOLERANCE = 1.05
_SPARE_MEMORY = 1.2


@dataclass(frozen=True)
class Settings:
    """How a comparison is run. Sizes in tokens; `against` names the other runtimes, None = the installed."""

    block: int = 32
    accuracy_level: int = 4
    bits: int = 4
    kv_dtype: str = "float32"
    rounds: int = 5
    steps: int = 60
    context: int = 512
    prefill: int = 512
    threads: int = 1
    against: tuple[str, ...] | None = ()


@dataclass
class Contender:
    """One row to be: the module that times it and its arguments; `facts` go into the row as they are."""

    name: str
    module: str
    arguments: list[str]
    weight_bytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    runs: list[dict[str, float]] = field(default_factory=list)


Progress = Callable[[str, int, int], None]


def measure(
    shape: graphs.DecoderShape,
    forms: Sequence[str],
    settings: Settings,
    bundle: BundleDecoder | None = None,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """All contenders of one shape, interleaved.

    forms: how experts are stored, the first one is the headline that the others are compared with.
    Returns `rows`, `skipped` (contender -> why it isn't there), `bars` (see `_bench_bars`) and `problems`:
    what makes the figures untrustworthy, empty when nothing does. Raises InputError when the temporary
    folder has no room.
    """
    from crab_edge_apps._bench_bars import bars

    skipped: dict[str, str] = {}
    others = _installed(settings, skipped)
    host = machine(settings.threads)
    with tempfile.TemporaryDirectory(prefix="crab-edge-bench-") as folder:
        progress("writing graphs", 0, 1)
        contenders = _decoders(shape, forms, settings, Path(folder))
        if bundle is not None:
            contenders.append(_onnx(BUNDLE, bundle.graph, settings, {"bundle": bundle.identity}))
        contenders += _others(others, shape, contenders, settings, Path(folder), skipped)
        of, done = settings.rounds * len(contenders), 0
        bandwidths = []
        for turn in range(settings.rounds):
            bandwidths.append(fresh_read_bandwidth(settings.threads))
            # Every other round goes backwards, so that a drifting machine favours nobody.
            for contender in contenders if turn % 2 == 0 else contenders[::-1]:
                progress(contender.name, done, of)
                contender.runs.append(_run(contender))
                done += 1
        progress("done", of, of)
    rows = [_row(contender, contenders[0], max(bandwidths), settings) for contender in contenders]
    return {
        "shape": shape.name,
        "sizes": asdict(shape),
        **{name: value for name, value in asdict(settings).items() if name != "against"},
        "machine": host,
        "read_gigabytes_per_s": max(bandwidths) / 1e9,
        "read_gigabytes_per_s_spread": [min(bandwidths) / 1e9, max(bandwidths) / 1e9],
        "rows": rows,
        "skipped": skipped,
        "plain_linears": bundle.plain_linears if bundle else 0,
        "bars": bars(rows, block=settings.block),
        "problems": problems(rows, max(bandwidths)),
    }


def possible_forms(shape: graphs.DecoderShape, settings: Settings, asked: Sequence[str]) -> list[str]:
    """The forms of `asked` ("auto" is resolved), or, if nothing is asked, the exporter's choice and then
    all others that the shape allows. Raises InputError for one that was asked and isn't possible.
    """
    if not shape.rank:
        return []

    def resolve(form: str) -> str:
        return graphs.precision_of(shape, form, block=settings.block, bits=settings.bits).experts

    if asked:
        return list(dict.fromkeys(resolve(form) for form in asked))
    found = [resolve("auto")]
    for form in FORMS:
        try:
            found.append(resolve(form))
        except InputError:
            continue
    return list(dict.fromkeys(found))


def _decoders(
    shape: graphs.DecoderShape, forms: Sequence[str], settings: Settings, folder: Path
) -> list[Contender]:
    made = []
    for name in (BASE, *forms):
        path = folder / f"{name.replace(' ', '-')}.onnx"
        if made:
            # The adapters add less than half; the last part is for the other runtimes' files.
            _need_room(folder, round(1.5 * made[0].weight_bytes))
        graphs.write_decoder(
            shape,
            path,
            adapters=name != BASE,
            experts="auto" if name == BASE else name,
            block=settings.block,
            accuracy_level=settings.accuracy_level,
            bits=settings.bits,
            kv_dtype=settings.kv_dtype,  # type: ignore[arg-type]
        )
        made.append(_onnx(name, path, settings, {}))
    return made


def _onnx(name: str, path: Path, settings: Settings, facts: dict[str, Any]) -> Contender:
    facts = {"runtime": "onnxruntime", "nodes": graphs.node_count(path), **facts}
    arguments = [str(path), *_numbers(settings)]
    return Contender(name, "_bench_worker", arguments, graphs.weight_bytes(path), facts)


def _numbers(settings: Settings) -> list[str]:
    return [str(n) for n in (settings.threads, settings.context, settings.steps, settings.prefill)]


def _need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(
            f"{folder.parent}: the next graph needs {size / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "set TMPDIR to a larger disk, or name fewer --experts"
        )


def _installed(settings: Settings, skipped: dict[str, str]) -> list[str]:
    """The other runtimes that take part. One that is asked for but absent is an error, else it is skipped."""
    found = []
    for name, packages in OTHERS.items():
        if settings.against is not None and name not in settings.against:
            continue
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if absent and settings.against is not None:
            raise DependencyError(
                f"--against {name}: needs {absent[0]}, which isn't installed; "
                f"run `pip install 'crab-edge[{'bench' if name == 'llama' else 'train'}]'`"
            )
        if absent:
            skipped[name] = f"{absent[0]} isn't installed"
        else:
            found.append(name)
    return found


def _others(
    names: Sequence[str],
    shape: graphs.DecoderShape,
    ours: Sequence[Contender],
    settings: Settings,
    folder: Path,
    skipped: dict[str, str],
) -> list[Contender]:
    made: list[Contender] = []
    for name in names:
        made += (_torch if name == "torch" else _llama)(shape, ours, settings, folder, skipped)
    return made


def _torch(
    shape: graphs.DecoderShape,
    ours: Sequence[Contender],
    settings: Settings,
    folder: Path,
    skipped: dict[str, str],
) -> list[Contender]:
    size = 2 * shape.parameters()
    available = available_bytes()
    if available is not None and size * _SPARE_MEMORY > available:
        skipped["torch"] = f"its weights take {size / 1e9:.1f} GB, free memory is {available / 1e9:.1f}"
        return []
    arguments = [json.dumps(asdict(shape)), *_numbers(settings)]
    return [Contender(TORCH, "_bench_torch", arguments, size, {"runtime": "torch"})]


def _llama(
    shape: graphs.DecoderShape,
    ours: Sequence[Contender],
    settings: Settings,
    folder: Path,
    skipped: dict[str, str],
) -> list[Contender]:
    from crab_edge_apps import _bench_gguf
    from crab_edge_apps._bench_timing import capacity

    if any(width % _bench_gguf.BLOCK for pair in shape.linears().values() for width in pair):
        skipped["llama"] = f"Q4_0 needs widths that are multiples of {_bench_gguf.BLOCK}"
        return []
    _need_room(folder, round(1.5 * ours[0].weight_bytes))
    base = folder / "base.gguf"
    slots = capacity(settings.context, settings.steps, settings.prefill)
    size = _bench_gguf.write_base(shape, base, slots)
    facts = {"runtime": "llama.cpp"}
    made = [Contender(LLAMA, "_bench_llama", [str(base), "-", *_numbers(settings)], size, facts)]
    if len(ours) > 1:
        wanted = ours[1].weight_bytes - ours[0].weight_bytes
        lora = folder / "lora.gguf"
        added, rank = _bench_gguf.write_lora(shape, lora, wanted)
        facts = {
            **facts,
            "lora_rank": rank,
            "lora_type": "q8_0",
            "adapter_bytes": added,
            "adapter_byte_ratio": added / wanted,
        }
        arguments = [str(base), str(lora), *_numbers(settings)]
        made.append(Contender(LLAMA_LORA, "_bench_llama", arguments, size + added, facts))
    return made


def _run(contender: Contender) -> dict[str, float]:
    command = [sys.executable, "-m", f"crab_edge_apps.{contender.module}", *contender.arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{contender.name}: the timing process ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _row(contender: Contender, base: Contender, bandwidth: float, settings: Settings) -> dict[str, Any]:
    """One line of the table: medians over the rounds, and ratios taken round by round."""
    runs = contender.runs
    decode = statistics.median(run["decode_s"] for run in runs)
    prefills = [run["prefill_s"] for run in runs]

    def against(part: str) -> list[float]:
        return [run[part] / other[part] for run, other in zip(runs, base.runs, strict=True)]

    slower, first = against("decode_s"), against("prefill_s")
    byte_ratio = contender.weight_bytes / base.weight_bytes
    return {
        "variant": contender.name,
        **contender.facts,
        "weight_bytes": contender.weight_bytes,
        "decode_tokens_per_s": 1 / decode,
        "prefill_tokens_per_s": settings.prefill / statistics.median(prefills),
        "decode_time_ratio": statistics.median(slower),
        "decode_time_ratio_spread": [min(slower), max(slower)],
        "prefill_time_ratio": statistics.median(first),
        "prefill_time_ratio_spread": [min(first), max(first)],
        "byte_ratio": byte_ratio,
        "gigabytes_per_s": contender.weight_bytes / decode / 1e9,
        "bandwidth_share": contender.weight_bytes / decode / bandwidth,
        "loaded_bytes": statistics.median(run["loaded_bytes"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "runs": [{part: run[part] for part in ("decode_s", "prefill_s")} for run in runs],
    }


def problems(rows: Sequence[dict[str, Any]], bandwidth: float) -> list[str]:
    """Signs that a figure can't be true: weights read faster than memory delivers, or not in memory."""
    found = []
    for row in rows:
        size, loaded = row["weight_bytes"], row["loaded_bytes"]
        if size <= CACHE_BYTES:
            continue
        if row["gigabytes_per_s"] * 1e9 > _BANDWIDTH_TOLERANCE * bandwidth:
            found.append(
                f"{row['variant']} reads {row['gigabytes_per_s']:.1f} GB/s, more than the machine's "
                f"{bandwidth / 1e9:.1f}"
            )
        if loaded < 0.9 * size:
            found.append(
                f"{row['variant']} took {loaded / 1e6:.0f} MB of memory for {size / 1e6:.0f} MB of weights: "
                "layers share bytes"
            )
    return found


def of_bundle(bundle: BundleDecoder, settings: Settings) -> Settings:
    """`settings` with the bundle's own recipe."""
    recipe = bundle.recipe
    return replace(
        settings,
        bits=recipe.bits,
        block=recipe.block,
        accuracy_level=recipe.accuracy_level,
        kv_dtype=recipe.kv_dtype,
    )
