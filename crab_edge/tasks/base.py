"""What a task is: media recipe, instruction, grammar, typed result, metric. Only the families list tasks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from crab_edge.errors import InputError, TaskError
from crab_edge.results import Result
from crab_edge.tasks import grammars
from crab_edge.tasks.recipes import KINDS, MediaRecipe, counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

#: Side in pixels of the square frame that official answers speak of.
FRAME_SIDE = grammars.SIDE


class Span(Protocol):
    """A stretch of a clip, in its own seconds (`crab_edge.clip.Window` is one)."""

    @property
    def start_s(self) -> float: ...

    @property
    def end_s(self) -> float: ...


@dataclass(frozen=True)
class MediaContext:
    """What turns a model's numbers into the clip's: frame size in pixels, duration and window in seconds.

    The defaults are the model's own coordinates: 224x224 pixels, one window of ten seconds.
    """

    width: int = FRAME_SIDE
    height: int = FRAME_SIDE
    duration_s: float = 10.0
    window: Span | None = None

    @property
    def start_s(self) -> float:
        """The clip's second at which the model's second 0 lies."""
        return self.window.start_s if self.window is not None else 0.0

    @property
    def end_s(self) -> float:
        """The clip's second past which no answer about this window may reach."""
        if self.window is None:
            return self.duration_s
        return min(self.window.end_s, self.duration_s) if self.duration_s > 0 else self.window.end_s


#: The model's own coordinates: what scenes are rendered in and scores are computed in.
MODEL_CONTEXT = MediaContext()

Parsed = tuple[Result, ...]
Parse = Callable[[str, MediaContext], Parsed]
Record = Mapping[str, Any]
#: Results and the picture they speak of, uint8 [H, W, 3] in its own size -> results with more in them.
Finish = Callable[[Parsed, "NDArray[np.uint8]"], Parsed]


class Render(Protocol):
    """Results -> the official text; `context` undoes what parsing with the same context did."""

    def __call__(self, results: Sequence[Result], context: MediaContext = MODEL_CONTEXT) -> str: ...


@dataclass(frozen=True)
class Bar:
    """What a figure must reach: `at_least`, and `over_baseline` points above its trivial baseline."""

    at_least: float | None = None
    over_baseline: float | None = None

    def text(self) -> str:
        """For tables: ">= 40, baseline + 25"."""
        parts = [] if self.at_least is None else [f">= {self.at_least:g}"]
        if self.over_baseline is not None:
            parts.append(f"baseline + {self.over_baseline:g}")
        return ", ".join(parts)

    def met(self, value: float, baseline: float | None) -> bool:
        """Whether a figure reaches the bar; without a baseline the second part can't be met."""
        if self.at_least is not None and value < self.at_least:
            return False
        if self.over_baseline is not None:
            return baseline is not None and value >= baseline + self.over_baseline
        return True


@dataclass(frozen=True)
class Published:
    """A figure that the authors of Crab+ report. `figure`: the metric's name for it, or "not stated"."""

    dataset: str
    figure: str
    value: float
    source: str = "Crab+ paper"


def required(record: Record, *names: str) -> Any:
    """The first of `names` that the record has; InputError naming them when it has none."""
    for name in names:
        if record.get(name) not in (None, ""):
            return record[name]
    held = ", ".join(map(str, record))[:200]
    raise InputError(f"a record lacks the field {' or '.join(names)}; it has {held}")


def _question(record: Record) -> str:
    return str(required(record, "question"))


@dataclass(frozen=True)
class Task:
    """One task of the unified interface.

    - `media`: the streams it takes; `still`: the recipe for a clip whose only visual is an image, if any.
    - `instruction`: the official text, verbatim (official weights need it); may hold the slot `{question}`,
      into which the question goes after `wording`.
    - `requires`: streams ("video", "image", "audio") without which the task makes no sense.
    - `parse(text, context)`: typed results in clip seconds and original pixels; what doesn't parse is
      `Unparsed(reason)`. Never raises; linear time. `render(results, context)` is its inverse.
    - `form`: the tagged part for people. `grammar`: the same in Lark (llguidance's dialect), "" for free
      text; every sentence of it parses. Its rule `span`, "(S E)" in whole seconds, and `spans` after it,
      both as `grammars.spans()` writes them, are fitted to the window. `opens`: strings that begin the
      tagged part; free text may stand before it.
    - `finish(results, picture)`: adds what takes the picture's pixels, such as masks.
    - `truth(record)`: results of an AV-UIE v2 test record in the model's own coordinates; None = the record
      isn't scored; `truth_files`: fields that may name its mask. `question(record)`: what fills the slot.
    - `targets`: the train record's field(s) holding the answer text, first one present.
    - `metric`: name in `crab_edge.tasks.metrics`; `bars`: figure name (optionally `name@split`) -> what the
      project's own rendered test scenes must reach; `published`: the official model's figures.
    """

    name: str
    family: str
    media: MediaRecipe
    instruction: str
    parse: Parse
    render: Render
    truth: Callable[[Record], Parsed | None]
    grammar: str
    metric: str
    needs_question: bool = False
    requires: frozenset[str] = frozenset()
    still: MediaRecipe | None = None
    question: Callable[[Record], str] = _question
    wording: Callable[[str], str] = str.strip
    targets: tuple[str, ...] = ("label_content", "label", "output")
    bars: Mapping[str, Bar] = field(default_factory=dict)
    published: tuple[Published, ...] = ()
    form: str = ""
    opens: tuple[str, ...] = ()
    finish: Finish | None = None
    truth_files: tuple[str, ...] = ()

    def prompt(self, question: str | None = None) -> str:
        """The instruction with its slot filled; TaskError when a question is missing or has no slot."""
        if not self.needs_question:
            if question is not None:
                raise TaskError(f"task {self.name} takes no question; leave it out or use --task avqa")
            return self.instruction
        if question is None or not question.strip():
            command = f'crab-edge ask CLIP "QUESTION" --task {self.name}'
            raise TaskError(f"task {self.name} needs a question: {command}")
        return self.instruction.replace("{question}", self.wording(question))

    def recipe_for(self, streams: Iterable[str]) -> MediaRecipe:
        """The recipe for a clip with these streams, one entry a stream; TaskError naming what is missing."""
        given = Counter(streams)
        had = f"the clip has {_listed(given)}"
        if not self._enough(given):
            wanted = {kind: self.media.count(kind) for kind in self.requires | self._several}
            raise TaskError(f"task {self.name} needs {_listed(wanted)}; {had}")
        if self.media.streams & set(given) and not self._prefers_still(given):
            return self.media
        if self.still is not None and self.still.streams & set(given):
            return self.still
        wanted = {kind: self.media.count(kind) for kind in self.media.streams}
        raise TaskError(f"task {self.name} takes {_listed(wanted)}; {had}")

    def applies(self, streams: Iterable[str]) -> bool:
        """Whether the task was made for a clip with these streams, one entry a stream."""
        given = Counter(streams)
        return (
            self._enough(given) and bool(self.media.streams & set(given)) and not self._prefers_still(given)
        )

    @property
    def _several(self) -> set[str]:
        """The kinds of which it compares several."""
        return {kind for kind in self.media.streams if self.media.count(kind) > 1}

    def _enough(self, given: Counter[str]) -> bool:
        several = all(given[kind] >= self.media.count(kind) for kind in self._several)
        return self.requires <= set(given) and several

    def _prefers_still(self, given: Counter[str]) -> bool:
        return "image" in given and "video" not in given and "image" not in self.media.streams


def _listed(streams: Mapping[str, int]) -> str:
    """ "two videos and audio"; of a single stream the bare kind."""
    named = [
        kind if streams[kind] <= 1 else counted(kind, streams[kind])
        for kind in sorted(streams, key=KINDS.index)
    ]
    return " and ".join(named) if named else "nothing"
