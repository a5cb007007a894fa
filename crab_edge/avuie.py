"""Reads AV-UIE v2's record lists, `AVUIE_2/<task>/{train,test}.json`, with their differing field names.

What a record means is declared by its task (`crab_edge.tasks`): the media by the recipe; question, target and
truth by the task's own readers. Every media path is checked before anything runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from crab_edge.errors import InputError
from crab_edge.results import MaskFile
from crab_edge.tasks.base import Parsed, Record, Task, required
from crab_edge.tasks.recipes import MediaRecipe

#: Media fields of the official lists where a task takes one of a kind; the first one present is used.
#: Where it takes several, they are numbered: `video1_path`, `video2_path`.
_PATH_FIELDS = {
    "video": ("video_path", "visual_path"),
    "image": ("image_path", "visual_path"),
    "audio": ("audio_path",),
}
#: Lists without paths name the clip; its files are `video/<name>.<suffix>` and `audio/<name>.<suffix>`.
#: The first name that has a file counts: AVQA's `video_id` is a number, its `video_name` the file's.
_NAME_FIELDS = ("vid", "filename", "video_name", "video_id")
#: Which part of the sound belongs to a picture; train lists without it mean the first (Crab+ reference).
_FRAME_FIELDS = ("frame_idx", "idx")
_SUFFIXES = {
    "video": (".mp4", ".avi", ".mkv", ".webm", ".mov"),
    "image": (".jpg", ".png", ".jpeg"),
    "audio": (".wav", ".mp3", ".flac", ".m4a", ".ogg"),
}


@dataclass(frozen=True)
class TestRecord:
    """One record: `media` as (path, kind); `truth` None when it isn't scored, its mask files located.

    `frame`: the picture's number among the parts of the sound, where the task hears one of them. `key` is
    the record's place and a hash of its content: it names the prediction when a run resumes.
    """

    __test__ = False  # pytest, this is no test class

    task: str
    key: str
    media: tuple[tuple[Path, str], ...]
    question: str | None
    truth: Parsed | None
    fields: Mapping[str, Any]
    frame: int | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it takes: media, and the files of its truth."""
        masks = [result.path for result in self.truth or () if isinstance(result, MaskFile)]
        return (*(path for path, _ in self.media), *masks)

    @property
    def missing(self) -> list[Path]:
        """Files that aren't there."""
        return [path for path in self.files if not path.is_file()]


@dataclass(frozen=True)
class Split:
    """The records of one list. `name` is the file's stem: "test", "test_unseen", ..."""

    task: str
    name: str
    path: Path
    records: tuple[TestRecord, ...]

    @property
    def variant(self) -> str:
        """What distinguishes it from the main list: "" for `test`, "unseen" for `test_unseen`."""
        return self.name.removeprefix("test").strip("_-")


def splits(data: Path, task: Task, prefix: str = "test") -> list[Path]:
    """The task's lists `<prefix>*.json`, the main one first; empty when the data set is absent."""
    found = sorted((data / task.name).glob(f"{prefix}*.json"))
    return sorted(found, key=lambda path: (path.stem != prefix, path.stem))


def read_records(path: Path) -> list[dict[str, Any]]:
    """A list file as it is; InputError when it isn't a JSON list of objects."""
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); check --data") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); download or render the list again") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{path}: expected a JSON list of objects, AV-UIE v2's layout; check --data")
    return records


def read_split(path: Path, task: Task, *, limit: int | None = None) -> Split:
    """A test list with media paths and truth. InputError names file, record and field of a bad record."""
    records = read_records(path)[:limit]
    return Split(task.name, path.stem, path, tuple(_record(path, task, i, r) for i, r in enumerate(records)))


def target(record: Record, task: Task) -> str:
    """A train record's answer text, verbatim."""
    return str(required(record, *task.targets))


def check_media(split_list: Sequence[Split]) -> None:
    """InputError when any media or mask file of these lists is missing: how many, and the first one."""
    missing = [path for split in split_list for record in split.records for path in record.missing]
    total = sum(len(record.files) for split in split_list for record in split.records)
    if missing:
        raise InputError(
            f"{len(missing)} of {total} media files are missing, the first is {missing[0]}; "
            "complete the folder or leave such records out with --skip-missing"
        )


def _record(path: Path, task: Task, index: int, record: dict[str, Any]) -> TestRecord:
    digest = sha256(json.dumps(record, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    try:
        return TestRecord(
            task=task.name,
            key=f"{index}-{digest[:12]}",
            media=tuple(media_paths(record, task.media, path.parent)),
            question=task.question(record) if task.needs_question else None,
            truth=_with_files(task.truth(record), path.parent),
            fields=record,
            frame=frame_index(record, task.media),
        )
    except (InputError, TypeError, ValueError) as error:
        raise InputError(f"{path}: record {index}: {error}") from error


def frame_index(record: Record, recipe: MediaRecipe) -> int | None:
    """The picture's number among the parts of the sound; None for recipes that hear more than one part.

    InputError when it isn't the number of a part.
    """
    if not recipe.units:
        return None
    given = next((record[name] for name in _FRAME_FIELDS if record.get(name) not in (None, "")), 0)
    index = int(given)
    if not 0 <= index < recipe.units:
        raise InputError(
            f"frame {given} of {recipe.units} parts of the sound; expected 0 to {recipe.units - 1}"
        )
    return index


def _with_files(truth: Parsed | None, folder: Path) -> Parsed | None:
    """The truth with its mask files' paths made whole."""
    if truth is None:
        return None
    return tuple(
        replace(result, path=_located(str(result.path), "mask", folder))
        if isinstance(result, MaskFile)
        else result
        for result in truth
    )


def media_paths(record: Record, recipe: MediaRecipe, folder: Path) -> Iterator[tuple[Path, str]]:
    """(path, kind) of a record's media, visual first, of each kind in order. `folder` is `AVUIE_2/<task>`.

    A path that isn't on disk comes back as the place where it was expected; paths that leave the folder are
    refused with an InputError.
    """
    for kind, names in _PATH_FIELDS.items():
        count = recipe.count(kind)
        if count > 1:
            for number in range(1, count + 1):
                yield _located(str(required(record, f"{kind}{number}_path")), kind, folder), kind
        elif count:
            given = next((str(record[name]) for name in names if record.get(name)), None)
            if given is not None:
                yield _located(given, kind, folder), kind
                continue
            required(record, *names, *_NAME_FIELDS)
            held = [str(record[name]) for name in _NAME_FIELDS if record.get(name) not in (None, "")]
            found = [_by_name(name, kind, folder) for name in held]
            yield next((path for path in found if path.is_file()), found[0]), kind


def _located(given: str, kind: str, folder: Path) -> Path:
    pure = PurePosixPath(given.replace("\\", "/"))
    if ".." in pure.parts:
        raise InputError(f"the path {given} leaves the folder {folder}")
    # The authors' own absolute paths occur in their lists: what follows the task's folder counts then.
    tried = [] if pure.is_absolute() else [folder / pure, folder / kind / pure]
    if pure.is_absolute() and folder.name in pure.parts[:-1]:
        tried.append(folder.joinpath(*pure.parts[pure.parts.index(folder.name) + 1 :]))
    tried.append(folder / kind / pure.name)
    return next((path for path in tried if path.is_file()), tried[0])


def _by_name(name: str, kind: str, folder: Path) -> Path:
    if "/" in name or "\\" in name or name in (".", ".."):
        raise InputError(f"the clip name {name} isn't a file name")
    tried = [folder / kind / f"{name}{suffix}" for suffix in _SUFFIXES[kind]]
    if PurePosixPath(name).suffix:
        tried += [folder / kind / name]
        tried += [folder / kind / f"{PurePosixPath(name).stem}{suffix}" for suffix in _SUFFIXES[kind]]
    return next((path for path in tried if path.is_file()), tried[0])
