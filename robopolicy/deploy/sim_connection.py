"""One client's connection to the rosbridge server of a simulated robot: its operations, in the order they come."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cbor2
import msgspec
import numpy as np
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import WebSocketException
from websockets.protocol import State

from .messages import Message

if TYPE_CHECKING:
    from .sim_server import RosbridgeServer

MOST_WAITING = 10_000
"""Frames that wait for a client that does not read; then the oldest are dropped (real servers keep them all)."""


@dataclass(kw_only=True)
class GoalHandle:
    """A goal that a client sent; the action's owner ends it by `finish`."""

    id: str
    action: str
    goal: Mapping[str, Any]
    finish: Callable[[int, Mapping[str, Any]], None]
    """Status (SUCCEEDED, CANCELED, ABORTED) and result; callable from any thread, once."""
    on_cancel: Callable[[], None] = lambda: None


@dataclass(kw_only=True)
class Subscription:
    throttle_s: float
    cbor: bool
    due_s: float = 0.0


class ClientConnection:
    """One connection."""

    def __init__(self, server: RosbridgeServer, ws: ServerConnection) -> None:
        self.server, self.ws = server, ws
        self.subscriptions: dict[str, Subscription] = {}
        self.services: set[str] = set()
        self._advertised: set[str] = set()
        self._out: deque[str | bytes] = deque(maxlen=MOST_WAITING)
        self._work = asyncio.Event()
        self._asked: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._goals: dict[str, GoalHandle] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._deaf = False
        self._ids = itertools.count()

    def send(self, frame: str | bytes) -> None:
        self._out.append(frame)
        self._work.set()

    def tell(self, op: Message) -> None:
        if not self.server.faults.half_dead:
            self.send(msgspec.json.encode(op, enc_hook=plain).decode())

    def due(self, subscription: Subscription) -> bool:
        """Say whether the subscription takes a message now; of faster ones, those between are dropped."""
        now_s = time.monotonic()
        if now_s < subscription.due_s - 1e-3:
            return False
        subscription.due_s = max(subscription.due_s + subscription.throttle_s, now_s)
        return True

    async def serve(self) -> None:
        writer = asyncio.create_task(self._write())
        try:
            with contextlib.suppress(WebSocketException):
                async for frame in self.ws:
                    await asyncio.sleep(0)  # as from the queue of real servers, which is dropped when the socket closes
                    if self.ws.state is not State.OPEN:
                        return
                    if isinstance(frame, bytes):
                        if self.server.dialect == "ros2":
                            return  # binary from a client closes the connection
                        continue
                    await self._receive(frame)
        finally:
            writer.cancel()
            for task in self._tasks:
                task.cancel()

    async def _write(self) -> None:
        with contextlib.suppress(WebSocketException):
            while True:
                await self._work.wait()
                self._work.clear()
                while self._out:
                    await self.ws.send(self._out.popleft())

    async def _receive(self, frame: str) -> None:
        server = self.server
        if self._deaf or server.faults.half_dead:
            return
        try:
            op = msgspec.json.decode(frame)
        except (ValueError, RecursionError):
            op = _lenient(frame)
        if op is None or op == {}:
            self._deaf = (
                server.quirks.deafens
                and bool(re.search(r"\{[^{}]*\}", frame))
                and (op is None or server.dialect == "ros1")
            )
            return
        if not isinstance(op, dict) or not isinstance(op.get("op"), str):
            return
        name = op["op"]
        if name in ("call_service", "send_action_goal"):
            work = self._call(op) if name == "call_service" else self._goal(op)
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            if server.quirks.blocking:
                await asyncio.wait([task])
        elif (handle := getattr(self, f"_op_{name}", None)) is not None:
            handle(op)

    def _op_advertise(self, op: Mapping[str, Any]) -> None:
        if isinstance(op.get("topic"), str) and self.server.topic(op["topic"], str(op.get("type", ""))) is not None:
            self._advertised.add(op["topic"])

    def _op_unadvertise(self, op: Mapping[str, Any]) -> None:
        self._advertised.discard(str(op.get("topic")))

    def _op_publish(self, op: Mapping[str, Any]) -> None:
        topic, message = str(op.get("topic")), op.get("msg")
        if topic in self._advertised and isinstance(message, dict):
            self.server.take(topic, message)

    def _op_subscribe(self, op: Mapping[str, Any]) -> None:
        name, throttle = op.get("topic"), op.get("throttle_rate", 0)
        if not isinstance(name, str) or not isinstance(throttle, int | float):
            return
        known = self.server.known_type(name)
        entry = self.server.topic(name, str(op.get("type") or known))
        if entry is None:
            return
        wanted = Subscription(throttle_s=max(0.0, throttle / 1000), cbor=op.get("compression") == "cbor")
        if (old := self.subscriptions.get(name)) is not None:  # merged: the lowest throttle, the strongest compression
            wanted = Subscription(throttle_s=min(old.throttle_s, wanted.throttle_s), cbor=old.cbor or wanted.cbor)
        self.subscriptions[name] = wanted
        if entry.last is not None:
            frame = self.server.frame(name, entry.last, cbor=wanted.cbor)
            if frame is not None and not self.server.faults.loses():
                self.send(frame)

    def _op_unsubscribe(self, op: Mapping[str, Any]) -> None:
        self.subscriptions.pop(str(op.get("topic")), None)

    def _op_advertise_service(self, op: Mapping[str, Any]) -> None:
        self.services.add(str(op.get("service")))

    def _op_unadvertise_service(self, op: Mapping[str, Any]) -> None:
        self.services.discard(str(op.get("service")))

    def _op_service_response(self, op: Mapping[str, Any]) -> None:
        future = self._asked.pop(str(op.get("id")), None)
        if future is not None and not future.done():
            future.set_result(dict(op))

    def _op_cancel_action_goal(self, op: Mapping[str, Any]) -> None:
        handle = self._goals.get(str(op.get("id")))
        if handle is not None:
            handle.on_cancel()

    async def ask(self, service: str, args: Message) -> dict[str, Any]:
        """Call a service of this client."""
        key = f"call_service:{service}:{next(self._ids)}"
        self._asked[key] = future = asyncio.get_running_loop().create_future()
        self.tell({"op": "call_service", "id": key, "service": service, "args": args})
        return await future

    async def _call(self, op: Mapping[str, Any]) -> None:
        service = str(op.get("service"))
        result, values = await self.server.answer(service, op.get("args"))
        answer = {"op": "service_response", "service": service, "values": values, "result": result}
        self.tell(answer | ({"id": op["id"]} if "id" in op else {}))

    async def _goal(self, op: Mapping[str, Any]) -> None:
        action, key, goal = str(op.get("action")), str(op.get("id")), op.get("args")
        start = self.server.goal(action)
        ended: asyncio.Future[tuple[int, Mapping[str, Any]]] = asyncio.get_running_loop().create_future()
        if start is None or not isinstance(goal, dict):
            if self.server.quirks.blocking:
                await ended  # for an absent server it blocks for ever
            return

        def settle(status: int, result: Mapping[str, Any]) -> None:
            if not ended.done():
                ended.set_result((status, result))

        def finish(status: int, result: Mapping[str, Any]) -> None:
            self.server.later(settle, status, result)

        self._goals[key] = handle = GoalHandle(id=key, action=action, goal=goal, finish=finish)
        start(handle)
        status, result = await ended
        self._goals.pop(key, None)
        # `result: true` also comes with aborted goals, as from real servers
        self.tell(
            {"op": "action_result", "action": action, "id": key, "values": result, "status": status, "result": True}
        )


def _lenient(frame: str) -> Any:
    """Read what Python's JSON takes beyond the standard (NaN, Infinity); None for what is no JSON."""
    try:
        return json.loads(frame)
    except (ValueError, RecursionError):
        return None


def plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise NotImplementedError(type(value).__name__)


def tagged(value: Any) -> Any:
    """Return `value` with lists of floats as typed arrays, as rosbridge writes CBOR."""
    if isinstance(value, Mapping):
        return {key: tagged(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return cbor2.CBORTag(86, np.asarray(value, "<f8").tobytes())
    return [tagged(item) for item in value] if isinstance(value, list) else value
