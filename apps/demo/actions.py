"""What the page does when something is pressed. Each action yields the parts of the page that change.

Nothing here blocks the server's event loop: decoding and answering happen in the workers' threads.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gradio as gr
from crab_edge_apps.demo import answers, asking, exports, notices, pictures
from crab_edge_apps.demo.openings import Opening, Openings
from crab_edge_apps.demo.render import Changes, Parts, Renderer
from crab_edge_apps.demo.texts import say
from crab_edge_apps.demo.turns import Turn
from crab_edge_apps.demo.visitors import Visitor, Visitors
from crab_edge_apps.demo.worker import Job, Tick, Worker

from crab_edge import tasks
from crab_edge.errors import CrabError

# Text is sent at most so often; more would only load the browser.
_SEND_EVERY_S = 0.06
_LEAVE_WAIT_S = 15.0


class Actions:
    """The page's events over one model."""

    def __init__(
        self, visitors: Visitors, answering: Worker, decoding: Worker, renderer: Renderer, parts: Parts
    ) -> None:
        self.visitors = visitors
        self.renderer = renderer
        self.parts = parts
        self._answering = answering
        self._decoding = decoding
        self._openings = Openings()

    # Opening

    async def open_files(self, files: Any, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """Uploaded files become the clip."""
        given = files if isinstance(files, list) else [files]
        async for changes in self._open(given, language, str(request.session_hash)):
            yield changes

    async def open_recording(self, file: Any, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """What the camera or the microphone took becomes the clip."""
        if not file:
            # Emptying an input is a change too. Without a yield, Gradio would empty the whole page.
            yield {self.parts.message: gr.skip()}
            return
        async for changes in self._open([file], language, str(request.session_hash), recorded=True):
            yield changes

    async def open_example(self, language: str, request: gr.Request) -> AsyncIterator[Changes]:
        """The clip that ships with the package."""
        async for changes in self._open(None, language, str(request.session_hash)):
            yield changes

    async def _open(
        self, given: list[Any] | None, language: str, key: str, *, recorded: bool = False
    ) -> AsyncIterator[Changes]:
        parts = self.parts
        visitor: Visitor | None = None
        changes: Changes = {parts.message: gr.skip()}
        with self._openings.begin(key) as opening:
            yield {parts.message: notices.status(say(language, "opening"))}
            try:
                await self._end_running(key)
                # None where this opening is no longer wanted.
                visitor = await opening.decodes(
                    self._decoding.submit(lambda job: self._opened(job, opening, key, given, recorded))
                ).wait()
            except Exception as error:
                if not opening.unwanted:
                    told = notices.explained(error, opening.language or language)
                    changes = {parts.message: told, **self._emptied()}
            if visitor is not None and not opening.unwanted:
                shown = self.renderer.everything(visitor, opening.language or language)
                changes = {parts.message: "", parts.live: "", **self._emptied(), **shown}
        # Not inside: who sees the clip may ask about it at once.
        yield changes

    def _opened(
        self, job: Job, opening: Opening, key: str, given: list[Any] | None, recorded: bool
    ) -> Visitor | None:
        def left() -> bool:
            return opening.left or job.cancelled()

        uploads: list[Path] = []
        if given is None:
            from crab_edge.bundle import sample_clip

            clip, names = [sample_clip()], [sample_clip().name]
        else:
            uploads, names = self.visitors.store.uploaded(given)
            clip = uploads
        visitor = self.visitors.open(
            key,
            clip,
            names,
            keep=given is None,
            recorded=recorded,
            unwanted=lambda: opening.unwanted or left(),
        )
        if left():  # perhaps just after it was asked
            self.visitors.leave(key)
            for upload in uploads:
                self.visitors.store.drop(upload)
        return visitor

    def _emptied(self) -> Changes:
        """The inputs forget what they were given: it's the page's clip now."""
        inputs = (self.parts.camera, self.parts.microphone)
        return {self.parts.file: None, **{part: gr.update(value=None) for part in inputs}}

    async def _end_running(self, key: str) -> None:
        """Stops the visitor's answer and waits for its end."""
        visitor = self.visitors.get(key)
        if visitor is None or visitor.job is None:
            return
        visitor.job.cancel()
        until = time.monotonic() + _LEAVE_WAIT_S
        while visitor.busy and not visitor.job.withdraw() and time.monotonic() < until:
            await asyncio.sleep(0.05)

    # Asking. These change the card of the running answer only; `told` then shows what came of it.

    async def ask(
        self, question: str, task: str, router: bool, language: str, request: gr.Request
    ) -> AsyncIterator[Any]:
        """One question or one task, streamed."""
        name = task or None
        words = (question or "").strip() or None
        if name is not None and not tasks.get(name).needs_question:
            words = None
        elif words is None:
            key = str(request.session_hash)
            without = self.visitors.get(key) is None
            yield notices.refused(language, self._needs(key) if without else "need_question")
            return
        asked_at = time.perf_counter()

        def work(job: Job, visitor: Visitor) -> Turn:
            session = self.visitors.session(visitor)
            return asking.answer(job, session, words, name, router=router, asked_at=asked_at)

        said, sent = "", 0.0
        async for event in self._run(request, work, language):
            if isinstance(event, Shown):
                yield event.html
                continue
            if isinstance(event, str):
                said += event
            if time.monotonic() - sent >= _SEND_EVERY_S:
                sent = time.monotonic()
                reading = say(language, "answering" if said else "thinking")
                status = notices.waiting(event, language) or reading
                yield answers.live(language, words, name or asking.free_task(), status, said)

    async def ask_all(
        self, question: str, untrained: bool, language: str, request: gr.Request
    ) -> AsyncIterator[Any]:
        """Every task that applies, laid out together."""
        words = (question or "").strip() or None
        asked_at = time.perf_counter()
        names: list[str] = []

        def work(job: Job, visitor: Visitor) -> Turn:
            session = self.visitors.session(visitor)
            run, skipped = asking.plan(session, words, untrained)
            names.extend(run)
            turn = asking.all_tasks(job, session, words, run, asked_at=asked_at)
            turn.skipped = tuple(skipped)
            return turn

        tokens, sent = 0, 0.0
        async for event in self._run(request, work, language):
            if isinstance(event, Shown):
                yield event.html
                continue
            if isinstance(event, int):
                tokens = event
            if time.monotonic() - sent >= _SEND_EVERY_S:
                sent = time.monotonic()
                running = say(language, "all_running", n=len(names), tokens=tokens)
                status = notices.waiting(event, language) or running
                yield answers.live(language, words, say(language, "all_tasks"), status)

    async def _run(
        self, request: gr.Request, work: Callable[[Job, Visitor], Turn], language: str
    ) -> AsyncIterator[Any]:
        """Runs a job: what it emits, `Tick`s, and `Shown` for what is to be shown instead of them."""
        key = str(request.session_hash)
        visitor = self.visitors.get(key)
        if self._openings.of(key):
            yield Shown(notices.refused(language, "still_opening"))
            return
        if visitor is None:
            yield Shown(notices.refused(language, self._needs(key)))
            return
        if visitor.busy:
            drawing = visitor.job is not visitor.asked
            # The running answer's card stays; a video that is being drawn has none.
            yield Shown(notices.refused(language, "already") if drawing else gr.skip())
            return

        def whole(job: Job) -> Turn:
            turn = work(job, visitor)
            clip = self.visitors.session(visitor).clip
            visitor.drawn = {**visitor.drawn, **dict(pictures.drawn(clip, turn.answers))}
            visitor.add(turn)
            return turn

        try:
            job = visitor.job = visitor.asked = self._answering.submit(whole)
            yield Tick(self._answering.ahead(job))
            async for event in job.events():
                if job.cancelled() and job.withdraw():
                    yield Shown("")
                    return
                yield event
            if self.visitors.get(key) is not visitor:
                yield Shown(self._instead(key, language))
        except Exception as error:
            mine = self.visitors.get(key) is visitor
            yield Shown(notices.explained(error, language) if mine else self._instead(key, language))

    def _instead(self, key: str, language: str) -> str:
        """What stands for the card of a clip that is gone: nothing where another was opened meanwhile."""
        return notices.refused(language, "clip_gone") if self.visitors.lost(key) else ""

    def _needs(self, key: str) -> str:
        """What a page without a clip is told."""
        return "clip_gone" if self.visitors.lost(key) else "need_clip"

    def told(self, language: str, request: gr.Request) -> Changes:
        """What an answer changed, once it is there."""
        key = str(request.session_hash)
        visitor = self.visitors.get(key)
        job = visitor.asked if visitor is not None else None
        done = job is not None and job.finished.is_set() and not job.failed
        if visitor is None or job is visitor.told or not done:
            return {self.parts.live: gr.skip()}
        visitor.told = job
        changes = {self.parts.live: "", **self.renderer.told(visitor, language)}
        # Another clip may have been shown while this was written.
        return changes if self.visitors.get(key) is visitor else {self.parts.live: gr.skip()}

    def stop(self, request: gr.Request) -> Any:
        """Ends the visitor's answer; what was said so far stays. A card without an answer goes."""
        visitor = self.visitors.get(str(request.session_hash))
        if visitor is not None and visitor.job is not None:
            visitor.job.cancel()
        running = visitor is not None and (visitor.busy or visitor.asked is not visitor.told)
        return gr.skip() if running else ""

    def leave(self, request: gr.Request) -> None:
        """The page was closed, perhaps while its clip was being decoded."""
        key = str(request.session_hash)
        self._openings.leave(key)
        self.visitors.leave(key)

    # Exporting

    async def make_video(self, language: str, request: gr.Request) -> AsyncIterator[str]:
        """The annotated video, as a link."""
        key = str(request.session_hash)
        visitor = self.visitors.get(key)
        if self._openings.of(key):
            yield notices.refused(language, "still_opening")
            return
        if visitor is None and self.visitors.lost(key):
            yield notices.refused(language, "clip_gone")
            return
        if visitor is None or not visitor.turns:
            yield notices.refused(language, "export_empty")
            return
        if visitor.busy:
            yield notices.refused(language, "already")
            return
        if "video" not in visitor.facts.kinds:
            yield notices.refused(language, "export_no_video")
            return

        def work(job: Job) -> Path:
            def progress(share: float) -> None:
                if job.cancelled():
                    raise CrabError("stopped")
                job.emit(share)

            return exports.make_video(visitor, progress)

        share, sent = 0.0, 0.0
        try:
            job = visitor.job = self._decoding.submit(work)
            async for event in job.events():
                share = event if isinstance(event, float) else share
                if time.monotonic() - sent >= 5 * _SEND_EVERY_S:
                    sent = time.monotonic()
                    yield notices.status(say(language, "export_making", p=f"{100 * share:.0f}"))
            yield exports.video_link(visitor, job.result, language)
        except Exception as error:
            yield notices.explained(error, language)

    # Arriving

    def speak(self, language: str, request: gr.Request) -> Changes:
        """The page in another language."""
        key = str(request.session_hash)
        self._openings.speak(key, language)
        return self.renderer.translated(self.visitors.get(key), language)


class Shown:
    """HTML in place of the running answer's card."""

    def __init__(self, html: Any) -> None:
        self.html = html
