"""Predictions in the official form: one JSON line a record, the record's own fields and `predict`.

Crab+'s inference writes `task_name`, the reference as `output`, and a few fields under names of their own
(`qid`, `idx`, `image_path`); those are read as the test list's. It appends: a second run repeats lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge import tasks
from crab_edge.avuie import read_records, splits
from crab_edge.errors import InputError
from crab_edge.results import Unparsed
from crab_edge.tasks import Task
from crab_edge.tasks.base import Parsed
from crab_edge.tasks.scoring import Prediction

from ._predictions import OWN, prediction_of

Row = dict[str, Any]

_NAME = re.compile(r"inference_(.+)\.jsonl")
#: The test lists' names of what Crab+'s inference writes under others.
_ALIASES = {
    "video_id": "vid",
    "question_id": "qid",
    "frame_idx": "idx",
    "visual_path": ("image_path", "frame_path"),
    "question_type": "type",
    "object": "output",
    "answer": "output",
}
#: References that spell several fields of their record.
_AVE_OUTPUT = re.compile(r"event:(.*) start_time:(\S+) end_time:(\S+)")
_ARIG_OUTPUT = re.compile(r"The sounding object is (.*)\. Its coordinates are <obj>(\(.*\))(\(.*\))</obj>\.?")
_OUTPUTS = (
    (_AVE_OUTPUT, ("event", "start_time", "end_time")),
    (_ARIG_OUTPUT, ("a_obj", "top_left", "bottom_right")),
)
_OPTIONS = re.compile(r"options: ?(\[.*\])")


@dataclass
class Found:
    """The predictions of one file for one task, with what is worth saying about them.

    `pictures`: each record's frame, for tasks that see one.
    """

    task: Task
    variant: str
    predictions: list[Prediction]
    pictures: list[Path | None]
    notes: list[str]


def read(path: Path, name: str | None = None, data: Path | None = None) -> list[Found]:
    """The predictions of a file, by task in order of appearance.

    The task is `name`, else each line's `task_name`, else what the file is called (inference_<task>.jsonl).
    `data`: the AV-UIE v2 folder, for records, masks and pictures that the lines don't hold. InputError naming
    file and line when a line can't be used.
    """
    groups: dict[str, list[tuple[int, Row]]] = {}
    variant = ""
    for number, row in _lines(path):
        task_name, variant = _task_name(path, number, row, name)
        groups.setdefault(task_name, []).append((number, row))
    if not groups:
        raise InputError(f"{path}: holds no predictions; give a JSON-lines file with `predict` in each line")
    return [_found(path, tasks.get(key), variant, rows, data) for key, rows in groups.items()]


def _lines(path: Path) -> Iterable[tuple[int, Row]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: can't be read ({error}); give a JSON-lines file of predictions") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} isn't JSON ({error})") from error
        if not isinstance(row, dict) or ("predict" not in row):
            raise InputError(f"{path}: line {number} has no field predict, where the model's answer stands")
        yield number, row


def _task_name(path: Path, number: int, row: Row, name: str | None) -> tuple[str, str]:
    """(task, variant of the list) of a line."""
    match = _NAME.fullmatch(path.name)
    called = match.group(1) if match else ""
    known = max((k for k in tasks.names() if called == k or called.startswith(f"{k}_")), key=len, default="")
    found = name or row.get("task_name") or known
    if not found:
        raise InputError(f"{path}: line {number} doesn't say its task; name it with --task")
    variant = called.removeprefix(known).strip("_") if known == found else ""
    return str(found), variant


def _found(path: Path, task: Task, variant: str, rows: Sequence[tuple[int, Row]], data: Path | None) -> Found:
    folder = data / task.name if data is not None else None
    notes = []
    last: dict[str, tuple[int, Row]] = {}
    for number, row in rows:
        last[_identity(number, row)] = (number, row)
    if len(last) < len(rows):
        notes.append(f"{len(rows) - len(last)} lines were said twice; the last one counts")
    join = _Join(folder, task, variant)
    found = Found(task, variant, [], [], notes)
    unscored = 0
    for number, row in last.values():
        fields = fields_of(row)
        try:
            truth, fields = _truth(task, fields, join)
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{path}: line {number}: {error}") from error
        if truth is None:
            unscored += 1
            continue
        found.predictions.append(prediction_of(truth, fields, row, folder))
        found.pictures.append(_picture(task, fields, folder))
    if unscored:
        notes.append(f"{unscored} records have nothing to find and aren't scored")
    if join.total and join.total > len(last):
        notes.append(f"{join.total - len(last)} of the list's {join.total} records have no prediction")
    elif 0 < join.total < len(last):
        notes.append(f"{len(last)} lines for a list of {join.total} records; was the file appended to?")
    return found


def _identity(number: int, row: Row) -> str:
    """What two lines about one record have in common.

    Crab+'s lines about whole clips hold the reference and nothing else: equal ones may be different clips.
    """
    own = {key: value for key, value in row.items() if key not in ("predict", OWN)}
    if OWN in row:
        return str(row[OWN].get("key", number))
    told = set(own) - {"task_name", "output", "tot", "idx"}
    return json.dumps(own, sort_keys=True, default=str) if told else str(number)


def fields_of(row: Mapping[str, Any]) -> Row:
    """A line's fields under the test lists' names; what is there already stays."""
    fields = {key: value for key, value in row.items() if key not in ("predict", OWN)}
    for name, others in _ALIASES.items():
        for other in (others,) if isinstance(others, str) else others:
            if fields.get(other) not in (None, ""):
                fields.setdefault(name, fields[other])
    reference = str(fields.get("output", "")).strip()
    for pattern, names in _OUTPUTS:
        match = pattern.fullmatch(reference)
        for name, value in zip(names, match.groups() if match else (), strict=False):
            fields.setdefault(name, value)
    options = _OPTIONS.search(str(fields.get("instruction", "")))
    if options:
        fields.setdefault("multi_choice", options.group(1))
    return fields


def _truth(task: Task, fields: Row, join: _Join) -> tuple[Parsed | None, Row]:
    """From the line's fields, else from its reference answer, else from the record of the test list."""
    try:
        return task.truth(fields), fields
    except InputError as error:
        reference = fields.get("output")
        parsed = task.parse(str(reference), tasks.MODEL_CONTEXT) if reference is not None else ()
        if parsed and not any(isinstance(result, Unparsed) for result in parsed):
            return parsed, fields
        record = join.record(fields)
        if record is None:
            raise InputError(f"{error}; give the test list's folder with --data") from error
        merged = {**record, **fields}
        return task.truth(merged), merged


class _Join:
    """The test list's records, found by the fields that a line shares with them."""

    def __init__(self, folder: Path | None, task: Task, variant: str) -> None:
        lists = [] if folder is None else splits(folder.parent, task)
        wanted = f"test_{variant}" if variant else "test"
        path = next((path for path in lists if path.stem == wanted), None)
        self.records = [] if path is None else read_records(path)
        self.total = len(self.records)
        self._index: dict[tuple[str, ...], dict[tuple[str, ...], list[Row]]] = {}

    def record(self, fields: Row) -> Row | None:
        """The only record that agrees with the line in every plain field both have, if there is one."""
        if not self.records:
            return None
        shared = tuple(
            sorted(
                name
                for name, value in fields.items()
                if isinstance(value, str | int | float) and name in self.records[0]
            )
        )
        if not shared:
            return None
        if shared not in self._index:
            index: dict[tuple[str, ...], list[Row]] = {}
            for record in self.records:
                index.setdefault(tuple(_plain(record.get(name)) for name in shared), []).append(record)
            self._index[shared] = index
        matching = self._index[shared].get(tuple(_plain(fields[name]) for name in shared), [])
        return matching[0] if len(matching) == 1 else None


def _plain(value: Any) -> str:
    """A value for comparison; of a path the last two parts, since lists are copied between machines."""
    text = str(value)
    return "/".join(text.replace("\\", "/").split("/")[-2:])


def _picture(task: Task, fields: Mapping[str, Any], folder: Path | None) -> Path | None:
    from crab_edge import masks

    given = next((fields[name] for name in ("visual_path", "image_path") if fields.get(name)), None)
    return masks.located(str(given), folder) if given is not None and task.media.images else None
