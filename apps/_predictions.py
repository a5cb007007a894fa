"""Runs a model over test records and keeps what it said: one JSON line a record, resumable after a kill."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from crab_edge import tasks
from crab_edge.avuie import Split, TestRecord
from crab_edge.errors import BundleError, CrabError, DependencyError, EngineError, InputError
from crab_edge.results import Mask, results_from_json, results_to_json
from crab_edge.staging import staged_file
from crab_edge.tasks.base import Parsed
from crab_edge.tasks.scoring import Prediction

#: Own fields of a line, apart from the record's and `predict`.
OWN = "crab_edge"
#: So many failures in a row aren't single bad files.
_GIVE_UP_AFTER = 20

Row = dict[str, Any]


def file_name(task: str, variant: str) -> str:
    """The official name, `inference_<task>.jsonl`; other lists than `test` add theirs."""
    return f"inference_{task}{'_' + variant if variant else ''}.jsonl"


class PredictionFile:
    """The lines of one list on disk: the record's own fields, `predict`, and `crab_edge` with key and timing.

    Lines are appended as they come; opening it drops a half-written last line and keeps the last of several
    lines with the same key. A line whose record has changed since is left out.
    """

    def __init__(self, path: Path, split: Split) -> None:
        self.path = path
        self._keys = {_index(record.key): record.key for record in split.records}
        self.rows: dict[str, Row] = {}
        text = path.read_text("utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                row = json.loads(line)
                key = str(row[OWN]["key"])
                self._keys.get(_index(key))
            except (ValueError, KeyError, TypeError):
                continue
            if self._keys.get(_index(key), key) == key:
                self.rows[key] = row
        if self._text() != text:
            self._rewrite()

    def done(self, key: str) -> bool:
        """Whether the record has an answer; failures are tried again."""
        return key in self.rows and "error" not in self.rows[key][OWN]

    @contextmanager
    def writing(self) -> Iterator[Callable[[str, Row], None]]:
        """Append lines while open, one process at a time; afterwards the lines are in the list's order."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"{self.path}: another run is writing it; wait or use --out") from error
            try:
                yield lambda key, row: self._append(file, key, row)
            finally:
                self._rewrite()

    def _append(self, file: TextIO, key: str, row: Row) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        self.rows[key] = row

    def _text(self) -> str:
        ordered = sorted(self.rows.items(), key=lambda item: _index(item[0]))
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in ordered)

    def _rewrite(self) -> None:
        with staged_file(self.path, overwrite=True) as file:
            file.write_text(self._text(), "utf-8")


def _index(key: str) -> int:
    return int(key.split("-", 1)[0])


def run_split(
    model: Any,
    split: Split,
    path: Path,
    advance: Callable[[], None] = lambda: None,
    *,
    grammar: bool = True,
) -> PredictionFile:
    """Ask the model every record of a list that has no answer in `path` yet.

    `advance` is called once a record, done ones included. A record that fails becomes a line with an error
    and the run goes on; EngineError after 20 failures in a row. Records without media are passed over.
    """
    predictions = PredictionFile(path, split)
    open_media: tuple[Any, Any] = (None, None)
    failures = 0
    with predictions.writing() as write:
        for record in split.records:
            if predictions.done(record.key) or record.missing:
                advance()
                continue
            started = time.perf_counter()
            try:
                if open_media[0] != record.media:
                    open_media = (None, None)  # let go of the last clip before the next is decoded
                    open_media = (record.media, _open(model, record))
                row = _ask(open_media[1], record, started, grammar)
                failures = 0
            except (BundleError, DependencyError):
                raise
            except Exception as error:
                failures += 1
                said = str(error) if isinstance(error, CrabError) else f"{type(error).__name__}: {error}"
                row = _row(record, "", {"seconds": time.perf_counter() - started, "error": said})
                open_media = (None, None)
                if failures >= _GIVE_UP_AFTER:
                    write(record.key, row)
                    raise EngineError(f"{failures} records in a row failed, the last with: {said}") from error
            write(record.key, row)
            advance()
    return predictions


def _open(model: Any, record: TestRecord) -> Any:
    # A video's own sound stays out: the record names the sound to hear.
    return model.open(*(path for path, _ in record.media), kinds={path: kind for path, kind in record.media})


def _ask(session: Any, record: TestRecord, started: float, grammar: bool) -> Row:
    task = tasks.get(record.task)
    options = _part(record)
    answer = session.ask(record.question, task=task.name, grammar=grammar, **options)
    duration = float(session.clip.duration_s)
    own: Row = {"seconds": time.perf_counter() - started, "duration_s": duration}
    if task.media.windowed and len(session.clip.windows()) > 1:
        own["parsed"] = results_to_json(answer.parsed)
    if answer.timings.held_tokens:
        own["held_tokens"] = answer.timings.held_tokens
    made = [result for result in answer.parsed if isinstance(result, Mask)]
    if made:
        own["masks"] = results_to_json(made)
    return _row(record, answer.raw, own)


def _part(record: TestRecord) -> dict[str, int]:
    """Which part of the sound belongs to the picture, where the task hears one part."""
    frame = getattr(record, "frame", None)
    return {} if frame is None else {"frame": frame}


def _row(record: TestRecord, text: str, own: Mapping[str, Any]) -> Row:
    return {**record.fields, "predict": text, OWN: {"key": record.key, **own}}


def collect(split: Split, rows: Mapping[str, Row]) -> list[tuple[TestRecord, Prediction]]:
    """Records that are scored, each with its prediction; records without truth or without media are left out.

    A clip whose record gives `duration` (seconds) has that length, else the length that was decoded.
    """
    pairs = []
    for record in split.records:
        row = rows.get(record.key)
        if row is None or record.truth is None:
            continue
        pairs.append((record, prediction_of(record.truth, record.fields, row, split.path.parent)))
    return pairs


def prediction_of(truth: Parsed, fields: Mapping[str, Any], row: Row, folder: Path | None) -> Prediction:
    """A line as a prediction. Lines of other programs have `predict` alone: no timing, ten seconds a clip."""
    own = row.get(OWN, {})
    masks = tuple(item for item in results_from_json(own.get("masks", [])) if isinstance(item, Mask))
    return Prediction(
        truth=truth,
        text=None if "error" in own else str(row["predict"]),
        record=fields,
        duration_s=float(fields.get("duration") or own.get("duration_s") or 10.0),
        seconds=float(own.get("seconds", 0.0)),
        parsed=results_from_json(own["parsed"]) if "parsed" in own else None,
        masks=masks,
        folder=folder,
        held="held_tokens" in own,
    )
