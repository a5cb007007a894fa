"""What runs in the model's thread: one question, or all tasks that apply."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from crab_edge_apps.demo.turns import Skipped, Turn

from crab_edge import tasks
from crab_edge.resolved import misfit

if TYPE_CHECKING:
    from crab_edge_apps.demo.worker import Job

    from crab_edge.session import Session

# What small models know how to answer; only those are offered that the model's own templates match.
SUGGESTIONS = (
    "How many different sounds can be heard?",
    "What makes the sound?",
    "Can you hear an electric guitar?",
    "Is there a dog in the video?",
    "Where is the sounding object?",
)


def answer(
    job: Job, session: Session, question: str | None, task: str | None, *, router: bool, asked_at: float
) -> Turn:
    """Streams one answer: emits its text piece by piece. `asked_at`: time.perf_counter() of the request."""
    started = time.perf_counter()
    first: float | None = None
    # Only named when wanted, so that engines without a trace serve everything else.
    more: dict[str, Any] = {"router": True} if router else {}
    stream = session.stream(question, task, cancelled=job.cancelled, **more)
    for piece in stream:
        if first is None:
            first = time.perf_counter() - started
        job.emit(piece)
    said = stream.answer
    took = time.perf_counter() - started
    return Turn("one", question, (said,), (), first, started - asked_at, took)


def all_tasks(job: Job, session: Session, question: str | None, names: list[str], *, asked_at: float) -> Turn:
    """Runs tasks over one decode, with one prefix for each media recipe; emits how many tokens there are."""
    started = time.perf_counter()
    steps = 0

    def stopped() -> bool:
        # Asked once a token, and now and then before an answer's first.
        nonlocal steps
        steps += 1
        if steps % 8 == 0:
            job.emit(steps)
        return job.cancelled()

    answers = session.ask_all(names, question, cancelled=stopped)
    return Turn("all", question, tuple(answers), (), None, started - asked_at, time.perf_counter() - started)


def free_task() -> str:
    """The task of a free question."""
    from crab_edge.session import QUESTION_TASK

    return QUESTION_TASK


def plan(session: Session, question: str | None, untrained: bool) -> tuple[list[str], list[Skipped]]:
    """The tasks to run on a clip, and all others with the reason why not."""
    applicable = session.applicable()
    trained = {task.name for task in session.applicable(trained=True)}
    wanted = [task for task in applicable if untrained or task.name in trained]
    ready = [task for task in wanted if question is not None or not task.needs_question]
    run = tasks.distinct(ready)
    skipped = []
    for task in tasks.all():
        if task in run:
            continue
        reason, other = misfit(session.clip, task), ""
        if reason is None and task not in applicable:
            reason = "why_other_media"
        elif reason is None and task not in wanted:
            reason = "why_untrained"
        elif reason is None and task not in ready:
            reason = "why_question"
        elif reason is None:
            same = (task.media, task.instruction)
            reason = "why_same"
            other = next(entry.name for entry in run if (entry.media, entry.instruction) == same)
        skipped.append(Skipped(task.name, task.family, reason or "", other))
    return [task.name for task in run], skipped


def suggestions(session: Session) -> list[str]:
    """Questions worth trying on a clip."""
    from crab_edge.session import unfamiliar

    templates = session.model.bundle.manifest.model.question_templates
    takes = any(task.needs_question for task in session.applicable())
    return [text for text in SUGGESTIONS if takes and not unfamiliar(text, templates)]
