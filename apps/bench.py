"""`crab-edge bench`: what the unmerged adapters cost, beside the same decoder without them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from crab_edge_apps._bench_compare import Settings


def command(
    target: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="Compare this bundle's decoder, and random ones of its shape and recipe. With --gpu: this "
            "bundle through every engine that runs on the GPU.",
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            "-s",
            help="Random decoders: nano, 0.5b, 1.5b, 3b, 7b (with --gpu: nano, 3b, 7b). Default: nano and "
            "0.5b; with --gpu 7b, 3b and nano.",
        ),
    ] = None,
    experts: Annotated[
        list[str] | None,
        typer.Option(
            help="How experts are stored: auto, residual4x2, plane4, unfolded8; the first is the one that "
            "others are compared with. Default: all that the shape allows, for 3b, 7b and a bundle its own; "
            "with --gpu residual4x2 and unfolded8."
        ),
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Weights per scale. Default: 32; with --gpu 128 where the widths allow it."),
    ] = None,
    accuracy_level: Annotated[int, typer.Option(help="4: int8 activations, 0: float32.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; medians are printed.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps per round.")] = 60,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens in the cache while decoding. Default: 512; with --gpu 1024."),
    ] = None,
    prefill: Annotated[
        int | None,
        typer.Option(min=2, help="Prompt length of the prefill timing. Default: 512; with --gpu 650."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all there are.")] = None,
    gpu: Annotated[
        bool,
        typer.Option(
            "--gpu",
            help="On a GPU: the official formula in torch, eager and compiled, against the torch engine's "
            "kernels.",
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="With --gpu: cuda, cuda:1, or cpu for a dry run whose figures mean nothing.")
    ] = "cuda",
    plot: Annotated[
        Path | None, typer.Option(help="With --gpu: draw the shares of bandwidth into this PNG.")
    ] = None,
    tiles: Annotated[
        bool,
        typer.Option(
            "--tiles", help="With --gpu: try other tiles for the decode kernels instead, and print the best."
        ),
    ] = False,
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
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="Other runtimes beside ours: torch, llama (llama-cpp-python) or none. "
            "Default: those that are installed."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 3 when a bar is missed.")] = False,
) -> None:
    """Time decoders with I-LoRA against the same graph without it, the ratio of bytes and other runtimes."""
    from crab_edge.errors import CrabError, DependencyError, InputError

    if gpu:
        from crab_edge_apps import _bench_gpu

        if plot is not None and target is not None and not shape:
            raise InputError("--plot draws random decoders: add --shape")
        chosen = {"forms": tuple(experts or ()), "block": block, "context": context, "prefill": prefill}
        settings_ = _bench_gpu.settings(device, rounds, **chosen)
        if tiles:
            others = (target, plot, context, prefill, check or None)
            if any(other is not None for other in others) or len(experts or ()) > 1:
                raise InputError(
                    "--tiles takes --shape, one --experts, --block, --rounds, --device and --json alone"
                )
            _bench_gpu.tiles_command(shape or ["7b"], settings_, device, as_json=as_json)
            return
        names = shape or ([] if target else ["7b", "3b", "nano"])
        _bench_gpu.command(names, settings_, device, bundle=target, as_json=as_json, check=check, plot=plot)
        return
    for name, given in (("--plot", plot is not None), ("--device", device != "cuda"), ("--tiles", tiles)):
        if given:
            raise InputError(f"{name} goes with --gpu")
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
    from crab_edge_apps._bench_compare import Settings

    names = shape or ([] if target else ["nano", "0.5b"])
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise InputError(f"--shape {unknown[0]}: expected one of {', '.join(SHAPES)}")
    settings = Settings(
        block=block or 32,
        accuracy_level=accuracy_level,
        rounds=rounds,
        steps=steps,
        context=context or 512,
        prefill=prefill or 512,
        threads=threads,
        against=_runtimes(against),
    )
    results = [_compare(target, experts or [], settings, as_json)] if target else []
    results += [_compare(SHAPES[name], experts or [], settings, as_json) for name in names]
    missed = [bar for result in results for bar in result["bars"] if bar["met"] is False]
    results += [] if target or shape else _grammar(bundle, as_json)
    if as_json:
        print(json.dumps(results))
    for result in results:
        if result.get("problems"):
            raise CrabError(f"bench {result['shape']}: {'; '.join(result['problems'])}")
    _check(missed if check else [])


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


def _compare(what: Any, experts: list[str], settings: Settings, as_json: bool) -> dict[str, Any]:
    """One comparison: of a bundle (its path) or of a random decoder (its shape). The table is printed."""
    from crab_edge_apps import _bench_bars, _bench_bundle, _bench_compare
    from rich.console import Console
    from rich.progress import Progress

    bundle = None
    if isinstance(what, Path):
        bundle = _bench_bundle.open_decoder(what)
        settings = _bench_compare.of_bundle(bundle, settings)
        experts = experts or [bundle.recipe.experts]
        what = bundle.shape
    elif not experts and what.name in ("3b", "7b"):
        experts = ["auto"]
    forms = _bench_compare.possible_forms(what, settings, experts)
    with Progress(transient=True, console=Console(stderr=True)) as bar:
        task = bar.add_task(what.name)
        result = _bench_compare.measure(
            what,
            forms,
            settings,
            bundle,
            lambda doing, done, of: bar.update(
                task, description=f"{what.name}: {doing}", completed=done, total=of
            ),
        )
    if not as_json:
        _bench_bars.show(result)
    return result


def _runtimes(against: list[str] | None) -> tuple[str, ...] | None:
    """`--against` as `Settings` takes it; None = whatever is installed."""
    from crab_edge_apps._bench_compare import OTHERS

    from crab_edge.errors import InputError

    if against is None:
        return None
    unknown = sorted(set(against) - {*OTHERS, "none"})
    if unknown or ("none" in against and len(set(against)) > 1):
        raise InputError(
            f"--against {' '.join(against)}: expected {', '.join(OTHERS)}, any of them, or none alone"
        )
    return tuple(name for name in against if name != "none")


def _check(missed: list[dict[str, Any]]) -> None:
    """CheckError that names the bars in `missed`."""
    from crab_edge.errors import CheckError

    if missed:
        said = (f"{bar['variant']}: {bar['bar']} {bar['value']:.3f}, bar {bar['limit']:g}" for bar in missed)
        raise CheckError(f"bench: {'; '.join(said)}")
