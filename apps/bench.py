"""`crab-edge bench`: what the unmerged adapters cost, beside the same decoder without them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

BASE = "no adapters"
# A decode step can't read weights faster than memory delivers; a faster one means that layers shared bytes.
_BANDWIDTH_TOLERANCE = 1.15
# Smaller graphs live in the caches, where the machine's memory bandwidth bounds nothing.
_CACHE_BYTES = 100_000_000


def command(
    shape: Annotated[
        list[str] | None, typer.Option("--shape", "-s", help="Decoder shapes: nano, 0.5b, 1.5b.")
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(help="How experts are stored: residual4x2, plane4, unfolded8. Default: all."),
    ] = None,
    block: Annotated[int, typer.Option(help="Weights per scale.")] = 32,
    accuracy_level: Annotated[int, typer.Option(help="4: int8 activations, 0: float32.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are printed.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps per round.")] = 60,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache while decoding.")] = 512,
    prefill: Annotated[int, typer.Option(min=1, help="Prompt length of the prefill timing.")] = 512,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all there are.")] = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Time `ask` on a clip instead, cold start included.")
    ] = False,
    batch: Annotated[
        bool,
        typer.Option(
            "--batch", help="Time `analyze` against a loop that shares nothing, two and five tasks."
        ),
    ] = False,
    clips: Annotated[int, typer.Option(min=1, help="With --batch: clips of ten seconds to make.")] = 200,
    media: Annotated[
        list[Path] | None, typer.Option(help="With --ask: the clip's files; default: the packaged clip.")
    ] = None,
    task: Annotated[str, typer.Option(help="With --ask: the task.")] = "ave",
    bundle: Annotated[
        Path | None,
        typer.Option(
            "--bundle", "-b", help="For --ask, --batch, --grammar's cost; default: the packaged one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the tables.")] = False,
) -> None:
    """Time random decoders with I-LoRA against the same graph without it and against the ratio of bytes."""
    from crab_edge.errors import CrabError, DependencyError, InputError

    threads = threads or len(os.sched_getaffinity(0))
    if ask:
        from crab_edge_apps import _bench_ask

        timed = _bench_ask.measure(media or [], task, bundle, threads, rounds)
        if as_json:
            print(json.dumps(timed))
        else:
            _bench_ask.show(timed)
        return
    if batch:
        _batch(clips, bundle, threads, as_json)
        return
    try:
        from crab_edge_apps._bench_decoder import SHAPES
    except ModuleNotFoundError as error:
        raise DependencyError(
            f"bench writes its graphs with the exporter, which needs {error.name}; "
            'install it with: pip install "crab-edge[export,cpu]"'
        ) from None
    names = shape or ["nano", "0.5b"]
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise InputError(f"--shape {unknown[0]}: expected one of {', '.join(SHAPES)}")
    results = []
    for name in names:
        variants = experts or ["residual4x2", "plane4", "unfolded8"]
        results.append(
            measure(
                SHAPES[name],
                variants,
                block=block,
                accuracy_level=accuracy_level,
                rounds=rounds,
                steps=steps,
                context=context,
                prefill=prefill,
                threads=threads,
            )
        )
        if not as_json:
            _print(results[-1])
    results += _grammar(bundle, as_json)
    if as_json:
        print(json.dumps(results))
    for result in results:
        if result.get("problems"):
            raise CrabError(f"bench {result['shape']}: {'; '.join(result['problems'])}")


def _batch(clips: int, bundle: Path | None, threads: int, as_json: bool) -> None:
    """`analyze` against the naive loop; CheckError names the bars that were missed."""
    from crab_edge_apps import _bench_batch
    from rich.console import Console
    from rich.progress import Progress

    from crab_edge.errors import CheckError

    with Progress(transient=True, console=Console(stderr=True)) as progress:
        bar = progress.add_task("clips, naive loop, whole runs")
        result = _bench_batch.measure(
            clips,
            bundle,
            threads,
            lambda done, of: progress.update(bar, completed=done, total=of),
        )
    if as_json:
        print(json.dumps(result))
    else:
        _bench_batch.show(result)
    missed = _bench_batch.problems(result)
    if missed:
        raise CheckError(f"bench --batch: {'; '.join(missed)}")


def _grammar(bundle: Path | None, as_json: bool) -> list[dict[str, Any]]:
    """What constrained answers cost for each token: [] without llguidance, which is then said."""
    from crab_edge_apps import _bench_grammar

    from crab_edge.errors import DependencyError

    try:
        result = _bench_grammar.measure(bundle)
    except DependencyError as error:
        print(f"--grammar's cost isn't measured: {error}", file=sys.stderr)
        return []
    if not as_json:
        _bench_grammar.show(result)
    return [{"grammar": result}]


def measure(
    shape: Any,
    variants: list[str],
    *,
    block: int,
    accuracy_level: int,
    rounds: int,
    steps: int,
    context: int,
    prefill: int,
    threads: int,
) -> dict[str, Any]:
    """All variants of one shape, interleaved, each run in its own process.

    Returns `rows` (variant, bytes per token, nodes, tokens/s, time and bytes against the base) and
    `problems`: what makes the figures untrustworthy, empty when nothing does.
    """
    from crab_edge_apps import _bench_decoder as graphs
    from rich.progress import Progress

    names = [BASE, *variants]
    with tempfile.TemporaryDirectory(prefix="crab-edge-bench-") as folder, Progress(transient=True) as bar:
        task = bar.add_task(f"{shape.name}: writing graphs", total=len(names) * (rounds + 1))
        paths, bytes_, nodes = {}, {}, {}
        for name in names:
            paths[name] = Path(folder) / f"{name.replace(' ', '-')}.onnx"
            graphs.write_decoder(
                shape,
                paths[name],
                adapters=name != BASE,
                experts="residual4x2" if name == BASE else name,
                block=block,
                accuracy_level=accuracy_level,
            )
            bytes_[name] = graphs.weight_bytes(paths[name])
            nodes[name] = graphs.node_count(paths[name])
            bar.advance(task)
        bandwidth = read_bandwidth(threads)
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        bar.update(task, description=f"{shape.name}: timing")
        for turn in range(rounds):
            # Every other round goes backwards, so that a drifting machine favours nobody.
            for name in names if turn % 2 == 0 else names[::-1]:
                runs[name].append(_worker(paths[name], threads, context, steps, prefill))
                bar.advance(task)
    rows, problems = [], []
    for name in names:
        decode = statistics.median(run["decode_s"] for run in runs[name])
        ratio = statistics.median(
            run["decode_s"] / base["decode_s"] for run, base in zip(runs[name], runs[BASE], strict=True)
        )
        first = statistics.median(
            run["prefill_s"] / base["prefill_s"] for run, base in zip(runs[name], runs[BASE], strict=True)
        )
        speed = bytes_[name] / decode
        loaded = statistics.median(run["loaded_bytes"] for run in runs[name])
        rows.append(
            {
                "variant": name,
                "weight_bytes": bytes_[name],
                "nodes": nodes[name],
                "decode_tokens_per_s": 1 / decode,
                "prefill_tokens_per_s": prefill / statistics.median(r["prefill_s"] for r in runs[name]),
                "decode_time_ratio": ratio,
                "prefill_time_ratio": first,
                "byte_ratio": bytes_[name] / bytes_[BASE],
                "gigabytes_per_s": speed / 1e9,
                "loaded_bytes": loaded,
            }
        )
        if bytes_[name] > _CACHE_BYTES and speed > _BANDWIDTH_TOLERANCE * bandwidth:
            problems.append(
                f"{name} reads {speed / 1e9:.1f} GB/s, more than the machine's {bandwidth / 1e9:.1f}"
            )
        if bytes_[name] > _CACHE_BYTES and loaded < 0.9 * bytes_[name]:
            problems.append(
                f"{name} loaded {loaded / 1e6:.0f} MB for {bytes_[name] / 1e6:.0f} MB of weights: "
                "layers share bytes"
            )
    return {
        "shape": shape.name,
        "block": block,
        "accuracy_level": accuracy_level,
        "threads": threads,
        "context": context,
        "prefill": prefill,
        "rounds": rounds,
        "read_gigabytes_per_s": bandwidth / 1e9,
        "rows": rows,
        "problems": problems,
    }


def read_bandwidth(threads: int, megabytes: int = 512) -> float:
    """Bytes per second that `threads` cores read from memory: best of a few passes over a large array."""
    import numpy as np

    part = np.ones(megabytes * 1_000_000 // 4 // threads, np.float32)
    parts = [part.copy() for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            best = max(best, threads * part.nbytes / (time.perf_counter() - start))
    return best


def _worker(path: Path, threads: int, context: int, steps: int, prefill: int) -> dict[str, float]:
    from crab_edge.errors import EngineError

    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "crab_edge_apps._bench_worker",
            str(path),
            *(str(n) for n in (threads, context, steps, prefill)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"{path.name}: the timing process ended with {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    title = (
        f"{result['shape']}: w4, block {result['block']}, level {result['accuracy_level']}, "
        f"{result['threads']} threads, context {result['context']}; "
        f"medians of {result['rounds']} interleaved rounds"
    )
    table = Table(title=title)
    for column in (
        "adapters",
        "MB / token",
        "nodes",
        "decode tok/s",
        "prefill tok/s",
        "bytes",
        "decode time",
        "prefill time",
        "GB/s",
    ):
        table.add_column(column, justify="left" if column == "adapters" else "right")
    for row in result["rows"]:
        table.add_row(
            row["variant"],
            f"{row['weight_bytes'] / 1e6:.1f}",
            str(row["nodes"]),
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            f"{row['byte_ratio']:.2f}x",
            f"{row['decode_time_ratio']:.2f}x",
            f"{row['prefill_time_ratio']:.2f}x",
            f"{row['gigabytes_per_s']:.1f}",
        )
    console = Console()
    console.print(table)
    console.print(f"memory read bandwidth of this machine: {result['read_gigabytes_per_s']:.1f} GB/s")
