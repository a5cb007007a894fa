"""Figures as a table: for the terminal, as Markdown, as plain data, with the mix of their scenes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from crab_edge.tasks.metrics.paired import Difference
from crab_edge.tasks.scoring import Line, SplitScore

HEADINGS = (
    *("task", "list", "figure", "value", "baseline", "bar"),
    *("samples", "classes", "unparsable", "s/sample"),
)
POOLED = "all"
#: Points that a low-bit bundle may lose against its float model, pooled over all samples.
MOST_LOSS = 1.0
_MOST_VALUES = 8
_WIDTH = 160


@dataclass
class Report:
    """What `evaluate` found. `differences` are paired scores against another bundle, "all" is pooled."""

    bundle: str
    scores: list[SplitScore] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)
    mix: dict[str, list[str]] = field(default_factory=dict)
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
            "missing_media": self.missing,
            "scene_mix": self.mix,
            "differences": {name: vars(difference) for name, difference in self.differences.items()},
            "loss_met": self.loss_met,
        }


def _score_json(score: SplitScore) -> dict[str, Any]:
    figures = [
        {**vars(line.figure), "bar": line.bar.text() if line.bar else None, "met": line.met}
        for line in score.lines
    ]
    names = ("task", "split", "n", "errors", "unparsable", "seconds_per_sample", "score_name")
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
                f"{figure.value:.1f} %",
                "" if figure.baseline is None else f"{figure.baseline:.1f} %",
                bar,
                str(figure.n),
                "" if figure.classes is None else str(figure.classes),
                f"{score.unparsable:.1f} %" if first else "",
                f"{score.seconds_per_sample:.2f}" if first else "",
            ]
        )
    return rows


def _baselines(score: SplitScore) -> Iterable[str]:
    names = dict.fromkeys(line.figure.baseline_name for line in score.lines if line.figure.baseline_name)
    return names.keys()


def _notes(report: Report) -> list[str]:
    """Sentences under the table."""
    notes = []
    for score in report.scores:
        place = f"{score.task} {score.split}"
        notes += [f"{place}: baseline is the {name}" for name in _baselines(score)]
        if score.errors:
            notes.append(f"{place}: {score.errors} of {score.n} samples failed; they count as wrong")
    for place, count in report.missing.items():
        notes.append(f"{place}: {count} records left out, their media are missing")
    notes += [f"{task}: absent" for task in report.absent]
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


def show(report: Report, console: Console) -> None:
    """Print table, notes and comparison."""
    table = Table(title=f"Results of {report.bundle}", title_justify="left")
    for heading in HEADINGS:
        numeric = heading in ("value", "baseline", "samples", "classes", "unparsable", "s/sample")
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for score in report.scores:
        for cells in _cells(score):
            table.add_row(*cells)
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
    lines += [_markdown_row(cells) for score in report.scores for cells in _cells(score)]
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


def scene_mix(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the records' `scene` fields hold, a line each: shares of few values, else least, most, median.

    A list counts each of its items. Records that carry no `scene` object give nothing.
    """
    scenes = [record["scene"] for record in records if isinstance(record.get("scene"), Mapping)]
    lines = []
    for name in dict.fromkeys(key for scene in scenes for key in scene):
        values: list[Any] = []
        for scene in scenes:
            value = scene.get(name)
            values += value if isinstance(value, list) else [value] if value is not None else []
        text = _distribution(values)
        if text:
            lines.append(f"{name}: {text}")
    return lines


def _distribution(values: Sequence[Any]) -> str:
    plain = [value for value in values if isinstance(value, bool | int | float | str)]
    counts = Counter("yes" if v is True else "no" if v is False else str(v) for v in plain)
    if not plain:
        return ""
    if len(counts) <= _MOST_VALUES:
        ordered = sorted(counts.items(), key=lambda item: (_sortable(item[0]), item[0]))
        return ", ".join(f"{value} {100 * count / len(plain):.0f} %" for value, count in ordered)
    if all(isinstance(value, int | float) for value in plain):
        ordered_values = sorted(plain)
        middle = ordered_values[len(plain) // 2]
        return f"{ordered_values[0]:.3g} to {ordered_values[-1]:.3g}, median {middle:.3g}"
    return f"{len(counts)} different"


def _sortable(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")
