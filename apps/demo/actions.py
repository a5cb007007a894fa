"""What the page does when something is pressed. Each action yields the parts of the page that change.

Nothing here blocks the server's event loop: decoding and answering happen in the workers' threads.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from crab_edge_apps.demo import answers, asking, exports, markup, panel, pictures, stage, timeline
from crab_edge_apps.demo.texts import about, say
from crab_edge_apps.demo.visitors import Turn, Visitor, Visitors
from crab_edge_apps.demo.worker import Busy, Job, Tick, Worker

from crab_edge import tasks
from crab_edge.errors import CrabError

if TYPE_CHECKING:
    from crab_edge_apps.demo.page import Parts

    from crab_edge.session import Model

# Text is sent at most so often; more would only load the browser.
_SEND_EVERY_S = 0.06
_LEAVE_WAIT_S = 15.0

Changes = dict[Any, Any]


class Actions:
    """The page's events over one model. `limits`: (MB, minutes) of a clip."""

    def __init__(
        self,
        model: Model,
        visitors: Visitors,
        answering: Worker,
        decoding: Worker,
        limits: tuple[float, float],
    ) -> None:
        self.model = model
        self.visitors = visitors
        self.limits = limits
        self._answering = answering
        self._decoding = decoding
        self.parts: Parts

    # Opening

    async def open_files(self, files: Any, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """Uploaded or recorded files become the clip."""
        if not files:
            # Emptying an input is a change too. Without a yield, Gradio would empty the whole page.
            yield {self.parts.message: gr.skip()}
            return
        given = [str(file) for file in (files if isinstance(files, list) else [files])]
        async for changes in self._open(given, language, str(request.session_hash)):
            yield changes

    async def open_example(self, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """The clip that ships with the package."""
        async for changes in self._open(None, language, str(request.session_hash)):
            yield changes

    async def _open(self, given: list[str] | None, language: str, key: str) -> AsyncIterator[Changes]:
        parts = self.parts
        yield {parts.message: _status(say(language, "opening"))}
        try:
            await self._end_running(key)
            job = self._decoding.submit(lambda _: self._opened(key, given))
            visitor: Visitor = await job.wait()
        except Exception as error:
            yield {parts.message: self._error(error, language), **self._emptied()}
            return
        yield {parts.message: "", **self._emptied(), **self.everything(visitor, language)}

    def _opened(self, key: str, given: list[str] | None) -> Visitor:
        if given is None:
            from crab_edge.bundle import sample_clip

            example = sample_clip()
            return self.visitors.open(key, [example], [example.name], keep=True)
        uploads = [self.visitors.store.check_upload(path) for path in given]
        return self.visitors.open(key, uploads, [path.name for path in uploads])

    def _emptied(self) -> Changes:
        """The inputs forget what they were given: it's the page's clip now."""
        parts = self.parts
        return {parts.file: None, parts.camera: gr.update(value=None), parts.microphone: gr.update(value=None)}

    async def _end_running(self, key: str) -> None:
        """Stops the visitor's answer and waits for its end."""
        visitor = self.visitors.get(key)
        if visitor is None or visitor.job is None:
            return
        visitor.job.cancel()
        until = time.monotonic() + _LEAVE_WAIT_S
        while visitor.busy and not self._answering.withdraw(visitor.job) and time.monotonic() < until:
            await asyncio.sleep(0.05)

    # Asking

    async def ask(
        self, question: str, task: str, router: bool, language: str, request: gr.Request
    ) -> AsyncIterator[Changes]:
        """One question or one task, streamed."""
        parts = self.parts
        name = task or None
        words = (question or "").strip() or None
        if name is not None and not tasks.get(name).needs_question:
            words = None
        visitor = self.visitors.get(str(request.session_hash))
        if visitor is None:
            yield {parts.live: markup.error(say(language, "error"), say(language, "need_clip"))}
            return
        if words is None and (name is None or tasks.get(name).needs_question):
            yield {parts.live: markup.error(say(language, "error"), say(language, "need_question"))}
            return
        shown = name or asking_task()
        asked_at = time.perf_counter()

        def work(job: Job) -> tuple[Turn, Any]:
            session = self.visitors.session(visitor)
            turn = asking.answer(job, session, words, name, router=router, asked_at=asked_at)
            return turn, pictures.drawn(session.clip, turn.answers)

        said = ""
        async for event in self._run(visitor, work, language):
            if isinstance(event, dict):
                yield event
                continue
            if isinstance(event, str):
                said += event
            status = self._waiting(event, language) or say(language, "answering" if said else "thinking")
            yield {parts.live: answers.live(language, words, shown, status, said)}

    async def ask_all(
        self, question: str, untrained: bool, language: str, request: gr.Request
    ) -> AsyncIterator[Changes]:
        """Every task that applies, laid out together."""
        parts = self.parts
        words = (question or "").strip() or None
        visitor = self.visitors.get(str(request.session_hash))
        if visitor is None:
            yield {parts.live: markup.error(say(language, "error"), say(language, "need_clip"))}
            return
        asked_at = time.perf_counter()
        count = 0

        def work(job: Job) -> tuple[Turn, Any]:
            nonlocal count
            session = self.visitors.session(visitor)
            names, skipped = asking.plan(session, words, untrained)
            count = len(names)
            turn = asking.all_tasks(job, session, words, names, asked_at=asked_at)
            turn.skipped = tuple(skipped)
            return turn, pictures.drawn(session.clip, turn.answers)

        tokens = 0
        async for event in self._run(visitor, work, language):
            if isinstance(event, dict):
                yield event
                continue
            if isinstance(event, int):
                tokens = event
            status = self._waiting(event, language) or say(language, "all_running", n=count, tokens=tokens)
            yield {parts.live: answers.live(language, words, say(language, "all_tasks"), status)}

    async def _run(self, visitor: Visitor, work: Any, language: str) -> AsyncIterator[Any]:
        """Runs a job: events to show, at last the changes that its answer makes."""
        parts = self.parts
        if visitor.busy:
            yield {parts.live: markup.error(say(language, "error"), say(language, "already"))}
            return
        try:
            job = self._answering.submit(work)
        except Busy:
            yield {parts.live: markup.error(say(language, "error"), say(language, "busy"))}
            return
        visitor.job = job
        yield self._buttons(running=True)
        yield Tick(self._answering.ahead(job))
        sent, pending = 0.0, None
        try:
            async for event in job.events():
                if isinstance(event, Tick) and job.cancelled() and self._answering.withdraw(job):
                    yield {parts.live: "", **self._buttons(running=False)}
                    return
                pending = pending + event if isinstance(pending, str) and isinstance(event, str) else event
                if time.monotonic() - sent >= _SEND_EVERY_S:
                    sent = time.monotonic()
                    yield pending
                    pending = None
            turn, drawn = job.result
        except Exception as error:
            yield {parts.live: self._error(error, language), **self._buttons(running=False)}
            return
        visitor.add(turn)
        visitor.drawn = {**visitor.drawn, **dict(drawn)}
        yield {parts.live: "", **self._buttons(running=False), **self._told(visitor, language)}

    def _waiting(self, event: Any, language: str) -> str | None:
        if isinstance(event, Tick) and event.ahead:
            return say(language, "queued", n=event.ahead)
        return None

    def stop(self, request: gr.Request) -> None:
        """Ends the visitor's answer; what was said so far stays."""
        visitor = self.visitors.get(str(request.session_hash))
        if visitor is not None and visitor.job is not None:
            visitor.job.cancel()

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.visitors.leave(str(request.session_hash))

    # Exporting

    async def make_video(self, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """The annotated video."""
        part = self.parts.made_video
        visitor = self.visitors.get(str(request.session_hash))
        if visitor is None or not visitor.turns:
            yield {part: markup.error(say(language, "error"), say(language, "export_empty"))}
            return
        if visitor.busy:
            yield {part: markup.error(say(language, "error"), say(language, "already"))}
            return

        def work(job: Job) -> Path | None:
            clip = self.visitors.session(visitor).clip
            return exports.make_video(visitor, job.emit) if clip.videos else None

        try:
            job = visitor.job = self._decoding.submit(work)
            async for event in job.events():
                done = f"{100 * event:.0f}" if isinstance(event, float) else "0"
                yield {part: _status(say(language, "export_making", p=done))}
        except Exception as error:
            yield {part: self._error(error, language)}
            return
        if job.result is None:
            yield {part: markup.error(say(language, "error"), say(language, "export_no_video"))}
        else:
            yield {part: exports.video_link(visitor, job.result, language)}

    # Rendering

    def everything(self, visitor: Visitor | None, language: str) -> Changes:
        """All that depends on the visitor's clip and answers."""
        parts = self.parts
        if visitor is None or visitor.look is None:
            shown = stage.nothing(language, *self.limits)
        else:
            shown = stage.opened(visitor, language)
        return {
            parts.stage: shown,
            parts.task: gr.update(choices=self.choices(visitor, language), value=""),
            parts.suggestions: self._suggestions(visitor, language),
            parts.live: "",
            **self._buttons(running=visitor is not None and visitor.busy),
            **self._told(visitor, language),
        }

    def _told(self, visitor: Visitor | None, language: str) -> Changes:
        """What answers change."""
        parts = self.parts
        turns: Sequence[Turn] = visitor.turns if visitor is not None else ()
        latest = next((turn for turn in reversed(turns) if timeline.has_events(turn.answers)), None)
        look = visitor.look if visitor is not None else None
        finders = self._finders(visitor)
        return {
            parts.thread: answers.thread(turns, language),
            parts.timeline: timeline.timeline(look, latest.answers if latest else (), language, finders),
            parts.pictures: _pictures(visitor, language),
            parts.panel: panel.panel(self.model, turns, language),
            parts.exports: exports.links(visitor, self.model, language),
            parts.make_video: gr.update(visible=bool(turns) and _has_video(visitor)),
            parts.made_video: "",
            parts.router: self._router(turns, language),
        }

    def choices(self, visitor: Visitor | None, language: str) -> list[tuple[str, str]]:
        """The task menu: tasks that take the clip, those the model knows first."""
        free = [(say(language, "free_question"), "")]
        if visitor is None or visitor.session is None:
            return free
        trained = {task.name for task in visitor.session.applicable(trained=True)}
        known, others = [], []
        for task in visitor.session.applicable():
            label = f"{task.name} · {about(language, task.name, task.family)}"
            if task.name in trained:
                known.append((label, task.name))
            else:
                others.append((f"{label} ({say(language, 'not_trained')})", task.name))
        return free + known + others

    def _finders(self, visitor: Visitor | None) -> list[str]:
        if visitor is None or visitor.session is None:
            return []
        return [task.name for task in visitor.session.applicable(trained=True) if task.family == "temporal"]

    def _suggestions(self, visitor: Visitor | None, language: str) -> str:
        if visitor is None or visitor.session is None:
            return ""
        chips = "".join(
            f'<button type="button" class="ce-chip" data-ask="{markup.text(text)}">{markup.text(text)}</button>'
            for text in asking.suggestions(visitor.session)
        )
        label = markup.text(say(language, "try_asking"))
        return f'<div class="ce-suggest"><span>{label}</span>{chips}</div>' if chips else ""

    def _router(self, turns: Sequence[Turn], language: str) -> str:
        traces = [answer.router for turn in turns for answer in turn.answers if answer.router is not None]
        if not traces:
            return markup.heading(say(language, "router")) + markup.empty("", say(language, "router_hint"))
        from crab_edge_apps.demo.router_view import router_html

        return markup.heading(say(language, "router")) + router_html(traces[-1], language)

    def _buttons(self, running: bool) -> Changes:
        parts = self.parts
        return {
            parts.go: gr.update(interactive=not running),
            parts.go_all: gr.update(interactive=not running),
            parts.stop: gr.update(interactive=running),
        }

    def _error(self, error: Exception, language: str) -> str:
        if isinstance(error, Busy):
            reason = say(language, "busy")
        elif isinstance(error, CrabError):
            reason = " ".join(str(error).split())
        else:
            traceback.print_exception(error)
            reason = say(language, "unexpected", kind=type(error).__name__)
        return markup.error(say(language, "error"), reason)


def asking_task() -> str:
    """The task of a free question."""
    from crab_edge.session import QUESTION_TASK

    return QUESTION_TASK


def _status(text: str) -> str:
    spinner = '<span class="ce-spinner" aria-hidden="true"></span>'
    return f'<p class="ce-status" role="status">{spinner}{markup.text(text)}</p>'


def _has_video(visitor: Visitor | None) -> bool:
    return visitor is not None and visitor.session is not None and bool(visitor.session.clip.videos)


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
