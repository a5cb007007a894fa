"""The running demo, a real browser, and a brake on the model for watching an answer in the making."""

import os
import shutil
import sys
import time
from pathlib import Path

import pytest

import crab_edge
from crab_edge import engines
from crab_edge.bundle import Bundle, default_bundle, sample_clip

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_connected: list[str] = []


def _listen(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _connected.append(str(arguments[1][0]))


# Can't be taken off again; the list only grows by what this process connects to.
sys.addaudithook(_listen)


class Brake:
    """An engine that takes `pause_s` longer for each token of an answer."""

    def __init__(self, engine):
        self._engine = engine
        self.pause_s = 0.0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def forward(self, embeds, position_ids):
        if embeds.shape[1] == 1:
            time.sleep(self.pause_s)
        return self._engine.forward(embeds, position_ids)


@pytest.fixture(scope="session")
def sample():
    return sample_clip()


@pytest.fixture(scope="module")
def demo():
    """The demo over the packaged bundle, 5 MB a file; `demo.brake` slows its model down."""
    pytest.importorskip("gradio", reason="needs gradio: pip install 'crab-edge[demo]'")
    from crab_edge_apps.demo.server import Server, Settings

    bundle = Bundle.open(default_bundle())
    brake = Brake(engines.create("auto", bundle, threads=1))
    before = dict(os.environ)
    _connected.clear()
    with Server(Settings(port=0, max_mb=5, max_minutes=1), crab_edge.load(bundle, brake)) as server:
        server.brake = brake
        yield server
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def connected():
    """Addresses that this process, the demo's server in it, has connected to."""
    return _connected


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    named = os.environ.get("CRAB_EDGE_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no Chromium found ({', '.join(BROWSERS)}); install it or name it in CRAB_EDGE_CHROMIUM")
    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Where screenshots go: CRAB_EDGE_SCREENSHOTS, else a folder of pytest's."""
    named = os.environ.get("CRAB_EDGE_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Watched:
    """A page and what went wrong on it: errors on its console, requests to anywhere but the demo."""

    def __init__(self, page, url):
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.set_default_timeout(30_000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._request)

    def _said(self, message):
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")

    def _request(self, request):
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.outside.append(request.url)

    def visit(self):
        self.page.goto(self.url)
        self.page.wait_for_selector("#ce-stage .ce-empty, #ce-player")
        return self.page

    def check(self):
        assert self.errors == [] and self.outside == []


@pytest.fixture(scope="module")
def watched(demo, browser):
    """One desktop page for a module's tests; at its end nothing may have gone wrong on it."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    watched = Watched(context.new_page(), demo.url)
    watched.visit()
    yield watched
    context.close()
    watched.check()


def visit(browser, url, **options):
    """Another page, watched."""
    context = browser.new_context(**options)
    watched = Watched(context.new_page(), url)
    watched.visit()
    return watched
