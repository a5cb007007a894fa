"""Clips opened while others are opened, asked about, drawn or left: the real actions over the packaged model.

What would need luck in a browser is held at the moment in question by a gate in `Model.open`.
"""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest
from crab_edge_apps.demo import visitors as visitors_module
from crab_edge_apps.demo.store import Store
from crab_edge_apps.demo.visitors import Visitors
from crab_edge_apps.demo.worker import Worker

import crab_edge

ME = SimpleNamespace(session_hash="me")
QUESTION = "What makes the sound?"


@pytest.fixture(scope="module")
def model():
    return crab_edge.load()


class Gate:
    """The model, whose `open` waits for the gate and says when it got there."""

    def __init__(self, model):
        self._model, self._wait = model, False
        self.reached, self.free = threading.Event(), threading.Event()
        self.opened = 0

    def __getattr__(self, name):
        return getattr(self._model, name)

    def open(self, media, **options):
        self.opened += 1
        if self._wait:
            self._wait = False
            self.reached.set()
            assert self.free.wait(20)
        return self._model.open(media, **options)

    def hold(self):
        self._wait = True
        self.reached.clear()
        self.free.clear()


class Page:
    """A demo without its server: actions, and what each part of the page shows."""

    def __init__(self, model, tmp_path):
        gr = pytest.importorskip("gradio", reason="needs gradio: pip install 'crab-edge[demo]'")
        from crab_edge_apps.demo import page
        from crab_edge_apps.demo.actions import Actions
        from crab_edge_apps.demo.render import Renderer

        self.gate = Gate(model)
        self.store = Store(1e9, parent=tmp_path)
        self.visitors = Visitors(self.store, self.gate, 1.0)
        self.answering, self.decoding = Worker("model", 4), Worker("decode", 4)
        with gr.Blocks():
            self.parts = page._lay_out("en")
        renderer = Renderer(model, self.parts, (5.0, 1.0))
        self.actions = Actions(self.visitors, self.answering, self.decoding, renderer, self.parts)
        self.shown = {}

    def close(self):
        self.gate.free.set()
        self.answering.close()
        self.decoding.close()
        self.store.close()

    def show(self, changes):
        for part, value in changes.items():
            if isinstance(value, str):
                self.shown[part] = value
        return changes

    async def follow(self, action, part=None):
        async for changes in action:
            self.show(changes if part is None else {part: changes})

    async def open(self, upload, language="en"):
        await self.follow(self.actions.open_files([upload], language, ME))

    async def ask(self, question=QUESTION):
        await self.follow(self.actions.ask(question, "", False, "en", ME), self.parts.live)

    def told(self):
        return self.show(self.actions.told("en", ME))

    def upload(self, source, name):
        """As Gradio hands over an uploaded file."""
        folder = self.store.uploads / name
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(source.read_bytes())
        return {"path": str(folder / name), "orig_name": name}

    @property
    def media(self):
        return sorted(
            (path for path in self.store.root.rglob("*.*") if path.is_file()), key=lambda path: path.name
        )


@pytest.fixture
def page(model, tmp_path):
    page = Page(model, tmp_path)
    yield page
    page.close()


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


async def reached(event):
    assert await asyncio.to_thread(event.wait, 20)


def test_the_clip_chosen_last_is_opened(page, sample):
    async def scenario():
        first, second, third = (page.upload(sample, f"{name}.mp4") for name in "abc")
        page.gate.hold()
        one = asyncio.create_task(page.open(first))
        await reached(page.gate.reached)
        two = asyncio.create_task(page.open(second))  # waits in the queue, and leaves it
        await asyncio.sleep(0.05)
        three = asyncio.create_task(page.open(third))
        await two
        page.gate.free.set()
        await asyncio.gather(one, three)
        assert page.visitors.get("me").names == ("c.mp4",) and page.gate.opened == 2
        assert "c.mp4" in page.shown[page.parts.stage] and page.shown[page.parts.message] == ""
        # The first is as it was before it was chosen.
        assert [path.name for path in page.media] == ["0.mp4", "a.mp4", "b.mp4"]

    run(scenario())


def test_the_same_file_chosen_twice_is_opened(page, sample):
    async def scenario():
        upload = page.upload(sample, "a.mp4")
        page.gate.hold()
        one = asyncio.create_task(page.open(upload))
        await reached(page.gate.reached)
        two = asyncio.create_task(page.open(upload))
        await asyncio.sleep(0.05)
        page.gate.free.set()
        await asyncio.gather(one, two)
        assert "a.mp4" in page.shown[page.parts.stage] and page.shown[page.parts.message] == ""
        assert [path.name for path in page.media] == ["0.mp4"]

    run(scenario())


def test_a_bad_file_chosen_last_leaves_the_clip_before(page, sample, tmp_path):
    async def scenario():
        await page.open(page.upload(sample, "a.mp4"))
        bad = tmp_path / "bad"
        bad.write_text("no film")
        page.gate.hold()
        one = asyncio.create_task(page.open(page.upload(sample, "b.mp4")))
        await reached(page.gate.reached)
        two = asyncio.create_task(page.open(page.upload(bad, "c.mp4")))
        await asyncio.sleep(0.05)
        page.gate.free.set()
        await asyncio.gather(one, two)
        assert "c.mp4" in page.shown[page.parts.message] and "ce-error" in page.shown[page.parts.message]
        assert page.visitors.get("me").names == ("a.mp4",) and "a.mp4" in page.shown[page.parts.stage]
        await page.ask()
        page.told()
        assert "electric guitar" in page.shown[page.parts.thread]

    run(scenario())


def test_nothing_is_asked_or_drawn_while_a_clip_opens(page, sample):
    async def scenario():
        await page.open(page.upload(sample, "a.mp4"))
        await page.ask()
        page.told()
        page.gate.hold()
        opening = asyncio.create_task(page.open(page.upload(sample, "b.mp4")))
        await reached(page.gate.reached)
        await page.ask("How many sounds can be heard?")
        await page.follow(page.actions.make_video("en", ME), page.parts.made_video)
        for part in (page.parts.live, page.parts.made_video):
            assert "still being read" in page.shown[part]
        page.gate.free.set()
        await opening
        assert page.shown[page.parts.live] == "" and page.visitors.get("me").turns == []

    run(scenario())


def test_a_page_speaks_the_language_chosen_while_its_clip_opened(page, sample):
    async def scenario():
        page.gate.hold()
        opening = asyncio.create_task(page.open(page.upload(sample, "a.mp4")))
        await reached(page.gate.reached)
        page.show(page.actions.speak("zh", ME))
        page.gate.free.set()
        await opening
        assert "时间线" in page.shown[page.parts.timeline] and "有声音" in page.shown[page.parts.stage]

    run(scenario())


@pytest.mark.parametrize("gone", ["says so", "is cancelled"])
def test_a_page_that_is_closed_leaves_nothing(page, sample, gone):
    async def scenario():
        first, second = page.upload(sample, "a.mp4"), page.upload(sample, "b.mp4")
        page.gate.hold()
        one = asyncio.create_task(page.open(first))
        await reached(page.gate.reached)
        two = asyncio.create_task(page.open(second))
        await asyncio.sleep(0.05)
        if gone == "says so":
            await asyncio.to_thread(page.actions.leave, ME)
            page.gate.free.set()
            await asyncio.gather(one, two)
        else:
            for task in (one, two):
                task.cancel()
            await asyncio.gather(one, two, return_exceptions=True)
            await asyncio.to_thread(page.actions.leave, ME)
            page.gate.free.set()
        # Behind all that was queued.
        await page.decoding.submit(lambda job: None).wait()
        assert page.visitors.get("me") is None and page.actions._openings.of("me") == []
        # b.mp4 was never touched: the sweep takes it.
        assert [path.name for path in page.media] == ["b.mp4"]

    run(scenario())


def test_a_video_made_before_an_answer_is_told_doesnt_hide_it(page, sample):
    async def scenario():
        await page.open(page.upload(sample, "a.mp4"))
        await page.ask()
        page.told()
        await page.ask("How many sounds can be heard?")
        assert "ce-live" in page.shown[page.parts.live]
        await page.follow(page.actions.make_video("en", ME), page.parts.made_video)
        page.told()
        assert page.shown[page.parts.live] == "" and page.shown[page.parts.thread].count("<article") == 2

    run(scenario())


def test_stop_takes_a_card_away_that_no_answer_stands_behind(page, sample):
    async def scenario():
        assert page.actions.stop(ME) == ""
        await page.open(page.upload(sample, "a.mp4"))
        await page.ask()
        assert page.actions.stop(ME) != ""  # it is about to be told
        page.told()
        assert page.actions.stop(ME) == ""

    run(scenario())


def test_jobs_that_nobody_waits_for_keep_nobody_waiting(page):
    async def scenario():
        gate = threading.Event()
        running = page.answering.submit(lambda job: gate.wait(20))
        closed = page.answering.submit(lambda job: None)
        waiting = asyncio.create_task(closed.wait())
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        last = page.answering.submit(lambda job: None)
        assert page.answering.ahead(last) == 1
        gate.set()
        await asyncio.gather(running.wait(), last.wait())

    run(scenario())


def test_clips_of_pages_that_never_said_goodbye_go(page, sample, monkeypatch):
    async def scenario():
        await page.open(page.upload(sample, "a.mp4"))
        page.visitors.forget_abandoned()
        assert len(page.visitors) == 1
        monkeypatch.setattr(visitors_module, "ABANDONED_S", 0.01)
        time.sleep(0.02)
        page.visitors.forget_abandoned()
        assert len(page.visitors) == 0 and page.media == []

    run(scenario())


def test_a_clip_may_be_asked_about_as_soon_as_it_is_shown(page, sample):
    async def scenario():
        async for changes in page.actions.open_files([page.upload(sample, "a.mp4")], "en", ME):
            page.show(changes)
            if "a.mp4" in page.shown.get(page.parts.stage, ""):
                # The page has it; what opened it hasn't had its next turn yet.
                await page.ask()
                page.told()
        assert "electric guitar" in page.shown[page.parts.thread]

    run(scenario())


@pytest.mark.parametrize("at", ["rest", "an answer"])
def test_a_page_that_lost_its_connection_is_told_that_its_clip_went(page, sample, at):
    gone = "clip was deleted"

    async def scenario():
        await page.ask()
        assert "Open a clip first" in page.shown[page.parts.live]
        await page.open(page.upload(sample, "a.mp4"))
        if at == "an answer":
            gate = threading.Event()
            page.answering.submit(lambda job: gate.wait(20))
            asking = asyncio.create_task(page.ask())
            await asyncio.sleep(0.1)
            await asyncio.to_thread(page.actions.leave, ME)  # as Gradio says when the connection breaks
            gate.set()
            await asking
            assert gone in page.shown[page.parts.live]
        else:
            await asyncio.to_thread(page.actions.leave, ME)
        for action in (
            page.actions.ask(QUESTION, "", False, "en", ME),
            page.actions.ask_all("", False, "en", ME),
        ):
            page.shown[page.parts.live] = ""
            await page.follow(action, page.parts.live)
            assert gone in page.shown[page.parts.live]
        await page.follow(page.actions.make_video("en", ME), page.parts.made_video)
        assert gone in page.shown[page.parts.made_video]
        # And it can go on.
        await page.open(page.upload(sample, "b.mp4"))
        await page.ask()
        page.told()
        assert page.shown[page.parts.live] == "" and "<article" in page.shown[page.parts.thread]

    run(scenario())


def test_only_so_many_lost_pages_are_remembered(page, sample, monkeypatch):
    monkeypatch.setattr(visitors_module, "_MOST_REMEMBERED", 2)
    for key in ("a", "b", "c"):
        page.visitors.open(key, [sample], ["a.mp4"], keep=True)
        page.visitors.leave(key)
        page.visitors.leave(f"{key}, which never had a clip")
    assert [page.visitors.lost(key) for key in ("a", "b", "c")] == [False, True, True]
