"""The action in a clip: Kinetics-Sounds and UCF's classes with sound."""

from __future__ import annotations

from collections.abc import Callable

from crab_edge.tasks import grammars
from crab_edge.tasks.base import Parsed, Published, Record, Task
from crab_edge.tasks.qa import parse_answer, render_answer, truth_answer
from crab_edge.tasks.recipes import VIDEO_10_WHOLE


def _action(
    name: str, truth: Callable[[Record], Parsed], targets: tuple[str, ...], published: Published
) -> Task:
    return Task(
        name=name,
        family="action",
        media=VIDEO_10_WHOLE,
        requires=frozenset({"video"}),
        instruction="Please identify the action taking place in the video.",
        parse=parse_answer,
        render=render_answer,
        truth=truth,
        form="<answer>ACTION</answer>",
        grammar=grammars.answer(),
        opens=("<answer>",),
        metric="accuracy",
        targets=targets,
        published=(published,),
    )


TASKS = (
    _action("ks", truth_answer("action"), ("label",), Published("Kinetics-Sounds", "accuracy", 91.12)),
    # `label` is the class's name ("ApplyEyeMakeup"); the answer with its reasoning is `new_label`.
    _action("ucf", truth_answer("label"), ("new_label",), Published("UCF51", "accuracy", 94.04)),
)
