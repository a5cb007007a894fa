"""`crab-edge evaluate`: runs test lists through the real runtime, prints figures beside their baselines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crab_edge.errors import CheckError, InputError

if TYPE_CHECKING:
    from crab_edge.avuie import Split, TestRecord
    from crab_edge.tasks import Task

    from ._results_table import Report

DEFAULT_OUT = Path("evaluation")


def render_command(count: int, folder: str = "AVUIE_2") -> str:
    """The command that renders test scenes in the layout that `evaluate` reads."""
    return f"crab-edge scenes render --out {folder} --count {count}"


def evaluate(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder; the packaged one by default.")] = None,
    data: Annotated[Path | None, typer.Option(help="AV-UIE v2 folder: TASK/test*.json and media.")] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="A task, or several with commas; all by default.")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Second bundle, compared sample by sample.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first records of each list.")] = None,
    sam2: Annotated[
        Path | None, typer.Option(help="SAM 2's ONNX folder or checkpoint; masks come from GrabCut without.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Predictions go here; a second run goes on where it stopped.")
    ] = DEFAULT_OUT,
    engine: Annotated[
        str, typer.Option(help="Engine, and how: onnxruntime, onnxruntime:cuda, tensorrt, torch:cuda.")
    ] = "auto",
    grammar: Annotated[
        bool,
        typer.Option(
            "--grammar/--no-grammar", help="Hold answers to their task's form, or let the model talk."
        ),
    ] = True,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out records whose media are missing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 3 when a figure misses its bar.")] = False,
    render: Annotated[
        int | None, typer.Option(min=1, help="Without --data: print the command that renders N scenes.")
    ] = None,
) -> None:
    """Measure a bundle on test lists: figures, published ones, baselines, unparsable answers, time."""
    from rich.console import Console

    from crab_edge import masks

    if data is None:
        if render is not None:
            typer.echo(render_command(render))
            return
        command = render_command(300)
        raise InputError(f"no test lists given; name their folder with --data, or render them with {command}")
    chosen = [name.strip() for part in task or [] for name in part.split(",") if name.strip()]
    report = masks.using(weights=sam2)(run)(
        bundle,
        data,
        chosen,
        against=against,
        limit=limit,
        out=out,
        engine=engine,
        grammar=grammar,
        skip_missing=skip_missing,
        console=Console(stderr=True),
    )
    from . import _results_table as results_table

    results_table.publish(report, as_json=as_json, markdown_file=markdown)
    if check and report.loss_met is False:
        lost = -report.differences[results_table.POOLED].points
        raise CheckError(
            f"{report.bundle} loses {lost:.2f} points against {report.against}, "
            f"expected at most {results_table.MOST_LOSS:g}"
        )
    if check and report.below:
        score, line = report.below[0]
        reached = f"{line.figure.value:.1f} %, expected {line.bar.text() if line.bar else ''}"
        more = f" (and {len(report.below) - 1} more)" if len(report.below) > 1 else ""
        raise CheckError(f"{score.task} {score.split}: {line.figure.name} is {reached}{more}")


def run(
    bundle: Path | None,
    data: Path,
    names: list[str],
    *,
    against: Path | None = None,
    limit: int | None = None,
    out: Path = DEFAULT_OUT,
    engine: str = "auto",
    grammar: bool = True,
    skip_missing: bool = False,
    console: Any = None,
) -> Report:
    """All of `evaluate` but the printing: reads every list first, then runs the models one after the other.

    Predictions land in `out/<bundle's identity>+grammar/inference_<task>.jsonl`, without `grammar` in
    `...+free`. `names` empty = every task; a task whose list is absent is reported as absent.
    InputError for a missing folder or media file, and when none of `names` has a list; DependencyError when
    masks are needed and can't be made.
    """
    from crab_edge.avuie import check_media

    from . import _masks
    from ._results_table import Report, scene_mix

    chosen, absent = _read(data, names, limit)
    if not skip_missing:
        check_media([split for _, split in chosen])
    _masks.check([task for task, _ in chosen])
    identity, scores, per_sample = _measure(bundle, chosen, out, engine, console, grammar)
    report = Report(identity, scores, absent)
    for _, split in chosen:
        missing = sum(bool(record.missing) for record in split.records)
        if missing:
            report.missing[f"{split.task} {split.name}"] = missing
        mix = scene_mix(record.fields for record in split.records)
        if mix:
            report.mix[f"{split.task} {split.name}"] = mix
    if against is not None:
        report.against, _, other = _measure(against, chosen, out, engine, console, grammar)
        _compare(report, per_sample, other)
    return report


def _read(data: Path, names: list[str], limit: int | None) -> tuple[list[tuple[Task, Split]], list[str]]:
    from crab_edge import tasks
    from crab_edge.avuie import read_split, splits

    if not data.is_dir():
        raise InputError(f"{data}: no such folder; render test lists with {render_command(300, str(data))}")
    chosen, absent = [], []
    for task in [tasks.get(name) for name in dict.fromkeys(names)] or tasks.all():
        lists = splits(data, task)
        if not lists:
            absent.append(task.name)
        chosen += [(task, read_split(path, task, limit=limit)) for path in lists]
    if names and not chosen:
        command = render_command(300, str(data))
        raise InputError(f"{data / absent[0]}: no test*.json; render it with {command}")
    if not any(split.records for _, split in chosen):
        raise InputError(f"{data}: no test records; render them with {render_command(300, str(data))}")
    return chosen, absent


Scores = dict[str, dict[str, float]]


def _measure(
    bundle: Path | None,
    chosen: list[tuple[Task, Split]],
    out: Path,
    engine: str,
    console: Any,
    grammar: bool = True,
) -> tuple[str, list[Any], Scores]:
    """The bundle's identity, its scores by list, and every sample's score by list and record."""
    import crab_edge
    from crab_edge.tasks.scoring import score

    from . import _masks
    from ._predictions import collect, file_name, run_split
    from ._progress import counting

    model = crab_edge.load(bundle, engine=engine)
    identity = str(model.bundle.identity)
    if grammar:
        model.grammars()
    folder = out / re.sub(r"[^\w.@+-]+", "_", identity + ("+grammar" if grammar else "+free"))
    identity += "" if grammar else ", not held to forms"
    found, per_sample = [], {}
    with counting(console) as progress:
        total = progress.add_task(f"{identity}", total=sum(len(split.records) for _, split in chosen))
        for task, split in chosen:
            progress.update(total, description=f"{task.name} {split.name}")
            path = folder / file_name(task.name, split.variant)
            predictions = run_split(model, split, path, lambda: progress.advance(total), grammar=grammar)
            pairs = collect(split, predictions.rows)
            if pairs:
                told = [prediction for _, prediction in pairs]
                if _masks.needed(task):
                    progress.update(total, description=f"{task.name} {split.name}, masks")
                    told = _masks.completed(task, told, [_picture(record) for record, _ in pairs])
                result = score(task, told, split.variant)
                found.append(result)
                keys = [record.key for record, _ in pairs]
                per_sample[f"{task.name} {split.name}"] = dict(zip(keys, result.scores, strict=True))
    return identity, found, per_sample


def _picture(record: TestRecord) -> Path | None:
    return next((path for path, kind in record.media if kind == "image"), None)


def _compare(report: Report, first: Scores, second: Scores) -> None:
    """Paired differences per list and pooled over all of them."""
    from crab_edge.tasks.metrics.paired import paired_difference

    from ._results_table import POOLED

    pooled: list[tuple[float, float]] = []
    for name, scores in first.items():
        other = second.get(name, {})
        pairs = [(score, other[key]) for key, score in scores.items() if key in other]
        if pairs:
            report.differences[name] = paired_difference(*zip(*pairs, strict=True))
            pooled += pairs
    if pooled:
        report.differences[POOLED] = paired_difference(*zip(*pooled, strict=True))
