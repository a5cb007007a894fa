"""One request on its way through the windows of a clip, and the answer that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from crab_edge.errors import CrabError
from crab_edge.resolved import Spent
from crab_edge.results import Answer, Event, MaskFile, Result, Timings
from crab_edge.router import RouterTrace
from crab_edge.tasks import MediaContext, MediaRecipe, Parsed, Task
from crab_edge.tasks.base import Span

if TYPE_CHECKING:
    from crab_edge.clip import Clip


_SAME_INSTANT_S = 1e-6


@dataclass
class Asked:
    """A task with its instruction; `limit` bounds the tokens of each window's text.

    `frame`: the picture's number among the parts of the audio, for tasks that hear one of them.
    `grammar`: the text is held to the task's form. `router`: the routers are traced.
    """

    task: Task
    recipe: MediaRecipe
    clip: Clip
    instruction: str
    question: str | None
    limit: int
    cancelled: Callable[[], bool] | None
    notices: list[str]
    frame: int | None = None
    grammar: bool = True
    router: bool = False
    spent: Spent = field(default_factory=Spent)
    complete: bool = False
    _raws: list[str] = field(default_factory=list)
    _results: list[tuple[float, list[Result]]] = field(default_factory=list)
    _traces: list[RouterTrace] = field(default_factory=list)
    _cut_off: bool = False

    def stopped(self) -> bool:
        """Whether the caller has asked to stop."""
        return self.cancelled is not None and self.cancelled()

    def add(self, raw: str, context: MediaContext, *, ended: bool) -> None:
        """Takes one window's text; `ended` is false when the model was stopped before its end token."""
        self._raws.append(raw)
        found = self._finished(self.task.parse(raw, context))
        self._results.append((context.start_s, [dated(result, context.window) for result in found]))
        self._cut_off |= not ended

    def add_trace(self, trace: RouterTrace) -> None:
        """Takes the router trace of one window."""
        self._traces.append(trace)

    def _finished(self, parsed: Parsed) -> Parsed:
        """What the task makes of its results and the picture; where that fails, the results and a notice."""
        images = self.clip.images[: self.recipe.images]
        if self.task.finish is None or not images or self.stopped():
            return parsed
        try:
            return self.task.finish(parsed, images[0].original())
        except CrabError as error:
            self.notices.append(" ".join(str(error).split()))
            return parsed

    def answer(self) -> Answer:
        """What is known so far, as the answer."""
        notices = [*self.clip.notices, *self.notices]
        if self.stopped() or not self.complete:
            notices.append("stopped before the answer's end")
        elif self._cut_off:
            notices.append(f"cut off after {self.limit} tokens: the answer may be incomplete")
        if self.spent.held_tokens:
            notices.append(
                f"held to the task's form at {self.spent.held_tokens} of {self.spent.tokens} tokens, where "
                "the model would have said something else; rely on it less"
            )
        steps = asdict(self.spent)
        total = sum(seconds for name, seconds in steps.items() if name.endswith("_s"))
        return Answer(
            task=self.task.name,
            raw="\n".join(self._raws),
            parsed=tuple(stitched(self._results)),
            timings=Timings(**steps, total_s=total),
            question=self.question,
            notices=tuple(notices),
            router=RouterTrace.join(self._traces) if self._traces else None,
        )


def dated(result: Result, window: Span | None) -> Result:
    """The result with the window that it speaks of; events have their own times."""
    if window is None or isinstance(result, (Event, MaskFile)):
        return result
    return replace(result, window=(window.start_s, window.end_s))


def stitched(windows: Sequence[tuple[float, Sequence[Result]]]) -> list[Result]:
    """The results of all windows, each with its window's start in s, on the clip's time line.

    Two events of one label and modality become one when the later one begins where the earlier one ends, or
    when they come from different windows and share a time: then it lasts from the first start to the last
    end. What one window reports as overlapping stays as the model said it, but for an event that it says
    twice. Results of other types stay side by side. The order is that of the text.
    """
    said = [(begins_s, _once(results)) for begins_s, results in windows]
    if len(said) == 1:
        return said[0][1]
    out: list[Result | None] = []
    places: dict[tuple[str, str], list[tuple[int, int]]] = {}
    """Events that may still grow: place in `out` and the last window that spoke of them."""
    for number, (begins_s, results) in enumerate(said):
        for result in results:
            place = len(out)
            out.append(result)
            if not isinstance(result, Event):
                continue
            growing = []
            for other, last in places.get((result.label, result.modality), []):
                earlier, later = out[other], out[place]
                assert isinstance(earlier, Event) and isinstance(later, Event)
                if _one_event(earlier, result, last == number):
                    out[other] = out[place] = None
                    place = min(place, other)
                    out[place] = replace(
                        earlier,
                        start_s=min(earlier.start_s, later.start_s),
                        end_s=max(earlier.end_s, later.end_s),
                    )
                elif earlier.end_s >= begins_s - _SAME_INSTANT_S:
                    growing.append((other, last))
            places[result.label, result.modality] = [*growing, (place, number)]
    return [result for result in out if result is not None]


def _once(results: Sequence[Result]) -> list[Result]:
    """Without the events that are there already, to the second."""
    seen: set[Event] = set()
    out: list[Result] = []
    for result in results:
        if isinstance(result, Event):
            if result in seen:
                continue
            seen.add(result)
        out.append(result)
    return out


def _one_event(earlier: Event, later: Event, same_window: bool) -> bool:
    if abs(later.start_s - earlier.end_s) <= _SAME_INSTANT_S:
        return True
    return not same_window and later.start_s < earlier.end_s and earlier.start_s < later.end_s
