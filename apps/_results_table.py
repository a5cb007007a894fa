"""Figures as a table: for the terminal, as Markdown, as plain data, with the mix of their scenes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from crab_edge import tasks
from crab_edge.errors import TaskError
from crab_edge.tasks.metrics import Figure
from crab_edge.tasks.metrics.paired import Difference
from crab_edge.tasks.scoring import Line, PublishedFigure, SplitScore, published

from ._scene_mix import scene_mix as scene_mix

HEADINGS = (
    *("task", "list", "figure", "value", "published", "baseline", "bar"),
    *("samples", "classes", "unparsable", "s/sample"),
)
_WORDS = ("task", "list", "figure", "bar")
POOLED = "all"
#: Points that a low-bit bundle may lose against its float model, pooled over all samples.
MOST_LOSS = 1.0
_WIDTH = 160


@dataclass
class Report:
    """What `evaluate` or `score` found. `differences`: paired scores against another bundle, "all" is pooled.

    `missing`: records without media by list; `notes`: anything else to say.
    """

    bundle: str
    scores: list[SplitScore] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    mix: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    against: str | None = None
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def loss_met(self) -> bool | None:
        """Whether the pooled loss against the other bundle is small enough; None without a comparison."""
        pooled = self.differences.get(POOLED)
        return None if pooled is None else -pooled.points <= MOST_LOSS

    @property
    def below(self) -> list[tuple[SplitScore, Line]]:
        """Figures that miss their bar."""
        return [(score, line) for score in self.scores for line in score.lines if line.met is False]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "bundle": self.bundle,
            "against": self.against,
            "lists": [_score_json(score) for score in self.scores],
            "absent": self.absent,
            "notes": self.notes,
            "missing_media": self.missing,
            "scene_mix": self.mix,
            "differences": {name: vars(difference) for name, difference in self.differences.items()},
            "loss_met": self.loss_met,
        }


def _score_json(score: SplitScore) -> dict[str, Any]:
    figures = [
        {
            **vars(line.figure),
            "bar": line.bar.text() if line.bar else None,
            "met": line.met,
            "published": line.published,
        }
        for line in score.lines
    ]
    names = (
        "task",
        "split",
        "n",
        "errors",
        "unparsable",
        "held",
        "seconds_per_sample",
        "score_name",
        "mask_tools",
    )
    return {**{name: getattr(score, name) for name in names}, "figures": figures}


def _cells(score: SplitScore) -> list[list[str]]:
    rows = []
    for number, line in enumerate(score.lines):
        figure = line.figure
        bar = "" if line.bar is None else f"{line.bar.text()} ({'met' if line.met else 'MISSED'})"
        first = number == 0
        rows.append(
            [
                score.task if first else "",
                score.split if first else "",
                figure.name,
                _value(figure, figure.value) if figure.n else "none",
                "" if line.published is None else _value(figure, line.published, 2),
                "" if figure.baseline is None else _value(figure, figure.baseline),
                bar,
                str(figure.n),
                "" if figure.classes is None else str(figure.classes),
                f"{score.unparsable:.1f} %" if first else "",
                f"{score.seconds_per_sample:.2f}" if first and score.seconds_per_sample else "",
            ]
        )
    shown = [line.published for line in score.lines]
    others = [item for item in _published(score.task) if item.value not in shown]
    # A figure of the main list stands nowhere else.
    return rows + (_published_rows("", "", others) if score.split == "test" else [])


def _value(figure: Figure, value: float, digits: int = 1) -> str:
    return f"{value:.{digits}f} %" if figure.unit == "%" else f"{value:.3f}{figure.unit}"


def _published(name: str) -> list[PublishedFigure]:
    try:
        return published(tasks.get(name))
    except TaskError:  # a task that was taken out since
        return []


def _published_rows(task: str, place: str, items: Sequence[PublishedFigure]) -> list[list[str]]:
    """Rows for published figures that no measured one stands beside."""
    rows = []
    for item in items:
        place_of = [task, place] if not rows else ["", ""]
        cells = [*place_of, f"{item.dataset}: {item.name}", "", f"{item.value:.2f} %"]
        rows.append(cells + [""] * (len(HEADINGS) - len(cells)))
    return rows


def _absent_rows(task: str) -> list[list[str]]:
    rows = _published_rows(task, "absent", _published(task))
    return rows or [[task, "absent", *[""] * (len(HEADINGS) - 2)]]


def _blocks(report: Report) -> list[list[list[str]]]:
    """The table's rows, in a block for each list and each absent data set."""
    return [_cells(score) for score in report.scores] + [_absent_rows(task) for task in report.absent]


def _baseline(score: SplitScore) -> str:
    """What the baselines of a list are, in one line: of several of one kind, the first."""
    kinds: dict[str, str] = {}
    for line in score.lines:
        name = line.figure.baseline_name
        kinds.setdefault(name.partition(" (")[0], name)
    return "; ".join(name for name in kinds.values() if name)


def _notes(report: Report) -> list[str]:
    """Sentences under the table."""
    notes = []
    compared = False
    for score in report.scores:
        place = f"{score.task} {score.split}"
        if _baseline(score):
            notes.append(f"{place}: baseline is the {_baseline(score)}")
        compared |= any(line.published is not None for line in score.lines)
        if score.mask_tools:
            notes.append(f"{place}: masks made by {', '.join(score.mask_tools)}")
        if score.errors:
            notes.append(f"{place}: {score.errors} of {score.n} samples failed; they count as wrong")
        if score.held:
            notes.append(f"{place}: {score.held:.1f} % of the answers left their form and were held to it")
    for place, count in report.missing.items():
        notes.append(f"{place}: {count} records left out, their media are missing")
    notes += report.notes
    if compared:
        scenes = "; the lists here are rendered scenes, no comparison" if report.mix else ""
        notes.append(f"published: the authors' figures on the data sets' own test lists{scenes}")
    notes += [f"scenes of {place}: {line}" for place, lines in report.mix.items() for line in lines]
    return notes


def _comparison(report: Report) -> list[str]:
    lines = []
    for name, d in report.differences.items():
        lines.append(
            f"{name}: {d.first:.2f} against {d.second:.2f}, difference {d.points:+.2f} points "
            f"(95 % interval {d.low:+.2f} to {d.high:+.2f}, {d.n} paired samples)"
        )
    if report.loss_met is not None:
        verdict = "met" if report.loss_met else "MISSED"
        lines[-1] += f"; bar: a loss of at most {MOST_LOSS:g} point ({verdict})"
    return lines


def stdout_console() -> Console:
    """Standard output; wide enough for the table where it isn't a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def publish(report: Report, *, as_json: bool, markdown_file: Path | None) -> None:
    """Print the report, as a table or as JSON; with `markdown_file`, write it there as well."""
    if markdown_file is not None:
        markdown_file.write_text(markdown(report), "utf-8")
    if as_json:
        typer.echo(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    else:
        show(report, stdout_console())


def show(report: Report, console: Console) -> None:
    """Print table, notes and comparison."""
    table = Table(title=f"Results of {report.bundle}", title_justify="left")
    for heading in HEADINGS:
        numeric = heading in (
            "value",
            "published",
            "baseline",
            "samples",
            "classes",
            "unparsable",
            "s/sample",
        )
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for block in _blocks(report):
        for cells in block:
            table.add_row(*map(escape, cells))
        table.add_section()
    console.print(table)
    for note in _notes(report):
        console.print(note, markup=False, highlight=False)
    if report.differences:
        console.print(f"\n{report.bundle} against {report.against}, mean score per sample:", markup=False)
        for line in _comparison(report):
            console.print(f"  {line}", markup=False, highlight=False)


def markdown(report: Report) -> str:
    """The same as Markdown."""
    lines = [f"Results of `{report.bundle}`.", "", _markdown_row(HEADINGS)]
    lines.append(_markdown_row(["---"] * len(HEADINGS)))
    lines += [_markdown_row(cells) for block in _blocks(report) for cells in block]
    notes = _notes(report)
    if notes:
        lines += ["", *(f"- {_escaped(note)}" for note in notes)]
    if report.differences:
        lines += ["", f"`{report.bundle}` against `{report.against}`, mean score per sample:", ""]
        lines += [f"- {_escaped(line)}" for line in _comparison(report)]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
