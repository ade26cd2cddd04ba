"""A local page that shows a deployment as it runs, with a STOP button; for this computer or a phone through a tunnel.

It binds the loopback address only. Every request needs the token of the printed address; the host name must be a local
one, so that no other page in the browser can reach it. State goes out as Server-Sent Events ten times a second.
"""

from __future__ import annotations

import collections
import io
import json
import math
import secrets
import threading
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np

from robopolicy.deploy.contract import Commands, Plan, Tick

UPDATE_S = 0.1
TICK_EVERY_S = 0.04
"""Turns of the loop that are drawn: at most one in this time."""
HISTORY = 250
"""Drawn turns that a newly opened page gets: ten seconds."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "[::1]")


class LivePage:
    """Serves the page; implements `contract.Recorder`, so that it hears of every turn, plan and event.

    Args:
        commands: what its buttons do, and the numbers it shows.
        joints: names of the arm's joints, in order.
        port: 0 takes a free one.
    """

    def __init__(self, commands: Commands, *, joints: Sequence[str], port: int = 0) -> None:
        self._commands = commands
        self._joints = list(joints)
        self._token = secrets.token_urlsafe(16)
        self._lock = threading.Lock()
        self._ticks: collections.deque[tuple[int, list[Any]]] = collections.deque(maxlen=HISTORY)
        self._events: collections.deque[tuple[int, dict[str, Any]]] = collections.deque(maxlen=50)
        self._count = 0
        self._next_tick_s = 0.0
        self._picture: np.ndarray[Any, Any] | None = None
        self._closed = threading.Event()
        page = self

        class Handler(_Handler):
            live = page

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        """Address with the token."""
        return f"http://127.0.0.1:{self._server.server_address[1]}/?token={self._token}"

    def start(self) -> str:
        """Serve from a thread of its own; return `url`."""
        threading.Thread(target=self._server.serve_forever, name="robopolicy-live", daemon=True).start()
        return self.url

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def tick(self, tick: Tick) -> None:
        if tick.time_s < self._next_tick_s:
            return
        self._next_tick_s = tick.time_s + TICK_EVERY_S
        row = [round(tick.time_s, 3), _rounded(tick.measured), _rounded(tick.sent), tick.clamped]
        with self._lock:
            self._count += 1
            self._ticks.append((self._count, row))

    def plan(self, plan: Plan) -> None:
        for value in plan.observation.values():
            if value.dtype == np.uint8:
                self._picture = value[-1]  # [C, Y, X]
                break

    def event(self, kind: str, text: str, **data: Any) -> None:
        with self._lock:
            self._count += 1
            self._events.append((self._count, {"kind": kind, "text": text, "wall_s": time.time()}))

    def update(self, after: int) -> tuple[int, dict[str, Any]]:
        """Return what happened since number `after`, and the number to ask with next time."""
        snapshot = dict(self._commands.snapshot())
        with self._lock:
            return self._count, {
                "joints": self._joints,
                "snapshot": snapshot,
                "ticks": [row for number, row in self._ticks if number > after],
                "events": [event for number, event in self._events if number > after],
                "picture": self._picture is not None,
            }

    def picture(self) -> bytes | None:
        """Return the newest picture that the policy saw, as PNG."""
        if self._picture is None:
            return None
        import imageio.v3 as iio

        file = io.BytesIO()
        iio.imwrite(file, np.moveaxis(self._picture, 0, -1), extension=".png")
        return file.getvalue()


class _Handler(BaseHTTPRequestHandler):
    """Answers one request; `live` is the page it belongs to."""

    live: LivePage
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_GET(self) -> None:
        if not self._allowed():
            return
        match urlsplit(self.path).path:
            case "/":
                html = resources.files("robopolicy.deploy").joinpath("live.html").read_bytes()
                self._answer(html, "text/html; charset=utf-8")
            case "/updates":
                self._stream()
            case "/picture" if (picture := self.live.picture()) is not None:
                self._answer(picture, "image/png")
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def do_POST(self) -> None:
        if not self._allowed():
            return
        match urlsplit(self.path).path:
            case "/stop":
                self.live._commands.stop("STOP on the live page")
                problem = ""
            case "/rearm":
                problem = self.live._commands.rearm()
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
        self._answer(json.dumps({"problem": problem}).encode(), "application/json")

    def _allowed(self) -> bool:
        host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if host in LOCAL_HOSTS and secrets.compare_digest(given.encode(), self.live._token.encode()):
            return True
        self.send_error(HTTPStatus.FORBIDDEN, "This page needs the address that deploy printed, with its token")
        return False

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline'; frame-ancestors 'none'")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        number = 0
        try:
            while not self.live._closed.is_set():
                number, update = self.live.update(number)
                self.wfile.write(f"data: {json.dumps(_finite(update))}\n\n".encode())
                self.wfile.flush()
                self.live._closed.wait(UPDATE_S)
        except OSError:  # the browser went away
            pass

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the address holds the token."""


def _rounded(values: Any) -> list[float] | None:
    return None if values is None else [round(float(value), 4) for value in values]


def _finite(tree: Any) -> Any:
    """Return `tree` with None for numbers that JSON does not know."""
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
