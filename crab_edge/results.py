"""Typed results of the tasks. Times are seconds of the clip; coordinates are pixels of the original frame.

Events have times of their own. Any other result of a clip that was cut into windows has the `window`
(start_s, end_s) that it speaks of; it is None where the clip was taken as a whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from crab_edge.router import RouterTrace

Span = tuple[float, float]
Modality = Literal["audio", "visual", "audio-visual"]


@dataclass(frozen=True)
class Event:
    """Something that lasts from `start_s` to `end_s` (exclusive)."""

    label: str
    start_s: float
    end_s: float
    modality: Modality


@dataclass(frozen=True)
class Box:
    """Axis-aligned box: left, top, right, bottom."""

    label: str
    x1: float
    y1: float
    x2: float
    y2: float
    window: Span | None = None


@dataclass(frozen=True)
class Points:
    """Points on one object, each (x, y)."""

    label: str
    xy: tuple[tuple[float, float], ...]
    window: Span | None = None


@dataclass(frozen=True)
class Mask:
    """A binary mask in COCO run-length form (column-major counts) and the tool that made it."""

    label: str
    height: int
    width: int
    counts: tuple[int, ...]
    source: str
    window: Span | None = None


@dataclass(frozen=True)
class MaskFile:
    """The true mask of a test record: a picture whose pixels above 0 belong to the object."""

    label: str
    path: Path


@dataclass(frozen=True)
class Choice:
    """A short answer: a word, a number, an option."""

    value: str
    window: Span | None = None


@dataclass(frozen=True)
class Caption:
    """Free text."""

    text: str
    window: Span | None = None


@dataclass(frozen=True)
class Unparsed:
    """The raw answer didn't have the task's form; `reason` says where it left it."""

    reason: str
    window: Span | None = None


Result = Event | Box | Points | Mask | MaskFile | Choice | Caption | Unparsed


@dataclass(frozen=True)
class Timings:
    """Seconds spent, by step; `tokens` are the generated ones.

    `held_tokens` of them were chosen by the task's form: the model itself would have left it there.
    """

    decode_s: float = 0.0
    features_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    generate_s: float = 0.0
    trace_s: float = 0.0
    total_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    held_tokens: int = 0


@dataclass(frozen=True)
class Answer:
    """One task's answer for one clip.

    `parsed` holds the typed results in the order of the text; `raw` is what the model said, by window joined
    with newlines when the clip was longer than one window. `router` holds the routers' weights where they
    were asked for.
    """

    task: str
    raw: str
    parsed: tuple[Result, ...]
    timings: Timings
    question: str | None = None
    notices: tuple[str, ...] = ()
    router: RouterTrace | None = field(default=None, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists, each result with its `type`; of a router trace its summary."""
        content = {
            "task": self.task,
            "question": self.question,
            "raw": self.raw,
            "parsed": results_to_json(self.parsed),
            "timings": asdict(self.timings),
            "notices": list(self.notices),
        }
        return content if self.router is None else content | {"router": self.router.summary()}


def results_to_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Results as dictionaries with a `type` field, for JSON; `window` only where there is one."""
    out = []
    for result in results:
        if not is_dataclass(result):
            raise TypeError(f"expected a typed result, got {type(result).__name__}")
        fields = asdict(result)
        if fields.get("window", ()) is None:
            del fields["window"]
        out.append({"type": type(result).__name__.lower(), **fields})
    return out


def results_from_json(items: Iterable[Mapping[str, Any]]) -> tuple[Result, ...]:
    """The typed results that `results_to_json` made the dictionaries of; other fields are passed over.

    Raises KeyError or TypeError for dictionaries of another shape.
    """
    kinds: dict[str, Any] = {
        kind.__name__.lower(): kind for kind in (Event, Box, Points, Mask, Choice, Caption, Unparsed)
    }
    found = []
    for item in items:
        kind = kinds[item["type"]]
        given = {entry.name: item[entry.name] for entry in fields(kind) if entry.name in item}
        for name, value in given.items():
            if isinstance(value, list):
                given[name] = tuple(value)
        if kind is Points:
            given["xy"] = tuple((x, y) for x, y in given["xy"])
        found.append(kind(**given))
    return tuple(found)
