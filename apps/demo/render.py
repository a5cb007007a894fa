"""The page's parts, and what each shows of a visitor's clip and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gradio as gr
from crab_edge_apps.demo import answers, exports, markup, panel, stage, timeline
from crab_edge_apps.demo.texts import about, for_browser, say
from crab_edge_apps.demo.turns import Turn
from crab_edge_apps.demo.visitors import Visitor

if TYPE_CHECKING:
    from crab_edge.session import Model
    from crab_edge.tasks import Task

Changes = dict[Any, Any]


@dataclass
class Parts:
    """The page's components by what they are for. `labelled`: (component, property, key of its text)."""

    header: Any = None
    language: Any = None
    stage: Any = None
    message: Any = None
    file: Any = None
    camera_button: Any = None
    microphone_button: Any = None
    example: Any = None
    camera: Any = None
    microphone: Any = None
    question: Any = None
    task: Any = None
    go: Any = None
    go_all: Any = None
    stop: Any = None
    options: Any = None
    untrained: Any = None
    record: Any = None
    suggestions: Any = None
    answers_heading: Any = None
    live: Any = None
    thread: Any = None
    timeline: Any = None
    pictures: Any = None
    panel: Any = None
    exports: Any = None
    make_video: Any = None
    made_video: Any = None
    router: Any = None
    labelled: list[tuple[Any, str, str]] = field(default_factory=list)

    def all(self) -> list[Any]:
        """Every component."""
        return [part for name, part in vars(self).items() if name != "labelled"]

    def about_answers(self) -> list[Any]:
        """Those that an answer changes, the running answer's card among them."""
        shown = (self.live, self.thread, self.timeline, self.pictures, self.panel, self.exports)
        return [*shown, self.make_video, self.made_video, self.router]


class Renderer:
    """What the parts show. `limits`: (MB, minutes) of a clip."""

    def __init__(self, model: Model, parts: Parts, limits: tuple[float, float]) -> None:
        self._model = model
        self._parts = parts
        self._limits = limits

    def everything(self, visitor: Visitor | None, language: str) -> Changes:
        """All that depends on the visitor's clip and answers, but the running answer's card."""
        parts = self._parts
        shown = stage.nothing(language, *self._limits)
        if visitor is not None:
            shown = stage.opened(visitor, language, *self._limits)
        return {
            parts.stage: shown,
            parts.task: gr.update(choices=choices(visitor, language), value=""),
            parts.suggestions: _suggestions(visitor, language),
            **self.told(visitor, language),
        }

    def told(self, visitor: Visitor | None, language: str) -> Changes:
        """What answers change."""
        parts = self._parts
        turns: Sequence[Turn] = visitor.turns if visitor is not None else ()
        latest = next((turn for turn in reversed(turns) if timeline.has_events(turn.answers)), None)
        look = visitor.look if visitor is not None else None
        known = visitor.facts.trained if visitor is not None else ()
        finders = [task.name for task in known if task.family == "temporal"]
        has_video = visitor is not None and "video" in visitor.facts.kinds
        return {
            parts.thread: answers.thread(turns, language),
            parts.timeline: timeline.timeline(look, latest.answers if latest else (), language, finders),
            parts.pictures: _pictures(visitor, language),
            parts.panel: panel.panel(self._model, turns, language),
            parts.exports: exports.links(visitor, self._model, language),
            parts.make_video: gr.update(visible=bool(turns) and has_video),
            parts.made_video: "",
            parts.router: _router(turns, language),
        }

    def translated(self, visitor: Visitor | None, language: str) -> Changes:
        """The whole page in a language."""
        parts = self._parts
        changes = self.everything(visitor, language)
        for component, prop, key in parts.labelled:
            before = changes.get(component)
            label = {prop: say(language, key), "__type__": "update"}
            changes[component] = {**(before if isinstance(before, dict) else {}), **label}
        changes[parts.question] = gr.update(
            label=say(language, "question"), placeholder=say(language, "question_hint")
        )
        changes[parts.header] = header(language)
        changes[parts.answers_heading] = markup.heading(say(language, "answers"))
        return changes


def choices(visitor: Visitor | None, language: str) -> list[tuple[str, str]]:
    """The task menu: tasks that take the clip, those the model knows first."""
    free = [(say(language, "free_question"), "")]
    if visitor is None:
        return free
    known = [(_described(task, language), task.name) for task in visitor.facts.trained]
    doubt = say(language, "not_trained")
    others = [(f"{_described(task, language)} ({doubt})", task.name) for task in visitor.facts.untrained]
    return free + known + others


def header(language: str) -> str:
    """Name, one line of explanation, and the texts that the page's script shows."""
    texts = "".join(
        f' data-{key.replace("_", "-")}="{markup.text(value)}"'
        for key, value in for_browser(language).items()
    )
    return (
        f'<header class="ce-header" data-language="{language}"{texts}>{_MARK}'
        f"<div><h1>Crab Edge</h1><p>{markup.text(say(language, 'tagline'))}</p></div></header>"
    )


_MARK = (
    '<svg class="ce-mark" viewBox="0 0 40 40" aria-hidden="true" fill="none" stroke="currentColor" '
    'stroke-width="2.4" stroke-linecap="round" stroke-linejoin="round">'
    '<path d="M9 23c0-6 5-9 11-9s11 3 11 9-5 9-11 9-11-3-11-9z"/><path d="M15 14V9M25 14V9"/>'
    '<path d="M9 20C4 18 3 13 6 8l3 4M31 20c5-2 6-7 3-12l-3 4"/>'
    '<path d="M9 27l-5 3M31 27l5 3M12 31l-3 4M28 31l3 4"/><path d="M16 24c2.500 2 5.500 2 8 0"/></svg>'
)


def _described(task: Task, language: str) -> str:
    return f"{task.name} · {about(language, task.name, task.family)}"


def _suggestions(visitor: Visitor | None, language: str) -> str:
    offered = visitor.facts.suggestions if visitor is not None else ()
    chips = "".join(
        f'<button type="button" class="ce-chip" data-ask="{text}">{text}</button>'
        for text in map(markup.text, offered)
    )
    label = markup.text(say(language, "try_asking"))
    return f'<div class="ce-suggest"><span>{label}</span>{chips}</div>' if chips else ""


def _pictures(visitor: Visitor | None, language: str) -> str:
    if visitor is None or not visitor.drawn:
        return ""
    heading = markup.heading(say(language, "on_picture"), say(language, "on_picture_hint"))
    shown = "".join(
        f'<figure><img src="{picture}" alt="{markup.text(task)}"><figcaption><code>{markup.text(task)}</code>'
        "</figcaption></figure>"
        for task, picture in visitor.drawn.items()
    )
    return f'{heading}<div class="ce-pictures">{shown}</div>'


def _router(turns: Sequence[Turn], language: str) -> str:
    traces = [answer.router for turn in turns for answer in turn.answers if answer.router is not None]
    heading = markup.heading(say(language, "router"))
    if not traces:
        return heading + markup.empty("", say(language, "router_hint"))
    from crab_edge_apps.demo.router_view import router_html

    return heading + router_html(traces[-1], language)
