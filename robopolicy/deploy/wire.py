"""What `rosbridge.py` builds on: frames of the rosbridge v2 protocol, the address of a server, a thread for sockets."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import logging
import math
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import cbor2
import msgspec
import numpy as np
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI

log = logging.getLogger(__name__)
sockets_log = log.getChild("sockets")
"""For websockets' own words: each connection that opens or closes is no news to a program's log."""
sockets_log.setLevel(logging.WARNING)

Message = Mapping[str, Any]

_NUMBERS = {1: "u2", 2: "u4", 3: "u8", 9: "i2", 10: "i4", 11: "i8", 16: "f2", 17: "f4", 18: "f8"}
TYPED_ARRAYS = {64: "u1", 68: "u1", 72: "i1"} | {
    first + offset: order + kind for first, order in ((64, ">"), (68, "<")) for offset, kind in _NUMBERS.items()
}
"""Tags of RFC 8746 to numpy types."""


class BridgeError(Exception):
    """The bridge cannot do what was asked; says what and why."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where the bridge is and how to get in. Secrets appear neither in its text form nor in errors."""

    url: str = field(repr=False)
    token: str | None = field(default=None, repr=False)
    """Sent as `Authorization: Bearer <token>`."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    ca_file: str | None = None
    """Certificate authority to trust besides the system's (wss)."""
    verify: bool = True
    """False accepts any certificate; for a closed network only."""
    open_timeout_s: float = 3.0
    ping_interval_s: float = 0.5
    ping_timeout_s: float = 1.0
    max_bytes: int = 64 * 1024 * 1024

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("ws", "wss") or not parts.hostname:
            raise BridgeError(f"The bridge's URL must look like ws://127.0.0.1:9090 or wss://host/path; got {self}.")
        if self.token is not None and parts.scheme == "ws" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            log.warning("The token for %s travels unencrypted; use wss.", self)

    def __str__(self) -> str:
        """The URL without user, password and query."""
        try:
            parts = urllib.parse.urlsplit(self.url)
            return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        except ValueError:
            return "an address that cannot be read"

    def tls(self) -> ssl.SSLContext | None:
        """Return the TLS settings; None for ws.

        Raises:
            BridgeError: the authority's file cannot be read.
        """
        if urllib.parse.urlsplit(self.url).scheme != "wss":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except OSError as error:
            raise BridgeError(f"The certificate authority's file {self.ca_file} cannot be read: {error}") from error
        if not self.verify:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


@dataclass(kw_only=True)
class Counts:
    """What a socket dropped, and why."""

    malformed: int = 0
    """Frames that were no operation, or whose handler failed."""
    replaced: int = 0
    """Messages overtaken by a newer one before they could leave: normal when publishing faster than the link."""
    stale: int = 0
    """Messages dropped because they were old, or the connection was new or closed, when they could have left."""
    resets: int = 0


def encode(op: Message) -> bytes:
    """Return `op` as JSON, whole and finite.

    Raises:
        BridgeError: a number is NaN or infinite, or a value is no JSON; names its place.
    """
    _require_finite(op, str(op.get("topic") or op.get("service") or op.get("action") or op.get("op")))
    try:
        return msgspec.json.encode(op)
    except (TypeError, ValueError, RecursionError) as error:
        raise BridgeError(f"A message cannot be written as JSON: {error}") from error


def _require_finite(value: Any, where: str) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BridgeError(f"{where} is {value}; only finite numbers are sent.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _require_finite(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_finite(item, f"{where}[{index}]")


def decode(frame: str | bytes) -> dict[str, Any] | None:
    """Return the operation in a frame (text: JSON, binary: CBOR); None for what is not one."""
    try:
        if isinstance(frame, bytes):
            value = cbor2.loads(frame, tag_hook=_typed_array)
        else:
            try:
                value = msgspec.json.decode(frame)
            except (msgspec.DecodeError, UnicodeError):
                value = json.loads(frame)  # also takes the bare NaN, Infinity and 1e400 that some servers send
    except (cbor2.CBORError, ValueError, TypeError, LookupError, RecursionError, OverflowError, MemoryError, EOFError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("op"), str) else None


def _typed_array(*args: Any) -> Any:
    tag = (
        args[-1] if isinstance(args[-1], cbor2.CBORTag) else args[0]
    )  # cbor2 passes (decoder, tag) or (tag, shareable)
    if isinstance(tag, cbor2.CBORTag) and tag.tag in TYPED_ARRAYS and isinstance(tag.value, bytes):
        return np.frombuffer(tag.value, TYPED_ARRAYS[tag.tag])
    return tag


def payload(value: Any) -> bytes:
    """Return a uint8[] field: base64 text in JSON, bytes in CBOR, a list of numbers from some servers.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return base64.b64decode(value, validate=True)
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, list):
        return bytes(value)
    raise ValueError(f"no byte array: {type(value).__name__}")


class BridgeThread:
    """An asyncio loop in a thread of its own."""

    def __init__(self, name: str = "rosbridge") -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def here(self) -> bool:
        """Whether the caller runs in this thread."""
        return threading.current_thread() is self._thread

    def soon(self, act: Callable[..., Any], *args: Any) -> None:
        """Call `act(*args)` in the thread; nothing happens after `stop`."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(act, *args)

    def run(self, work: Coroutine[Any, Any, Any], *, timeout_s: float) -> Any:
        """Wait for `work`, from another thread.

        Raises:
            TimeoutError: it took longer.
        """
        assert not self.here
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError from None

    def stop(self) -> None:
        """End the thread; what still runs in it is cancelled."""

        async def cancel() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if self.loop.is_closed():
            return
        with contextlib.suppress(TimeoutError):
            self.run(cancel(), timeout_s=2.0)
        self.soon(self.loop.stop)
        self._thread.join(2.0)
        if not self._thread.is_alive():
            self.loop.close()


def explain(error: Exception, point: Endpoint) -> str:
    """Say in words why there is no connection."""
    if isinstance(error, InvalidStatus):
        status = error.response.status_code
        hint = {401: ": set a valid token", 403: ": the token or header is not accepted", 404: ": wrong path"}
        return f"{point} answered with HTTP status {status}{hint.get(status, '')}"
    if isinstance(error, InvalidURI):
        return f"{point} is no websocket address"
    if isinstance(error, ssl.SSLError):
        return f"TLS with {point} failed: {error.reason or 'certificate not accepted'}; ca_file names its authority"
    if isinstance(error, TimeoutError):
        return f"{point} did not answer within {point.open_timeout_s:g} s"
    if isinstance(error, InvalidHandshake | EOFError):
        return f"{point} does not speak websocket"
    if isinstance(error, ConnectionRefusedError):
        return f"nothing listens at {point}; is the bridge running?"
    if isinstance(error, socket.gaierror):
        return f"the host of {point} is not known"
    return f"{point}: {error or type(error).__name__}"
