"""Pages behind a poor connection: one that breaks (sleep, another network), one out of order."""

import os
import socket
import threading
import time
from urllib.parse import urlparse

import pytest

from tests.apps.demo.conftest import visit
from tests.apps.demo.test_page import ask, opened


class Wire:
    """Passes TCP connections on to a server. `cut` breaks all; what has `late` in it comes a second late."""

    late = None

    def __init__(self, url):
        self._server = urlparse(url).hostname, urlparse(url).port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        self._sockets = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listening.accept()
            except OSError:  # closed
                return
            far = socket.create_connection(self._server)
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                if self.late is not None and self.late in data:
                    time.sleep(1)
                sink.sendall(data)
        except OSError:
            pass
        self._end(source, sink)

    def _end(self, *sockets):
        for each in sockets:
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:  # already
                pass

    def cut(self):
        self._end(*self._sockets)

    def close(self):
        self._listening.close()
        self.cut()


@pytest.fixture
def wire(demo):
    wire = Wire(demo.url)
    yield wire
    wire.close()


def choose(page, path):
    with page.expect_file_chooser() as chooser:
        page.click("#ce-file")
    chooser.value.set_files(path)


def clips(demo):
    # Unlike rglob, it doesn't mind what is removed meanwhile.
    return {
        os.path.join(where, name)
        for where, _, names in os.walk(demo.store.root)
        for name in names
        if name == "0.mp4"
    }


def quiet(page):
    """Waits until no event is under way, when called: one that breaks makes Gradio load the page anew."""
    under_way = set()
    page.on("request", lambda request: "/queue/" in request.url and under_way.add(request))
    for end in ("requestfinished", "requestfailed"):
        page.on(end, lambda request: under_way.discard(request))

    def wait():
        calm, until = 0, time.monotonic() + 20
        while calm < 5 and time.monotonic() < until:
            page.wait_for_timeout(100)
            calm = 0 if under_way else calm + 1
        assert calm == 5, under_way

    return wait


def test_a_broken_connection_is_told_and_the_page_goes_on(demo, browser, wire, sample):
    before = clips(demo)
    page = visit(browser, wire.url, viewport={"width": 1280, "height": 900}, locale="en-GB").page
    calm = quiet(page)
    choose(page, sample)
    opened(page, "sample.mp4")
    calm()
    wire.cut()
    until = time.monotonic() + 20
    while clips(demo) - before and time.monotonic() < until:
        page.wait_for_timeout(100)
    assert clips(demo) == before
    page.fill("#ce-question textarea", "What makes the sound?")
    page.press("#ce-question textarea", "Enter")
    page.wait_for_selector("#ce-live .ce-error:has-text('clip was deleted')")
    choose(page, sample)
    # Opening a clip takes the notice away.
    page.wait_for_selector("#ce-live .ce-error", state="detached")
    ask(page, "What makes the sound?", 1)
    assert "electric guitar" in page.inner_text("#ce-thread article")
    page.context.close()


def test_no_event_is_lost_when_the_end_of_a_stream_comes_late(browser, wire, sample):
    wire.late = b"close_stream"
    page = visit(browser, wire.url, viewport={"width": 1280, "height": 900}, locale="en-GB").page
    for name in ("What makes the sound?", "How many different sounds can be heard?"):
        choose(page, sample)
        page.wait_for_function("!document.querySelector('#ce-thread article')")
        opened(page, "sample.mp4")
        # The answer to this request overtakes the news that the stream of the opening has ended.
        ask(page, name, 1)
        assert name in page.inner_text("#ce-thread article")
    page.context.close()
