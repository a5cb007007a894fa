"""One request on its way through the windows of a clip, and the answer that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from crab_edge.errors import CrabError
from crab_edge.resolved import Spent
from crab_edge.results import Answer, Event, Result, Timings
from crab_edge.router import RouterTrace
from crab_edge.tasks import MediaContext, MediaRecipe, Parsed, Task

if TYPE_CHECKING:
    from crab_edge.clip import Clip


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
    grammar: bool = False
    router: bool = False
    spent: Spent = field(default_factory=Spent)
    complete: bool = False
    _raws: list[str] = field(default_factory=list)
    _results: list[Result] = field(default_factory=list)
    _traces: list[RouterTrace] = field(default_factory=list)
    _cut_off: bool = False

    def stopped(self) -> bool:
        """Whether the caller has asked to stop."""
        return self.cancelled is not None and self.cancelled()

    def add(self, raw: str, context: MediaContext, *, ended: bool) -> None:
        """Takes one window's text; `ended` is false when the model was stopped before its end token."""
        self._raws.append(raw)
        self._results.extend(self._finished(self.task.parse(raw, context)))
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
        steps = asdict(self.spent)
        total = sum(seconds for name, seconds in steps.items() if name.endswith("_s"))
        return Answer(
            task=self.task.name,
            raw="\n".join(self._raws),
            parsed=tuple(stitched(self._results) if len(self._raws) > 1 else self._results),
            timings=Timings(**steps, total_s=total),
            question=self.question,
            notices=tuple(notices),
            router=RouterTrace.join(self._traces) if self._traces else None,
        )


def stitched(results: Iterable[Result]) -> list[Result]:
    """Joins events that end where the next window's event of the same label and modality begins."""
    out: list[Result] = []
    open_ends: dict[tuple[str, str, float], int] = {}
    for result in results:
        if not isinstance(result, Event):
            out.append(result)
            continue
        place = open_ends.pop((result.label, result.modality, result.start_s), None)
        if place is None:
            place = len(out)
            out.append(result)
        else:
            first = out[place]
            assert isinstance(first, Event)
            out[place] = replace(first, end_s=result.end_s)
        open_ends[(result.label, result.modality, result.end_s)] = place
    return out
