"""What the web server lets in, before Gradio sees it.

Gradio can fetch addresses that a client names and serves any path below its folders; neither is wanted here.
The same place forbids the browser to load anything from elsewhere and refuses names that a foreign page could
point at this machine (DNS rebinding).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import unquote

POLICY = "; ".join(
    [
        "default-src 'self' data: blob:",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "connect-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
# What the page and the API client use of Gradio's routes; its proxies, editors and monitors stay shut.
_OPEN = tuple(
    "/config /login /logout /assets/ /static/ /favicon.ico /theme.css /manifest.json /robots.txt".split()
) + tuple(
    f"/gradio_api/{route}"
    for route in (
        "queue/ run/ call/ upload file= info heartbeat/ startup-events cancel reset login_check user token "
        "app_id theme.css"
    ).split()
)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_MOST_JSON = 1 << 20
_SLACK = 1 << 16


def is_loopback(host: str) -> bool:
    """Whether an address to listen on is this machine's own."""
    return host in ("localhost", "::1") or host.startswith("127.")


class Guard:
    """ASGI middleware. `local`: answer to loopback names only.

    `reserved(bytes)`: a context that keeps room for an upload while it arrives; gives whether there is any.
    """

    def __init__(
        self,
        app: Any,
        *,
        local: bool,
        max_upload: int,
        reserved: Callable[[int], AbstractContextManager[bool]],
        host: str = "",
    ) -> None:
        self.app = app
        self._names = {*_LOOPBACK, host} if local else None
        self._max_upload = max_upload
        self._reserved = reserved

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None and _is_upload(scope):
            with self._reserved(_length(scope)) as room:
                if room:
                    await self._pass(scope, receive, send)
                    return
            refusal = 507, "no room for more uploads at the moment; try again later"
        if refusal is None and scope["method"] == "POST":
            body = await _body(receive)
            refusal = _bad_body(scope, body)
            receive = _replay(body or b"", receive)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        await self._pass(scope, receive, send)

    async def _pass(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), *_HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: dict[str, Any]) -> tuple[int, str] | None:
        """(status, reason) of a request that isn't let in by its head."""
        headers = dict(scope["headers"])
        if self._names is not None and _host(headers) not in self._names:
            return 421, "this demo answers to localhost only; start it with --host to open it to others"
        path = _path(scope)
        if path != "/" and not path.startswith(_OPEN):
            return 404, "there is no such page here"
        if path.lower().startswith(("/gradio_api/file=http:", "/gradio_api/file=https:")):
            return 403, "nothing is fetched from elsewhere"
        if _is_upload(scope):
            # A chunked body goes before a stated length, and may be longer.
            if b"transfer-encoding" in headers or not headers.get(b"content-length", b"").isdigit():
                return 411, "say how long the upload is (Content-Length)"
            length = _length(scope)
            if length > self._max_upload + _SLACK:
                return 413, f"too large: {length / 1e6:.0f} MB, at most {self._max_upload / 1e6:.0f}"
        return None


def _path(scope: dict[str, Any]) -> str:
    return unquote(scope["path"])


def _is_upload(scope: dict[str, Any]) -> bool:
    return _path(scope).endswith("/upload")


def _length(scope: dict[str, Any]) -> int:
    return int(dict(scope["headers"])[b"content-length"])


def _host(headers: dict[bytes, bytes]) -> str:
    host = headers.get(b"host", b"").decode("latin-1").lower()
    name, _, port = host.rpartition(":")
    return name if name and port.isdigit() else host


async def _body(receive: Any) -> bytes | None:
    """The whole body; None if it is longer than any request of the page."""
    parts, size = [], 0
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _MOST_JSON:
            return None
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            return b"".join(parts)


def _bad_body(scope: dict[str, Any], body: bytes | None) -> tuple[int, str] | None:
    if body is None:
        return 413, "the request is too long"
    if any(name == b"content-type" and b"json" in kind.lower() for name, kind in scope["headers"]):
        try:
            content = json.loads(body or b"null")
        except ValueError:
            return 400, "not JSON"
        except RecursionError:
            return 400, "nested too deeply"
        if _names_elsewhere(content):
            return 403, "nothing is fetched from elsewhere; upload the file"
    return None


def _names_elsewhere(content: Any) -> bool:
    """Whether a file in a request's data is an address on the network."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(item)
        elif isinstance(item, dict):
            path = item.get("path")
            if isinstance(path, str) and "://" in path[:16]:
                return True
            waiting.extend(item.values())
    return False


def _replay(body: bytes, receive: Any) -> Callable[[], Any]:
    sent = False

    async def again() -> dict[str, Any]:
        nonlocal sent
        if sent:
            message: dict[str, Any] = await receive()
            return message
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(send: Any, status: int, reason: str) -> None:
    body = json.dumps({"detail": reason, "error": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers + _HEADERS})
    await send({"type": "http.response.body", "body": body})
