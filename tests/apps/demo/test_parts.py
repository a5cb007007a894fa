"""The demo's parts by themselves: HTML from hostile texts, the worker's queue, the private folder."""

import asyncio
import contextlib
import fcntl
import re
import string
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from crab_edge_apps.demo import answers, exports, markup, panel, stage, texts, timeline
from crab_edge_apps.demo.guard import Guard
from crab_edge_apps.demo.look import Look, levels
from crab_edge_apps.demo.store import PREFIX, Store, remove_abandoned
from crab_edge_apps.demo.turns import Skipped, Turn
from crab_edge_apps.demo.visitors import Visitor
from crab_edge_apps.demo.worker import Busy, Tick, Worker

from crab_edge.errors import CrabError, InputError
from crab_edge.results import Answer, Box, Caption, Choice, Event, Timings, Unparsed

EVIL = """<img src=x onerror="alert(1)">'${alert(2)}{{3}}`"""


def answer(*parsed, task="avvp", cached=0, raw=EVIL):
    timings = Timings(generate_s=0.1, prompt_tokens=9, cached_tokens=cached, tokens=5)
    return Answer(task, raw, tuple(parsed), timings, question=EVIL, notices=(EVIL,))


def hostile(html):
    """What of a page's HTML would run, or look like one of Gradio's templates."""
    return re.findall(r"<img src=x|onerror=\"|\$\{|\{\{|`", html)


def test_hostile_texts_stay_texts():
    event = Event(EVIL, 1.0, 3.0, "audio-visual")
    look = Look(10.0, ((0.0, "data:,"),), "data:,", 1.5)
    one = Turn("one", EVIL, (answer(event, Choice(EVIL), Box(EVIL, 1, 2, 3, 4)),), first_token_s=0.1)
    every = Turn(
        "all", EVIL, (answer(Caption(EVIL)), answer(Unparsed(EVIL))), (Skipped("arig", "spatial", EVIL),)
    )
    for language in texts.LANGUAGES:
        for html in (
            answers.thread([one, every], language),
            answers.live(language, EVIL, EVIL, EVIL, EVIL),
            timeline.timeline(look, one.answers, language, [EVIL]),
            markup.error(EVIL, EVIL),
        ):
            assert hostile(html) == [] and "alert(1)" in html


def test_every_picture_gets_its_own_room():
    facts = SimpleNamespace(
        kinds=("image", "audio", "video", "image"),
        sizes=((640, 360), (48, 64), (5, 7)),  # videos come first
        sound=True,
        notices=(),
    )
    names = ("a.png", "b.wav", "c.mp4", "d.png")
    visitor = SimpleNamespace(media=names, names=names, facts=facts, look=Look(10.0, (), None, 1.5))
    html = stage.opened(visitor, "en", 5, 1)
    found = [
        (kind, dict(re.findall(r'(\w+)="([^"]*)"', rest)))
        for kind, rest in re.findall(r"<(img|audio|video) ([^>]*)>", html)
    ]
    rooms = [(kind, name["src"][-5:], name.get("width"), name.get("height")) for kind, name in found]
    assert rooms == [
        ("img", "a.png", "48", "64"),
        ("audio", "b.wav", None, None),
        ("video", "c.mp4", "640", "360"),
        ("img", "d.png", "5", "7"),
    ]


def test_tracks_are_apart_and_in_place():
    events = [
        Event("dog", 2.0, 7.0, "visual"),
        Event("dog", 2.0, 7.0, "visual"),
        Event("bell", 5.0, 10.0, "audio"),
        Event("cat", 0.0, 1.0, "audio-visual"),
    ]
    said = [answer(*events)]
    assert [lane.label for lane in timeline.lanes(said, "visual")] == ["dog", "cat"]
    assert [lane.label for lane in timeline.lanes(said, "audio")] == ["bell", "cat"]
    html = timeline.timeline(Look(10.0, ((0.0, "data:,"),), "data:,", 1.5), said, "en", [])
    seen, heard = html.split('class="ce-track ce-heard"')
    assert 'left:20.000%;width:50.000%" data-seek="2.000" data-end="7.000"' in seen
    assert "bell" not in seen and "dog" not in heard and seen.count(">dog<") == 1
    assert 'aria-label="bell, Heard, from 5.0 to 10.0 seconds"' in heard


def test_the_clip_without_a_stream_lacks_its_track():
    silent = timeline.timeline(Look(5.0, ((0.0, "data:,"),), None, 1.5), [], "en", ["ave"])
    assert "ce-seen" in silent and "ce-heard" not in silent and "ave" in silent
    assert timeline.timeline(Look(0.0, (), None, 1.5), [], "en", []) == ""


def test_spectrogram_shows_a_tone_where_it_is():
    rate, seconds = 16_000, 20.0
    wave = np.zeros(round(seconds * rate), np.float32)
    wave[12 * rate : 15 * rate] = np.sin(2 * np.pi * 1000 * np.arange(3 * rate) / rate)

    def waveform(window):
        return wave[round(window.start_s * rate) : round(window.end_s * rate)]

    track = SimpleNamespace(duration_s=seconds, audible=lambda window: True, waveform=waveform)
    shades = levels(track, seconds, columns=200, rows=40)
    assert shades.shape == (40, 200) and shades.min() >= 0 and shades.max() == 1
    row, column = np.unravel_index(shades.argmax(), shades.shape)
    assert 120 <= column < 150 and shades[:, :115].max() < 0.1 and shades[:, 155:].max() < 0.1
    assert abs(np.geomspace(7600, 70, 40)[row] - 1000) < 150


def slots(text):
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same_things():
    assert texts.TEXTS["en"].keys() == texts.TEXTS["zh"].keys()
    for key, text in texts.TEXTS["en"].items():
        slots = [
            {name for _, name, _, _ in string.Formatter().parse(t) if name}
            for t in (text, texts.say("zh", key))
        ]
        assert slots[0] == slots[1], key
    from crab_edge import tasks

    for language in texts.LANGUAGES:
        assert all(texts.about(language, name, "?") != "?" for name in tasks.names())


@pytest.mark.parametrize(
    ("header", "language"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh"),
        ("de,en;q=0.5", "en"),
        ("", "en"),
        ("en;q=x, zh;q=0.1", "zh"),
        (";;,", "en"),
    ],
)
def test_the_browsers_language(header, language):
    assert texts.preferred(header) == language


def test_first_token_of_the_first_and_the_next_question():
    turns = [
        Turn("one", "a", (answer(),), first_token_s=0.5),
        Turn("one", "b", (answer(cached=600),), first_token_s=0.02),
    ]
    assert panel.first_and_next(turns) == (0.5, 0.02) and panel.first_and_next([]) == (None, None)


# The worker


def test_jobs_run_one_after_the_other_and_the_queue_is_bounded():
    async def run():
        worker, began, gate, order = Worker("test", 2), threading.Event(), threading.Event(), []
        first = worker.submit(lambda job: (began.set(), gate.wait(5), order.append(1)))
        began.wait(5)
        second = worker.submit(lambda job: order.append(2))
        third = worker.submit(lambda job: order.append(3))
        with pytest.raises(Busy):
            worker.submit(lambda job: None)
        assert worker.ahead(third) == 2
        async with contextlib.aclosing(third.events()) as events:
            event = await anext(events)
            assert isinstance(event, Tick) and event.ahead == 2
        # Nobody reads its events any more: it has left the queue.
        assert third.cancelled() and third.finished.is_set() and not worker.withdraw(third)
        assert not worker.withdraw(first) and worker.withdraw(second)
        second = worker.submit(lambda job: order.append(2))
        gate.set()
        await asyncio.gather(first.wait(), second.wait())
        assert order == [1, 2]
        worker.close()

    asyncio.run(run())


@pytest.mark.parametrize("ends", ["done", "failed", "withdrawn"])
def test_whoever_hears_of_the_end_finds_the_job_finished(ends):
    async def run():
        worker, began, gate = Worker("test", 2), threading.Event(), threading.Event()

        def work(job):
            assert gate.wait(5) and ends != "failed", "no work"

        running = worker.submit(lambda job: (began.set(), work(job)))
        job = worker.submit(lambda job: None) if ends == "withdrawn" else running
        send, seen = job._send, []
        # As if the worker's thread lost its turn for long, right after it had told.
        job._send = lambda *what: (
            seen.append(job.finished.is_set()),
            send(*what),
            threading.Event().wait(0.1),
        )
        assert await asyncio.to_thread(began.wait, 5)
        if ends == "withdrawn":
            assert worker.withdraw(job)
        gate.set()
        with contextlib.suppress(AssertionError):
            await job.wait()
        assert seen == [True] and job.finished.is_set() and job.failed == (ends == "failed")
        worker.close()

    asyncio.run(run())


def test_what_a_job_emits_and_raises():
    def work(job):
        job.emit("a")
        raise InputError("no")

    async def run():
        worker, got = Worker("test", 2), []
        job = worker.submit(work)
        with pytest.raises(InputError, match="no"):
            async for event in job.events():
                got.append(event)
        assert got == ["a"] and job.failed
        worker.close()

    asyncio.run(run())


# The private folder


def test_the_folder_is_private_and_goes(tmp_path):
    store = Store(1000, parent=tmp_path)
    assert store.root.stat().st_mode & 0o077 == 0
    sent = store.uploads / "hash" / "../evil name.MP4.exe"
    (store.uploads / "hash").mkdir()
    sent.write_bytes(b"x" * 600)
    paths, names = store.uploaded([{"path": str(sent), "orig_name": "a/../b\\c.mp4"}])
    assert names == ["c.mp4"]
    place = store.take(paths[0], store.new_folder(), 0)
    assert place.name == "0.bin" and place.stat().st_mode & 0o077 == 0 and not paths[0].exists()
    for size, fits in ((300, True), (500, False)):
        with store.reserved(size) as room:
            assert room == fits
    # Another visitor's equal upload lay at the same path.
    again, _ = store.uploaded([{"path": str(sent)}])
    second = store.take(again[0], store.new_folder(), 0)
    assert second.read_bytes() == place.read_bytes() and second != place
    store.remove(second.parent)
    for other in ("/etc/passwd", str(place), str(store.uploads), "", "\0", str(store.root / "lock")):
        with pytest.raises(InputError):
            store.uploaded([{"path": other}])
    (store.uploads / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError):
        store.uploaded([{"path": str(store.uploads / "link")}])
    store.sweep(older_than_s=-1)
    assert list(store.uploads.iterdir()) == []
    store.close()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_and_a_running_ones_is_not(tmp_path):
    dead, alive, other = tmp_path / f"{PREFIX}dead", tmp_path / f"{PREFIX}alive", tmp_path / "mine"
    for folder in (dead, alive, other):
        folder.mkdir()
        (folder / "lock").touch()
    with (alive / "lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        remove_abandoned(tmp_path)
    assert not dead.exists() and alive.exists() and other.exists()


def test_only_the_last_annotated_videos_stay(tmp_path, monkeypatch):
    def annotate(video, told, out, progress):
        progress(0.5)
        out.touch()

    def broken(share):
        raise CrabError("stopped")

    monkeypatch.setattr("crab_edge_apps._draw.annotate_video", annotate)
    facts = SimpleNamespace(kinds=("video",))
    visitor = Visitor(tmp_path, (tmp_path / "a.mp4",), ("a.mp4",), Look(1.0, (), None, 1.0), facts, None)
    made = [exports.make_video(visitor, lambda share: None) for _ in range(3)]
    with pytest.raises(CrabError):
        exports.make_video(visitor, broken)
    made.append(exports.make_video(visitor, lambda share: None))
    assert len(set(made)) == 4, "no browser shows an old one under a new one's name"
    assert sorted(tmp_path.iterdir()) == sorted(made[-2:])


# The guard


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/", {"host": "127.0.0.1:7860"}, b"", 200),
        ("/", {"host": "[::1]:7860"}, b"", 200),
        ("/", {"host": "rebound.example"}, b"", 421),
        ("/gradio_api/queue/join", {"content-type": "application/json"}, b'{"data": ["a://b"]}', 200),
        (
            "/gradio_api/queue/join",
            {"content-type": "application/json"},
            b'{"data": [[{"path": "https://x/y"}]]}',
            403,
        ),
        ("/gradio_api/queue/join", {"content-type": "application/json"}, b"{", 400),
        ("/gradio_api/queue/join", {"content-type": "application/json"}, b"[" * 100_000, 400),
        ("/gradio_api/queue/join", {}, b"x" * 2_000_000, 413),
        ("/gradio_api/upload", {"content-length": "1000"}, b"", 200),
        ("/gradio_api/upload", {"content-length": "9000000"}, b"", 413),
        ("/gradio_api/upload", {"content-length": "100000"}, b"", 507),
        ("/gradio_api/upload", {"transfer-encoding": "chunked"}, b"", 411),
        ("/gradio_api/upload", {"transfer-encoding": "chunked", "content-length": "1000"}, b"", 411),
        ("/gradio_api/vibe-edit", {}, b"", 404),
        ("/monitoring", {}, b"", 404),
    ],
)
def test_guard(path, headers, body, status):
    reached, sent = [], []

    async def app(scope, receive, send):
        reached.append((await receive()).get("body"))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    guard = Guard(
        app,
        local=True,
        max_upload=1_000_000,
        reserved=lambda size: contextlib.nullcontext(size < 50_000),
    )
    asyncio.run(guard(posted(path, headers), receive, send))
    assert sent[0]["status"] == status and bool(reached) == (status == 200)
    assert any(name == b"content-security-policy" for name, _ in sent[0]["headers"])
    if reached:
        assert reached == [body]


def posted(path, headers):
    given = {"host": "localhost:7860", **headers}
    raw = [(name.encode(), value.encode()) for name, value in given.items()]
    return {"type": "http", "path": path, "method": "POST", "headers": raw}


def test_uploads_at_one_time_share_the_room(tmp_path):
    """Nothing is on the disk yet when the second one asks; a broken one gives its room back."""

    async def run():
        store, statuses, gate = Store(1000, parent=tmp_path), [], asyncio.Event()

        async def app(scope, receive, send):
            await gate.wait()
            if await receive() is None:
                raise OSError("gone")
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def send(message):
            statuses.extend([message["status"]] if "status" in message else [])

        async def upload(arrives, size=600):
            async def receive():
                return {"type": "http.request", "body": b""} if arrives else None

            scope = posted("/gradio_api/upload", {"content-length": str(size)})
            await Guard(app, local=True, max_upload=1000, reserved=store.reserved)(scope, receive, send)

        broken = asyncio.create_task(upload(False))
        await asyncio.sleep(0)
        await upload(True)
        assert statuses == [507]
        gate.set()
        with pytest.raises(OSError, match="gone"):
            await broken
        await upload(True)
        assert statuses == [507, 200]
        store.close()

    asyncio.run(run())


# The command


def test_the_command_is_cheap_and_says_what_it_lacks():
    code = "import sys; from crab_edge_apps.cli import run; code = run({0}); print(code, *sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code.format(["demo", "--help"])], capture_output=True, text=True, check=True
    )
    assert "--password" in shown.stdout
    loaded = set(shown.stdout.split())
    assert not loaded & {"gradio", "numpy", "av", "onnxruntime", "fastapi"}
    without = "import sys; sys.modules['gradio'] = None; " + code.format(["demo", "--port", "0"])
    lacking = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=True)
    assert lacking.stdout.startswith("2 ") and lacking.stderr.count("\n") == 1
    assert "needs gradio" in lacking.stderr and "crab-edge[demo]" in lacking.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_mb": 0}, "--max-mb 0"),
        ({"max_minutes": float("nan")}, "--max-minutes nan"),
        ({"password": " "}, "--password is empty"),
        ({"host": ""}, "--host is empty"),
        ({"host": "203.0.113.7", "port": 0}, "can't listen on 203.0.113.7"),
    ],
)
def test_settings_that_cant_be(options, words):
    from crab_edge_apps.demo.server import Server, Settings

    with pytest.raises(InputError, match=words):
        Server(Settings(**options), model=object())


def test_a_taken_port_is_said():
    import socket

    from crab_edge_apps.demo.server import Server, Settings

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}"):
            Server(Settings(port=port), model=object())
