"""The demo's web server: one model, one page, limits, and an orderly end."""

from __future__ import annotations

import contextlib
import hmac
import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crab_edge_apps.demo.guard import Guard, is_loopback
from crab_edge_apps.demo.store import Store
from crab_edge_apps.demo.worker import Worker

from crab_edge.errors import InputError

_UPLOADS_AT_ONCE = 12
_QUEUED_EVENTS = 200


@dataclass(frozen=True)
class Settings:
    """What the command line says; see `crab-edge demo --help`."""

    bundle: Path | None = None
    engine: str = "auto"
    threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 7860
    share: bool = False
    password: str | None = None
    language: str | None = None
    max_mb: float = 200.0
    max_minutes: float = 10.0
    waiting: int = 8
    grammar: bool = True

    def check(self) -> None:
        """InputError for what can't be."""
        for name, value in (("--max-mb", self.max_mb), ("--max-minutes", self.max_minutes)):
            if not 0 < value < float("inf"):
                raise InputError(f"{name} {value:g}: expected more than 0")
        if not self.host.strip():
            raise InputError("--host is empty; give an address, or leave it out for this machine only")
        if self.password is not None and not self.password.strip():
            raise InputError("--password is empty; give one, or leave the option out")


class Server:
    """The running demo, as a context manager. `url` is where it listens; `model` what it serves."""

    def __init__(self, settings: Settings, model: Any = None) -> None:
        """`model`: an opened `crab_edge.session.Model` to use instead of the settings' bundle."""
        settings.check()
        _quiet_gradio()
        import gradio  # noqa: F401 - before the model: a missing package should be said at once

        port = _free_port(settings.host, settings.port)
        self.settings = settings
        self.model = model or _load(settings)
        max_bytes = int(settings.max_mb * 1e6)
        self.store = Store(_UPLOADS_AT_ONCE * max_bytes)
        self._closing = threading.Lock()
        self._answering = Worker("model", settings.waiting)
        self._decoding = Worker("decode", settings.waiting)
        try:
            self.url = self._launch(port, max_bytes)
        except BaseException:
            self.close()
            raise

    def _launch(self, port: int, max_bytes: int) -> str:
        # Read by Gradio when it makes its components: uploads go to the private folder.
        os.environ["GRADIO_TEMP_DIR"] = str(self.store.uploads)
        from crab_edge_apps.demo import page
        from crab_edge_apps.demo.visitors import Visitors
        from starlette.middleware import Middleware

        settings = self.settings
        self.visitors = Visitors(self.store, self.model, settings.max_minutes)
        self.store.also_sweep.append(self.visitors.forget_abandoned)
        shown = page.Shown(settings.max_mb, settings.max_minutes, settings.language)
        self.blocks = page.build(self.model, self.visitors, (self._answering, self._decoding), shown)
        guard = Middleware(
            Guard,
            local=is_loopback(settings.host) and not settings.share,
            host=settings.host,
            max_upload=max_bytes,
            reserved=self.store.reserved,
        )
        self.blocks.queue(max_size=_QUEUED_EVENTS, default_concurrency_limit=None, api_open=False)
        self.blocks.launch(
            server_name=settings.host,
            server_port=port,
            share=settings.share,
            auth=_checker(settings.password),
            auth_message=None if settings.password is None else "Crab Edge. Any name, and the password.",
            max_file_size=max_bytes,
            allowed_paths=[str(self.store.root / "visitors"), str(_example_folder())],
            blocked_paths=[str(self.store.root / "lock")],
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
            theme=_theme(),
            css_paths=[page.STATIC / "demo.css"],
            head="".join(_script(page.STATIC, name) for name in ("stream.js", "demo.js")).replace(
                "MAX_BYTES", str(max_bytes)
            ),
            favicon_path=str(page.STATIC / "icon.svg"),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            state_session_capacity=200,
        )
        return str(self.blocks.share_url or self.blocks.local_url)

    def close(self) -> None:
        """Ends answers, the server, and removes the private folder."""
        with self._closing:
            self._answering.close()
            self._decoding.close()
            blocks = getattr(self, "blocks", None)
            if blocks is not None:
                with contextlib.suppress(Exception):
                    blocks.close(verbose=False)
            self.store.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(settings: Settings) -> None:
    """Serves until Ctrl-C or SIGTERM, then tidies up."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Server(settings) as server:
        _announce(server)
        while not stop.wait(3600):
            pass
    print("stopped; all clips removed")


def _announce(server: Server) -> None:
    settings = server.settings
    print(f"{server.model.bundle.identity} on {server.url}  (Ctrl-C stops)", flush=True)
    if not (is_loopback(settings.host) and not settings.share) and settings.password is None:
        print("note: anybody who reaches this address can use it; --password asks for one", file=sys.stderr)


def _load(settings: Settings) -> Any:
    import crab_edge

    model = crab_edge.load(settings.bundle, settings.engine, threads=settings.threads)
    model.grammar = settings.grammar
    if model.grammar:
        model.grammars()
    return model


def _quiet_gradio() -> None:
    """Before Gradio is imported: no telemetry, and no proxy for its check of its own address."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in ("NO_PROXY", "no_proxy"):
        before = [entry for entry in os.environ.get(name, "").split(",") if entry]
        own = [entry for entry in ("127.0.0.1", "localhost") if entry not in before]
        os.environ[name] = ",".join(before + own)


def _free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0; InputError when it can't be listened on."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(
            f"can't listen on {host} port {port} ({error.strerror}); choose another one with --port or --host"
        ) from None


def _checker(password: str | None) -> Any:
    """Gradio's login asks for a name too; any will do."""
    if password is None:
        return None
    wanted = password.encode()
    return lambda name, given: hmac.compare_digest(given.encode(), wanted)


def _example_folder() -> Path:
    from crab_edge.bundle import sample_clip

    with contextlib.suppress(InputError):
        return sample_clip()
    return Path(os.devnull)


def _script(folder: Path, name: str) -> str:
    return f"<script>{(folder / name).read_text('utf-8')}</script>"


def _theme() -> Any:
    import gradio as gr

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    hues = {"primary_hue": "teal", "neutral_hue": "slate"}
    return gr.themes.Base(font=fonts, font_mono=mono, radius_size="lg", spacing_size="md", **hues)
