"""`crab-edge score`: figures for predictions that someone else's code, or an earlier run, has written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crab_edge.errors import InputError

if TYPE_CHECKING:
    from ._results_table import Report


def score(
    predictions: Annotated[
        list[Path], typer.Argument(help="JSON-lines files: each record's fields and `predict`.")
    ],
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Their task; else the lines or the file's name say it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="AV-UIE v2 folder: records, true masks and pictures lie there.")
    ] = None,
    sam2: Annotated[
        Path | None, typer.Option(help="SAM 2's ONNX folder or checkpoint; masks come from GrabCut without.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table as Markdown.")] = None,
) -> None:
    """Score predictions in the official form: figures beside published ones and baselines."""
    from rich.console import Console

    from crab_edge import masks

    from . import _results_table as results_table

    with masks.using(weights=sam2):
        report = run(predictions, task, data, console=Console(stderr=True))
    results_table.publish(report, as_json=as_json, markdown_file=markdown)


def run(
    files: list[Path], name: str | None = None, data: Path | None = None, *, console: Any = None
) -> Report:
    """All of `score` but the printing. InputError for files, lines or folders that can't be used."""
    from crab_edge.tasks import get, scoring

    from . import _masks, _official
    from ._progress import counting
    from ._results_table import Report, scene_mix

    if name is not None:
        get(name)
    if data is not None and not data.is_dir():
        raise InputError(f"{data}: no such folder; --data takes the AV-UIE v2 folder")
    read = [(path, found) for path in files for found in _official.read(path, name, data)]
    report = Report(", ".join(path.name for path in files))
    _masks.check([found.task for _, found in read if not all(p.masks for p in found.predictions)])
    with counting(console) as progress:
        total = progress.add_task("scoring", total=sum(len(found.predictions) for _, found in read))
        for path, found in read:
            where = found.task.name if len(files) == 1 else f"{path.name} {found.task.name}"
            report.notes += [f"{where}: {note}" for note in found.notes]
            if not found.predictions:
                continue
            progress.update(total, description=found.task.name)
            told = found.predictions
            place = f"{found.task.name} {'test_' + found.variant if found.variant else 'test'}"
            if _masks.needed(found.task):
                told = _masks.completed(found.task, told, found.pictures, lambda: progress.advance(total))
            else:
                progress.advance(total, len(told))
            report.scores.append(scoring.score(found.task, told, found.variant))
            mix = scene_mix(prediction.record for prediction in told)
            if mix:
                report.mix[place] = mix
    if not report.scores:
        raise InputError(f"{report.bundle}: none of the records is scored")
    return report
