"""A client for rosbridge v2 servers, made for the command path of a robot: the newest value or nothing.

Depends on websockets, msgspec, cbor2 and `wire.py` alone, so that other projects can take the two. One asyncio thread
serves all sockets; a socket reconnects by itself (back-off 0.2 s doubling to 2 s), advertises and subscribes again.

- A published message waits in one slot per topic; a newer one replaces it, and one that is old, or meant for an earlier
  connection, is dropped and counted. Nothing is ever sent late, as popular clients do after an outage.
- A message is checked for NaN and infinity and serialised whole before a byte is sent: servers pass NaN on to the
  robot, and one truncated frame deafens a connection for good.
- Servers never say what is wrong with a message (no `status` frames), so a socket asks a service every second and is
  replaced if no answer comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException

from .wire import BridgeError, BridgeThread, Counts, Endpoint, Message, decode, encode, explain, sockets_log

log = logging.getLogger(__name__)

OnMessage = Callable[[Mapping[str, Any], float], None]
"""Called in the bridge's thread with the message and its time of arrival (monotonic); has to return at once."""

FIRST_BACKOFF_S, MOST_BACKOFF_S = 0.2, 2.0
STALE_COMMAND_S = 0.1
"""A message that could not leave for this long never leaves."""
PROBE_EVERY_S, PROBE_TIMEOUT_S = 1.0, 2.0
NOT_TRIED = "not connected yet"
MOST_GOALS = 64
"""Goals whose end is waited for."""


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    frame: bytes
    since_s: float
    generation: int


class Socket:
    """One websocket to a rosbridge server. Methods may be called from any thread and do not block, but for `call`."""

    def __init__(
        self,
        endpoint: Endpoint,
        thread: BridgeThread,
        name: str,
        *,
        gate: Callable[[], bool] = lambda: True,
        on_down: Callable[[], None] = lambda: None,
        on_probe: Callable[[Any, float, float], None] = lambda values, sent_s, received_s: None,
        probe: str | None = "/rosapi/get_time",
    ) -> None:
        """Start connecting.

        Args:
            gate: asked right before a published message leaves; false drops it.
            on_down: called in the bridge's thread when the connection is lost.
            on_probe: called with the answer to the probe (None if the service failed), and both times (monotonic).
            probe: service to ask every second; any answer will do, also that it does not exist. None asks nothing.
        """
        self.endpoint, self.name, self.counts = endpoint, name, Counts()
        self.generation = 0
        """Connections made so far."""
        self.problem = NOT_TRIED
        """Why there is no connection; empty if there is one, `NOT_TRIED` before the first attempt has ended."""
        self._thread, self._gate, self._on_down = thread, gate, on_down
        self._on_probe, self._probe = on_probe, probe
        self._ws: ClientConnection | None = None
        self._advertised: dict[str, dict[str, Any]] = {}
        self._subscribed: dict[str, tuple[dict[str, Any], OnMessage]] = {}
        self._services: dict[str, tuple[str, Callable[[Any], tuple[bool, Message]]]] = {}
        self._slots: dict[str, _Waiting] = {}
        self._orders: deque[bytes] = deque()
        self._calls: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._goals: dict[str, tuple[str, OnMessage]] = {}
        self._ids = itertools.count()
        self._closing, self._why_reset = False, ""
        self._work = asyncio.Event()
        self._tls = endpoint.tls()
        thread.soon(self._start)

    # ---- what is wanted of the connection; repeated after every reconnect ------------------------------------------
    def advertise(self, topic: str, type_name: str) -> None:
        op = {"op": "advertise", "topic": topic, "type": type_name, "queue_size": 1}
        self._advertised[topic] = op
        self._order(op)

    def subscribe(
        self, topic: str, type_name: str, on_message: OnMessage, *, throttle_ms: int = 0, compression: str = "none"
    ) -> None:
        """Have `on_message` called with every message of `topic`; one subscription per topic and socket.

        Args:
            throttle_ms: least time between two messages; the server drops what comes faster.
            compression: `none` or `cbor` (for pictures).
        """
        op = {"op": "subscribe", "id": f"{self.name}:{topic}", "topic": topic, "type": type_name, "queue_length": 1}
        op |= {"throttle_rate": throttle_ms, "compression": compression}
        self._subscribed[topic] = (op, on_message)
        self._order(op)

    def resubscribe(self, topic: str) -> None:
        """Subscribe again: a subscription made before its publisher existed may stay mute."""
        if topic in self._subscribed:
            self._order({"op": "unsubscribe", "id": f"{self.name}:{topic}", "topic": topic})
            self._order(self._subscribed[topic][0])

    def offer_service(self, service: str, type_name: str, handler: Callable[[Any], tuple[bool, Message]]) -> None:
        """Answer calls of `service` with `handler(args) -> (result, values)`."""
        self._services[service] = (type_name, handler)
        self._order({"op": "advertise_service", "service": service, "type": type_name})

    # ---- traffic ----------------------------------------------------------------------------------------------------
    def publish(self, topic: str, message: Message) -> None:
        """Publish `message` as soon as possible; it replaces one of the same topic that still waits.

        Raises:
            BridgeError: a number is not finite, or a value is no JSON. Nothing is sent then.
        """
        frame = encode({"op": "publish", "topic": topic, "msg": message})
        if topic in self._slots:
            self.counts.replaced += 1
        self._slots[topic] = _Waiting(frame=frame, since_s=time.monotonic(), generation=self.generation)
        self._thread.soon(self._work.set)

    def discard(self) -> None:
        """Forget what waits to be published."""
        self.counts.stale += len(self._slots)
        self._slots.clear()

    def call(self, service: str, args: Message, *, timeout_s: float) -> dict[str, Any]:
        """Call a service and return its values.

        Raises:
            BridgeError: there is no connection, no answer in time, or the service says no.
        """
        if not self.connected:
            raise BridgeError(f"Service {service} cannot be called: {self.problem}.")
        key = self._new_id(service)
        frame = encode({"op": "call_service", "id": key, "service": service, "args": args})
        try:
            answer = self._thread.run(self._asked(key, frame), timeout_s=timeout_s)
        except TimeoutError:
            raise BridgeError(f"Service {service} did not answer within {timeout_s:g} s.") from None
        except ConnectionError as error:
            raise BridgeError(f"Service {service}: the connection was lost before the answer.") from error
        values = answer.get("values")
        if answer.get("result") is False or not isinstance(values, dict | None):
            raise BridgeError(f"Service {service} failed: {values or 'no reason given'}")
        return values or {}

    def ask(self, service: str, args: Message, on_values: Callable[[dict[str, Any]], None]) -> None:
        """Call a service without waiting; `on_values` is called in the bridge's thread if it succeeds."""
        key = self._new_id(service)
        frame = encode({"op": "call_service", "id": key, "service": service, "args": args})

        async def wait() -> None:
            with contextlib.suppress(TimeoutError, ConnectionError):
                answer = await asyncio.wait_for(self._asked(key, frame), PROBE_TIMEOUT_S)
                if answer.get("result") is not False and isinstance(values := answer.get("values"), dict):
                    on_values(values)

        self._thread.soon(lambda: self._thread.loop.create_task(wait()))

    def send_goal(self, action: str, type_name: str, goal: Message, on_result: OnMessage | None = None) -> str:
        """Send an action goal (ROS 2) and return its id. Dropped without a connection; never sent later.

        With the defaults of rosbridge 2.1 and older this socket does nothing else until the goal ends.
        """
        key = self._new_id(action)
        op = {"op": "send_action_goal", "id": key, "action": action, "action_type": type_name, "args": goal}
        frame = encode(op | {"feedback": False})
        if self.connected:
            self._goals[key] = (action, on_result or (lambda message, arrival_s: None))
            while len(self._goals) > MOST_GOALS:  # a server that nobody answers for never says that they ended
                self._goals.pop(next(iter(self._goals)))
            self._orders.append(frame)
            self._thread.soon(self._work.set)
        return key

    def cancel_goal(self, action: str, key: str) -> None:
        self._order({"op": "cancel_action_goal", "id": key, "action": action})

    @property
    def goals(self) -> dict[str, str]:
        """Goals that run, or may: id to action."""
        return {key: action for key, (action, _) in list(self._goals.items())}

    # ---- the connection ---------------------------------------------------------------------------------------------
    @property
    def connected(self) -> bool:
        return self._ws is not None

    @property
    def ping_s(self) -> float | None:
        """Round trip of the newest answered ping; None before the first."""
        ws = self._ws
        return ws.latency or None if ws is not None else None

    def reset(self, why: str) -> None:
        """Drop the connection at once (TCP reset), so that what the server has not read is never acted upon."""
        self.discard()
        self._thread.soon(self._abort, why)

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that waits has been handed to the system; say whether it was."""
        if self._thread.here:
            return False

        async def empty() -> None:
            while (self._slots or self._orders or self._work.is_set()) and self.connected:
                await asyncio.sleep(0.001)

        try:
            self._thread.run(empty(), timeout_s=timeout_s)
        except TimeoutError:
            return False
        return self.connected

    def close(self) -> None:
        """Close the connection for good, after what waits has left."""
        self.flush(timeout_s=0.2)
        self._closing = True

        async def end() -> None:
            if self._ws is not None:
                await self._ws.close()

        if not self._thread.here:
            with contextlib.suppress(TimeoutError):
                self._thread.run(end(), timeout_s=0.5)
        self._thread.soon(self._abort, "closed")

    def _new_id(self, what: str) -> str:
        return f"{self.name}:{what}:{next(self._ids)}"

    def _order(self, op: Message) -> None:
        if self.connected:  # otherwise it is sent, or without a meaning, when the connection stands
            self._orders.append(encode(op))
            self._thread.soon(self._work.set)

    def _start(self) -> None:
        self._task = self._thread.loop.create_task(self._live())

    def _abort(self, why: str) -> None:
        if self._ws is None:
            return
        self._why_reset = why
        self.counts.resets += 1
        plug = self._ws.transport.get_extra_info("socket")
        if plug is not None:
            with contextlib.suppress(OSError):
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._ws.transport.abort()

    async def _live(self) -> None:
        """Stay connected."""
        point, delay_s = self.endpoint, FIRST_BACKOFF_S
        headers = dict(point.headers) | ({"Authorization": f"Bearer {point.token}"} if point.token else {})
        while not self._closing:
            try:
                async with connect(
                    point.url,
                    ssl=self._tls,
                    additional_headers=headers,
                    proxy=None,
                    compression=None,
                    open_timeout=point.open_timeout_s,
                    ping_interval=point.ping_interval_s,
                    ping_timeout=point.ping_timeout_s,
                    close_timeout=0.2,
                    max_size=point.max_bytes,
                    logger=sockets_log,
                    write_limit=1,  # what the system does not take waits in its slot, where a newer one replaces it
                ) as ws:
                    delay_s = FIRST_BACKOFF_S
                    await self._serve(ws)
                    self.problem = f"the bridge at {point} closed the connection"
            except Exception as error:  # a client that no longer tries to connect would be as bad as a frozen one
                if not isinstance(error, OSError | TimeoutError | WebSocketException | ValueError):
                    log.exception("%s: unexpected", self.name)
                self.problem = self._why_reset or explain(error, point)
                self._why_reset = ""
            if not self._closing:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, MOST_BACKOFF_S)

    async def _serve(self, ws: ClientConnection) -> None:
        """Use the connection until it ends."""
        self.discard()
        self._orders.clear()
        self._ws, self.problem, self.generation = ws, "", self.generation + 1
        # From here on other threads order what they want by themselves; what they wanted before is ordered now.
        wanted = [*self._advertised.values(), *(op for op, _ in self._subscribed.values())]
        for service, (type_name, _) in self._services.items():
            wanted.append({"op": "advertise_service", "service": service, "type": type_name})
        self._orders.extend(encode(op) for op in wanted)
        self._work.set()
        tasks = [asyncio.create_task(work) for work in (self._write(ws), self._ask_now_and_then())]
        try:
            async for frame in ws:
                self._receive(frame)
        finally:
            self._ws = None
            for task in tasks:
                task.cancel()
            for future in self._calls.values():
                if not future.done():
                    future.set_exception(ConnectionError())
            self._calls.clear()
            self._goals.clear()
            self.discard()
            self._on_down()

    async def _write(self, ws: ClientConnection) -> None:
        with contextlib.suppress(WebSocketException):  # the reader sees it, too
            while True:
                await self._work.wait()
                self._work.clear()
                while self._orders:
                    await ws.send(self._orders.popleft(), text=True)
                for topic in list(self._slots):
                    waiting = self._slots.pop(topic, None)
                    if waiting is None:
                        continue
                    late = time.monotonic() - waiting.since_s > STALE_COMMAND_S
                    if late or waiting.generation != self.generation or not self._gate():
                        self.counts.stale += 1
                    else:
                        await ws.send(waiting.frame, text=True)

    async def _ask_now_and_then(self) -> None:
        """Probe the connection; replace it if it is deaf."""
        while self._probe is not None:
            await asyncio.sleep(PROBE_EVERY_S)
            if self._calls or self._goals:  # a server may serve one after the other
                continue
            key, sent_s = self._new_id("probe"), time.monotonic()
            frame = encode({"op": "call_service", "id": key, "service": self._probe, "args": {}})
            try:
                answer = await asyncio.wait_for(self._asked(key, frame), PROBE_TIMEOUT_S)
            except TimeoutError:
                if not self._calls and not self._goals:
                    self._abort("the bridge did not answer on this connection")
                continue
            values = answer.get("values") if answer.get("result") else None
            self._on_probe(values, sent_s, time.monotonic())

    async def _asked(self, key: str, frame: bytes) -> dict[str, Any]:
        """Send a service call and return its answer."""
        self._calls[key] = future = self._thread.loop.create_future()
        try:
            if self._ws is None:
                raise ConnectionError
            self._orders.append(frame)
            self._work.set()
            return await future
        finally:
            self._calls.pop(key, None)

    def _receive(self, frame: str | bytes) -> None:
        arrival_s = time.monotonic()
        try:
            if (op := decode(frame)) is None:
                self.counts.malformed += 1
            else:
                self._route(op, arrival_s)
        except Exception as error:  # whatever a peer sends must not end the thread that stops the robot
            self.counts.malformed += 1
            if self.counts.malformed == 1:
                log.warning("%s: a message of the bridge was refused: %s: %s", self.name, type(error).__name__, error)

    def _route(self, op: dict[str, Any], arrival_s: float) -> None:
        kind, key = op["op"], op.get("id")
        if kind == "publish":
            if (found := self._subscribed.get(op["topic"])) is not None:
                if not isinstance(op["msg"], dict):
                    raise ValueError(f"a message of {op['topic']} is no object")
                found[1](op["msg"], arrival_s)
        elif kind == "service_response":
            if (future := self._calls.get(key)) is not None and not future.done():  # type: ignore[arg-type]
                future.set_result(op)
        elif kind == "action_result":
            if (goal := self._goals.pop(key, None)) is not None:  # type: ignore[arg-type]
                goal[1](op, arrival_s)
        elif kind == "call_service" and (service := self._services.get(op["service"])) is not None:
            result, values = service[1](op.get("args"))
            answer = {"op": "service_response", "service": op["service"], "result": result, "values": values}
            self._order(answer | ({"id": key} if key is not None else {}))
