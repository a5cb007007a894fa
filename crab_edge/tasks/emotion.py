"""A person's emotion: MELD, MER 2024, CREMA-D, MAFW and DFEW, one question with the label sets of each."""

from __future__ import annotations

from crab_edge.tasks import grammars
from crab_edge.tasks.base import Published, Task
from crab_edge.tasks.qa import parse_answer, render_answer, truth_answer
from crab_edge.tasks.recipes import VIDEO_4


def _emotion(name: str, labels: str, field: str, metric: str, published: tuple[Published, ...] = ()) -> Task:
    """`field`: where the list has the emotion's name; `label` is the answer with its reasoning."""
    words = tuple(labels.split())
    return Task(
        name=name,
        family="emotion",
        media=VIDEO_4,
        instruction="Please judge the person's emotion at the moment.",
        parse=parse_answer,
        render=render_answer,
        truth=truth_answer(field),
        form=f"<answer>{'|'.join(words)}</answer>",
        grammar=grammars.answer(*words),
        opens=("<answer>",),
        metric=metric,
        targets=("label",),
        published=published,
    )


TASKS = (
    _emotion(
        "meld",
        "neutral surprise fear sadness joy disgust anger",
        "Emotion",
        "weighted-f1",
        (Published("MELD", "not stated", 52.08),),
    ),
    _emotion("mer24", "neutral angry happy sad worried surprise", "discrete", "war-uar"),
    _emotion("cremad", "anger disgust fear happy neutral sad", "emotion", "accuracy"),
    _emotion(
        "mafw",
        "anger disgust fear happiness neutral sadness surprise contempt anxiety helplessness disappointment",
        "emotion",
        "war-uar",
        (Published("MAFW", "not stated", 45.6),),
    ),
    _emotion(
        "dfew",
        "happy sad neutral angry surprise disgust fear",
        "emotion",
        "war-uar",
        (Published("DFEW", "not stated", 64.34),),
    ),
)
