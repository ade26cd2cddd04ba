"""A rosbridge v2 server without ROS, for simulated robots and tests; it behaves as real servers were seen to.

What robots and drivers do in ROS is done here by the methods `publish`, `listen`, `offer_service` and `offer_action`,
callable from any thread. No error is ever reported to a client: real servers send no `status`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import ssl
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import cbor2
import msgspec
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.http11 import Request, Response

from robopolicy.errors import RobopolicyError

from .faults import Faults
from .messages import Dialect, Message, short_type, time_fields
from .sim_connection import ClientConnection, GoalHandle, plain, tagged
from .wire import BridgeThread, sockets_log

SUCCEEDED, CANCELED, ABORTED = 4, 5, 6
"""Of action_msgs/GoalStatus."""
PUBLISHER_DEPTH = 10
Handler = Callable[[Mapping[str, Any]], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Quirks:
    """Behaviour in which servers differ."""

    blocking: bool = False
    """A service call or goal holds up its socket until it ends: ROS 2 servers up to 2.1 by default."""
    deafens: bool = True
    """A truncated message with a whole object in it makes the server ignore what follows on the socket."""
    rosapi: bool = True
    """The node that lists topics and tells the time runs."""


@dataclass(kw_only=True)
class _Topic:
    type_name: str
    last: Message | None = None
    """Kept for those who subscribe later, if the publisher latches."""
    listeners: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    inbox: deque[Message] = field(default_factory=lambda: deque(maxlen=PUBLISHER_DEPTH))


class RosbridgeServer:
    """Serves on a thread of its own, on this machine alone unless `host` says otherwise."""

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        dialect: Dialect = "ros2",
        quirks: Quirks | None = None,
        faults: Faults | None = None,
        token: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Nothing listens before `start`. `port` 0 takes a free one; with a `token` clients must show it."""
        self.host, self.port, self.dialect = host, port, dialect
        self.quirks, self.faults = quirks or Quirks(), faults or Faults()
        self.received: dict[str, int] = {}
        """Messages taken from clients, per topic."""
        self._token, self._tls = token, tls
        self._thread: BridgeThread | None = None
        self._server: Server | None = None
        self._topics: dict[str, _Topic] = {}
        self._services: dict[str, tuple[str, Handler]] = {}
        self._actions: dict[str, tuple[str, Callable[[GoalHandle], None]]] = {}
        self._clients: set[ClientConnection] = set()
        self._draining = False
        self._ids = itertools.count()
        if self.quirks.rosapi:
            self._offer_rosapi()

    @property
    def url(self) -> str:
        return f"{'ws' if self._tls is None else 'wss'}://{self.host}:{self.port}"

    def start(self) -> None:
        """Listen.

        Raises:
            RobopolicyError: the port is taken, or the address is not this machine's.
        """
        self._thread = BridgeThread("rosbridge server")
        limit = 10 * 1024 * 1024 if self.dialect == "ros2" else 32 * 1024 * 1024

        async def listen() -> Server:
            return await serve(
                self._welcome,
                self.host,
                self.port,
                process_request=self._admit,
                ssl=self._tls,
                compression=None,
                max_size=limit,
                max_queue=None,  # a full queue would keep it from noticing that the client has cut the connection
                logger=sockets_log,
                ping_interval=None,
                close_timeout=0.2,
            )

        try:
            self._server = self._thread.run(listen(), timeout_s=5.0)
        except OSError as error:
            self._thread.stop()
            raise RobopolicyError(
                f"Cannot listen on {self.host}:{self.port}: {error.strerror}. Does another bridge run? port=0 takes a "
                "free port."
            ) from error
        assert self._server is not None
        self._draining = False
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    def close(self) -> None:
        """Stop listening and drop every client."""
        if self._thread is None or self._server is None:
            return
        server, self._server = self._server, None

        async def end() -> None:
            for client in tuple(self._clients):
                client.ws.transport.abort()
            server.close()
            await server.wait_closed()

        with contextlib.suppress(TimeoutError):
            self._thread.run(end(), timeout_s=1.0)
        self._thread.stop()

    # ---- the robot's side --------------------------------------------------------------------------------------------
    def publish(self, topic: str, type_name: str, message: Message, *, latch: bool = False) -> None:
        """Publish `message`; byte arrays are `bytes`, number arrays lists or numpy arrays."""
        entry = self._topics.setdefault(topic, _Topic(type_name=short_type(type_name)))
        if latch:
            entry.last = message
        entry.inbox.append(message)
        if not self._draining and self._thread is not None:
            self._draining = True
            self._thread.soon(self._drain)

    def wanted(self, topic: str) -> bool:
        """Say whether a client subscribes to `topic`."""
        return any(topic in client.subscriptions for client in tuple(self._clients))

    def listen(self, topic: str, type_name: str, on_message: Callable[[Mapping[str, Any]], None]) -> None:
        """Have `on_message` called, in the server's thread, with what clients publish on `topic`."""
        entry = self._topics.setdefault(topic, _Topic(type_name=short_type(type_name)))
        entry.listeners.append(on_message)

    def offer_service(self, service: str, type_name: str, handler: Handler) -> None:
        """Answer calls of `service` with `handler(args)`, run in a worker thread; what it raises is told the caller."""
        self._services[service] = (short_type(type_name), handler)

    def offer_action(self, action: str, type_name: str, start: Callable[[GoalHandle], None]) -> None:
        """Have `start` called, in the server's thread, with every goal for `action`; in ROS 1 by its five topics."""
        if self.dialect == "ros2":
            self._actions[action] = (short_type(type_name), start)
            return
        running: dict[str, GoalHandle] = {}

        def goal(message: Mapping[str, Any]) -> None:
            name = message.get("goal_id")
            key = str(name.get("id")) if isinstance(name, Mapping) and name.get("id") else f"goal-{next(self._ids)}"
            body = message.get("goal")

            def finish(status: int, result: Mapping[str, Any]) -> None:
                running.pop(key, None)
                code = {SUCCEEDED: 3, CANCELED: 2, ABORTED: 4}[status]  # actionlib_msgs/GoalStatus
                told = {"goal_id": {"stamp": self.now(), "id": key}, "status": code, "text": ""}
                header = {"stamp": self.now(), "frame_id": ""}
                message = {"header": header, "status": told, "result": result}
                self.publish(f"{action}/result", f"{short_type(type_name)}ActionResult", message)

            handle = GoalHandle(id=key, action=action, goal=body if isinstance(body, Mapping) else {}, finish=finish)
            running[key] = handle
            start(handle)

        def cancel(message: Mapping[str, Any]) -> None:
            wanted = message.get("id")
            for key, handle in tuple(running.items()):
                if not wanted or wanted == key:
                    handle.on_cancel()

        self.listen(f"{action}/goal", f"{short_type(type_name)}ActionGoal", goal)
        self.listen(f"{action}/cancel", "actionlib_msgs/GoalID", cancel)

    def call_client(self, service: str, args: Message, *, timeout_s: float = 1.0) -> Mapping[str, Any]:
        """Call a service that a client offers.

        Raises:
            RobopolicyError: nobody offers it, or the answer does not come.
        """
        owner = next((c for c in tuple(self._clients) if service in c.services), None)
        if owner is None or self._thread is None:
            raise RobopolicyError(f"No client offers the service {service}.")
        try:
            answer = self._thread.run(owner.ask(service, args), timeout_s=timeout_s)
        except TimeoutError:
            raise RobopolicyError(f"The client did not answer {service} within {timeout_s:g} s.") from None
        return answer["values"]

    def freeze(self, seconds: float) -> None:
        """Stand still, as a stopped process does."""
        if self._thread is not None:
            self._thread.soon(time.sleep, seconds)

    def now(self) -> dict[str, int]:
        """Return the server's time as a message."""
        return time_fields(time.time(), self.dialect)

    # ---- clients -----------------------------------------------------------------------------------------------------
    async def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if self._token is None:
            return None
        shown = request.headers.get("Authorization", "")
        if hmac.compare_digest(shown.encode(), f"Bearer {self._token}".encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "token?\n")

    async def _welcome(self, ws: ServerConnection) -> None:
        client = ClientConnection(self, ws)
        self._clients.add(client)
        try:
            await client.serve()
        finally:
            self._clients.discard(client)

    def _drain(self) -> None:
        self._draining = False
        for topic, entry in list(self._topics.items()):
            while entry.inbox:
                self.deliver(topic, entry, entry.inbox.popleft())

    def deliver(self, topic: str, entry: _Topic, message: Message) -> None:
        """Send `message` to the clients that subscribe to `topic`."""
        frames: dict[bool, str | bytes | None] = {}
        for client in tuple(self._clients):
            subscription = client.subscriptions.get(topic)
            if subscription is None or not client.due(subscription):
                continue
            if subscription.cbor not in frames:
                frames[subscription.cbor] = self.frame(topic, message, cbor=subscription.cbor)
            frame = frames[subscription.cbor]
            if frame is not None and not self.faults.loses():
                self._later(client.send, frame)

    def frame(self, topic: str, message: Message, *, cbor: bool) -> str | bytes | None:
        op = {"op": "publish", "topic": topic, "msg": message}
        if not cbor:
            return msgspec.json.encode(op, enc_hook=plain).decode()  # NaN becomes null, bytes base64
        if self.dialect == "ros1" and any(
            isinstance(v, list) and v and isinstance(v[0], str) for v in message.values()
        ):
            return None  # such messages get lost there
        return cbor2.dumps(tagged(op))

    def _later(self, act: Callable[..., None], *args: Any) -> None:
        delay_s = self.faults.delay_s
        if delay_s > 0 and self._thread is not None:
            self._thread.loop.call_later(delay_s, act, *args)
        else:
            act(*args)

    def take(self, topic: str, message: Mapping[str, Any]) -> None:
        """Hand a client's message to those who listen."""
        entry = self._topics.get(topic)
        if entry is None or self.faults.loses():
            return
        self.received[topic] = self.received.get(topic, 0) + 1
        self._later(self._hand_over, topic, entry, self._stamped(message))

    def _hand_over(self, topic: str, entry: _Topic, message: Mapping[str, Any]) -> None:
        for listener in entry.listeners:
            listener(message)
        self.deliver(topic, entry, message)

    def _stamped(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """Fill in the stamp as servers do: `now` or none in a header is the present, no header at all stays none."""
        header = message.get("header")
        if not isinstance(header, Mapping):
            return message
        stamp = header.get("stamp")
        unread = self.dialect == "ros1" and isinstance(stamp, Mapping) and "secs" not in stamp
        if stamp is None or stamp == "now" or unread:
            return {**message, "header": {**header, "stamp": self.now()}}
        return message

    def topic(self, name: str, type_name: str) -> _Topic | None:
        """Return the topic, new or known, for a client; None, in silence, where the type does not fit."""
        if not type_name or (self.dialect == "ros1" and type_name.count("/") != 1):
            return None
        entry = self._topics.setdefault(name, _Topic(type_name=short_type(type_name)))
        return entry if entry.type_name == short_type(type_name) else None

    def known_type(self, name: str) -> str:
        """Return the type of the topic; empty if there is none of that name."""
        return self._topics[name].type_name if name in self._topics else ""

    # ---- services ----------------------------------------------------------------------------------------------------
    async def answer(self, service: str, args: Any) -> tuple[bool, Any]:
        """Return (result, values) of a service call."""
        owner = next((c for c in tuple(self._clients) if service in c.services), None)
        if owner is not None:
            answer = await owner.ask(service, args if isinstance(args, Mapping) else {})
            return bool(answer.get("result", True)), answer.get("values")
        if service not in self._services:
            return False, f"Service {service} does not exist"
        try:
            return True, await asyncio.to_thread(self._services[service][1], args if isinstance(args, Mapping) else {})
        except RobopolicyError as error:
            return False, str(error)

    def goal(self, action: str) -> Callable[[GoalHandle], None] | None:
        """Return who takes goals for `action`; None, in silence, if nobody does."""
        return self._actions[action][1] if action in self._actions else None

    def later(self, act: Callable[..., None], *args: Any) -> None:
        """Run `act(*args)` in the server's thread."""
        if self._thread is not None:
            self._thread.soon(act, *args)

    def _offer_rosapi(self) -> None:
        def spelled(name: str) -> str:
            pkg, kind = name.split("/")
            return name if self.dialect == "ros1" else f"{pkg}/msg/{kind}"

        def topics(args: Mapping[str, Any]) -> Mapping[str, Any]:
            known = dict(self._topics)
            return {"topics": list(known), "types": [spelled(entry.type_name) for entry in known.values()]}

        def topic_type(args: Mapping[str, Any]) -> Mapping[str, Any]:
            entry = self._topics.get(str(args.get("topic")))
            return {"type": spelled(entry.type_name) if entry else ""}

        def subscribers(args: Mapping[str, Any]) -> Mapping[str, Any]:
            entry = self._topics.get(str(args.get("topic")))
            return {"subscribers": ["/robot"] if entry and entry.listeners else []}

        self.offer_service("/rosapi/get_time", "rosapi/GetTime", lambda args: {"time": self.now()})
        self.offer_service("/rosapi/topics", "rosapi/Topics", topics)
        self.offer_service("/rosapi/topic_type", "rosapi/TopicType", topic_type)
        self.offer_service("/rosapi/subscribers", "rosapi/Subscribers", subscribers)
        self.offer_service("/rosapi/services", "rosapi/Services", lambda args: {"services": list(self._services)})
