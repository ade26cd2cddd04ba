"""A robot behind a rosbridge server: `contract.Robot` over five sockets that cannot hold each other up.

| socket | carries | so that |
| --- | --- | --- |
| state | joint states, streams | pictures delay no command |
| command | what moves the arm | it can be cut, with all that a frozen bridge has not read, when the data grow old |
| service | service calls | older bridges serve nothing else on a socket while one lasts |
| action | goals | the same; a goal for a server that is not there lasts for ever |
| stop | stops, the heartbeat, the e-stop from ROS | a stop waits for nothing |

Commands leave only while the robot is armed and the joint states are fresh. A lost or silent link disarms; nothing but
`rearm` arms.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from robopolicy.errors import RobopolicyError

from . import messages
from .commands import GRIPPER_GOAL, Goal, Publish, build_interface, gripper_goal, ros1_action_topics
from .contract import Floats, LinkStatus, RobotState, Sample, StreamReport
from .messages import Dialect, Message, MessageError
from .robot import RobotFile
from .rosbridge import NOT_TRIED, Socket
from .state import ClockOffset, JointTable, StreamTable
from .wire import BridgeError, BridgeThread, Endpoint

log = logging.getLogger(__name__)

STOP_AGAIN_S = (0.0, 0.02, 0.06)
"""A stop is sent at these times: a command that was under way on another socket may arrive after the first."""
WATCH_S = 0.02
FIRST_STATE_S = 1.0
"""How long `connect` waits for joint states once the sockets are open."""
RESUBSCRIBE_S, RECONNECT_S = 1.0, 3.0
"""A subscription without data for so long is made anew, then the whole connection."""


class RemoteRobot:
    """See `contract.Robot`."""

    def __init__(
        self,
        robot: RobotFile,
        *,
        url: str,
        streams: Sequence[str] = (),
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
        ca_file: str | None = None,
        verify: bool = True,
        dialect: Dialect | None = None,
        commands: bool = True,
    ) -> None:
        """Nothing is connected yet.

        Args:
            streams: names of `robot.streams` to subscribe to.
            token, headers, ca_file, verify: see `rosbridge.Endpoint`.
            dialect: None: whatever the first stamped message shows.
            commands: False never advertises nor publishes what could move or stop the arm.

        Raises:
            RobopolicyError: the URL is no websocket address, or a stream or its type is unknown.
        """
        self.robot = robot
        try:
            self._endpoint = Endpoint(
                url=url,
                token=token,
                headers=dict(headers or {}),
                ca_file=ca_file,
                verify=verify,
                ping_timeout_s=robot.watchdogs.link_s,
            )
            self._endpoint.tls()
        except BridgeError as error:
            raise RobopolicyError(str(error)) from error
        self._streams = {name: StreamTable(name, robot) for name in streams}
        self._joints = JointTable(robot)
        self._clock = ClockOffset()
        self._interface = build_interface(robot, self.robot_time_s, self._position)
        self._dialect, self._commands = dialect, commands
        self._thread: BridgeThread | None = None
        self._sockets: dict[str, Socket] = {}
        self._armed, self._closed = False, False
        self._unread = False
        """Whether the bridge may hold commands that it has not read: stopped or not, they must not act later."""
        self._lock = threading.Lock()
        self._on_stop: Callable[[str], None] | None = None
        self._topics: dict[str, str] = {}
        self._commands_sent = 0
        self._quiet_since_s = self._resubscribed_s = time.monotonic()
        self._advertised = False

    # ---- connecting --------------------------------------------------------------------------------------------------
    def connect(self, timeout_s: float = 5.0) -> None:
        """Open the sockets; afterwards they reconnect by themselves. Returns with the first joint state, or a second
        later without.

        Raises:
            RobopolicyError: the bridge cannot be reached within `timeout_s`; says why.
        """
        thread = self._thread = BridgeThread()
        until_s = time.monotonic() + timeout_s

        def open_socket(name: str, **hooks: Any) -> Socket:
            return Socket(self._endpoint, thread, name, on_down=self._lost, **hooks)

        self._sockets = {
            "state": open_socket("state", probe=None),
            "command": open_socket("command", gate=self._may_send),
            "service": open_socket("service", on_probe=self._probed),
            "action": open_socket("action"),
            "stop": open_socket("stop"),
        }
        self._subscribe()
        thread.soon(self._watch)
        while not all(s.connected for s in self._sockets.values()):
            problem = next((s.problem for s in self._sockets.values() if s.problem), NOT_TRIED)
            if time.monotonic() > until_s and problem != NOT_TRIED:
                self.close()
                raise RobopolicyError(
                    f"No connection to the bridge within {timeout_s:g} s: {problem}. Start it (rosbridge_server, or "
                    "`robopolicy simrobot`), or set bridge.url."
                )
            time.sleep(0.01)
        try:
            self._know_topics(self._sockets["service"].call("/rosapi/topics", {}, timeout_s=1.0))
        except BridgeError:
            log.info("no rosapi: the bridge's topics are not known")
        until_s = time.monotonic() + FIRST_STATE_S
        while self.state() is None and time.monotonic() < until_s:
            time.sleep(0.01)
        if self._dialect is not None:
            self._advertise(self._dialect)

    def _subscribe(self) -> None:
        state = self._sockets["state"]
        for topic in self.robot.joint_states.topics:
            state.subscribe(topic, messages.JOINT_STATE, self._joint_state)
        for table in self._streams.values():
            stream = table.stream
            compression = "cbor" if table.is_picture else "none"
            state.subscribe(stream.topic, table.type_name, self._receiver(table), compression=compression)
        stop = self.robot.stop
        if stop.topic:
            self._sockets["stop"].subscribe(stop.topic, messages.BOOL, self._estop_topic)
        if stop.service:
            self._sockets["stop"].offer_service(stop.service, "std_srvs/Trigger", self._estop_service)
        if self.robot.status_topic:
            self._sockets["stop"].advertise(self.robot.status_topic, messages.STRING)

    def _advertise(self, dialect: Dialect) -> None:
        """Advertise the command topics on both sockets that publish them."""
        if not self._commands or self._advertised:
            return
        self._advertised = True
        for topic, type_name in self._interface.topics(dialect).items():
            self._sockets["command"].advertise(topic, type_name)
            self._sockets["stop"].advertise(topic, type_name)
        gripper = self.robot.gripper
        if gripper is not None and gripper.interface == "gripper_command" and dialect == "ros1":
            for topic, type_name in ros1_action_topics(gripper.topic, GRIPPER_GOAL).items():
                self._sockets["action"].advertise(topic, type_name)

    # ---- what the robot says (in the bridge's thread) ----------------------------------------------------------------
    def _joint_state(self, message: Message, arrival_s: float) -> None:
        if self._dialect is None and (found := messages.dialect_of(message)) is not None:
            self._dialect = found
        if self._dialect is not None and not self._advertised:
            self._advertise(self._dialect)
        state = self._joints.update(message, arrival_s)
        if state is not None:
            self._quiet_since_s = arrival_s
            if state.stamp_s is not None:
                self._clock.add(state.stamp_s, arrival_s)

    def _receiver(self, table: StreamTable) -> Callable[[Message, float], None]:
        return table.update

    def _estop_topic(self, message: Message, arrival_s: float) -> None:
        if message.get("data") is True:
            self._asked_to_stop(f"stop asked for on {self.robot.stop.topic}")

    def _estop_service(self, args: Any) -> tuple[bool, Message]:
        self._asked_to_stop(f"stop asked for by service {self.robot.stop.service}")
        return True, {"success": True, "message": "stopped"}

    def _asked_to_stop(self, reason: str) -> None:
        self.stop(reason)  # whatever becomes of the rest
        if self._on_stop is not None:
            self._on_stop(reason)

    def _probed(self, values: Any, sent_s: float, received_s: float) -> None:
        """Learn the robot's clock from rosapi's."""
        if isinstance(values, Mapping):
            try:
                now_s = messages.stamp_of({"header": {"stamp": values.get("time")}})
            except MessageError:
                return
            if now_s is not None:
                self._clock.asked(now_s, sent_s, received_s)

    def _lost(self) -> None:
        self._armed = False

    def _watch(self) -> None:
        """Cut the command socket when the joint states grow old; renew what stays silent."""
        if self._closed or self._thread is None:
            return
        now_s = time.monotonic()
        if (self._armed or self._unread) and self.data_age_s() > self.robot.watchdogs.state_age_s:
            self._armed, self._unread = False, False
            self._sockets["command"].reset("the joint states are old")
        state, quiet_s = self._sockets["state"], now_s - self._quiet_since_s
        if state.connected and quiet_s > RECONNECT_S:
            self._quiet_since_s = now_s
            state.reset("no joint states come")
        elif state.connected and now_s - self._resubscribed_s > RESUBSCRIBE_S:
            self._resubscribed_s = now_s
            mute = [table.stream.topic for table in self._streams.values() if table.messages == 0]
            for topic in (*mute, *(self.robot.joint_states.topics if quiet_s > RESUBSCRIBE_S else ())):
                state.resubscribe(topic)
        self._thread.loop.call_later(WATCH_S, self._watch)

    # ---- contract.Robot ----------------------------------------------------------------------------------------------
    def state(self) -> RobotState | None:
        return self._joints.newest

    def _position(self) -> Floats | None:
        return None if self._joints.newest is None else self._joints.newest.position

    def states(self) -> Sequence[RobotState]:
        return self._joints.recent()

    def samples(self, stream: str) -> Sequence[Sample]:
        return self._streams[stream].recent()

    @property
    def armed(self) -> bool:
        return self._armed

    def send(self, position: Floats, velocity: Floats, gripper: float | None) -> None:
        if not self._may_send() or self._dialect is None:
            return
        self._unread = True
        try:
            self._order(self._interface.command(position, velocity, self._dialect), "command")
            if gripper is not None and self.robot.gripper is not None and self.robot.gripper.interface != "none":
                goal = gripper_goal(self.robot.gripper, gripper, self._dialect, self.robot_time_s())
                self._order(goal, "action")
        except BridgeError as error:  # not finite: nothing left, and it is the filter's fault
            self.stop(str(error))

    def stop(self, reason: str) -> None:
        self._armed = False
        thread, command = self._thread, self._sockets.get("command")
        if not self._commands or thread is None or command is None or self._closed:
            return
        command.discard()
        log.info("stop: %s", reason)
        state, fresh = self.state(), self.data_age_s() < self.robot.watchdogs.state_age_s
        actions = self._sockets["action"]
        for key, action in actions.goals.items():
            if action == self.robot.command.topic:  # not the gripper's: what it holds should not fall
                actions.cancel_goal(action, key)
        if self._dialect is None:
            return
        position = state.position if state is not None and fresh else None
        velocity = state.velocity if state is not None and fresh else None
        orders = self._interface.stop(position, velocity, self._dialect)
        socket = self._sockets["stop"]
        self._publish_all(socket, orders)
        for delay_s in STOP_AGAIN_S[1:]:
            thread.soon(thread.loop.call_later, delay_s, self._stop_again, orders)
        if not fresh:  # a frozen bridge must not act on this when it wakes up
            thread.soon(thread.loop.call_later, 0.3, self._drop_old_stop)
        if not thread.here:
            socket.flush(timeout_s=0.05)

    def rearm(self) -> None:
        with self._lock:
            for socket in self._sockets.values():
                socket.discard()
            fresh = self.data_age_s() < self.robot.watchdogs.state_age_s
            able = self._commands and self._dialect is not None and bool(self._sockets)
            self._armed = able and fresh and all(s.connected for s in self._sockets.values())

    def link(self) -> LinkStatus:
        sockets = self._sockets.values()
        pings = [s.ping_s for s in sockets if s.ping_s is not None]
        return LinkStatus(
            connected=bool(sockets) and all(s.connected for s in sockets),
            data_age_s=self.data_age_s(),
            ping_s=max(pings, default=None),
            generation=sum(s.generation for s in sockets),
            detail="; ".join(dict.fromkeys(s.problem for s in sockets if s.problem)),
        )

    def reports(self) -> Sequence[StreamReport]:
        service = self._sockets.get("service")
        if service is not None and service.connected:
            service.ask("/rosapi/topics", {}, self._know_topics)  # for the next time
        rows = [self._joints.report(self._topics)]
        rows += [table.report(self._topics) for table in self._streams.values()]
        return [*rows, self._command_report()]

    def call(self, service: str, request: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        try:
            return self._sockets["service"].call(service, request, timeout_s=timeout_s)
        except (BridgeError, KeyError) as error:
            raise RobopolicyError(str(error)) from error

    def listen(self, *, on_stop: Callable[[str], None]) -> None:
        self._on_stop = on_stop

    def publish_status(self, status: Mapping[str, Any]) -> None:
        if self.robot.status_topic and (socket := self._sockets.get("stop")) is not None and socket.connected:
            socket.publish(self.robot.status_topic, {"data": json.dumps(status, default=str)})

    def close(self) -> None:
        if self._armed:
            self.stop("closed")
            time.sleep(STOP_AGAIN_S[-1] + 0.02)
        self._closed, self._armed = True, False
        for socket in self._sockets.values():
            socket.close()
        if self._thread is not None:
            self._thread.stop()

    # ---- beyond the contract -----------------------------------------------------------------------------------------
    @property
    def dialect(self) -> Dialect | None:
        """How the bridge spells types and time; None before the first stamped message."""
        return self._dialect

    def data_age_s(self) -> float:
        """Age of the newest joint state: since it arrived, or more if its stamp says it was late."""
        state = self.state()
        if state is None:
            return math.inf
        now_s = time.monotonic()
        return max(now_s - state.arrival_s, self._clock.age_s(state.stamp_s, now_s))

    def robot_time_s(self) -> float:
        """The robot's clock now, as far as known; else this machine's."""
        return self._clock.robot_time_s(time.monotonic())

    @property
    def clock_offset_s(self) -> float | None:
        """Robot's clock minus this machine's monotonic clock; None before the first stamp."""
        return self._clock.offset_s

    # ---- sending -----------------------------------------------------------------------------------------------------
    def _may_send(self) -> bool:
        return self._armed and self.data_age_s() < self.robot.watchdogs.state_age_s

    def _order(self, order: Publish | Goal, name: str) -> None:
        if isinstance(order, Goal):
            self._sockets["action"].send_goal(order.action, order.type_name, order.goal)
        else:
            self._sockets[name].publish(order.topic, order.message)
        if name == "command":
            self._commands_sent += 1

    def _publish_all(self, socket: Socket, orders: Sequence[Publish]) -> None:
        for order in orders:
            try:
                socket.publish(order.topic, order.message)
            except BridgeError as error:
                log.error("the stop could not be written: %s", error)

    def _stop_again(self, orders: Sequence[Publish]) -> None:
        if not self._armed and not self._closed:
            self._publish_all(self._sockets["stop"], orders)

    def _drop_old_stop(self) -> None:
        if not self._closed and self.data_age_s() > self.robot.watchdogs.state_age_s:
            self._sockets["stop"].reset("the joint states are old")

    # ---- rosapi ------------------------------------------------------------------------------------------------------
    def _know_topics(self, answer: Mapping[str, Any]) -> None:
        names, types = answer.get("topics"), answer.get("types")
        if isinstance(names, list) and isinstance(types, list):
            self._topics = {str(n): messages.short_type(str(t)) for n, t in zip(names, types, strict=False)}

    def _command_report(self) -> StreamReport:
        command, problem = self.robot.command, ""
        expected = next(iter(self._interface.topics(self._dialect or "ros2").values()))
        if self._joints.newest is not None and self._dialect is None:
            problem = "the joint states have no header that shows ROS 1 or ROS 2; set bridge.dialect"
        elif command.interface != "follow_joint_trajectory" and self._topics and command.topic not in self._topics:
            near = sorted(name for name in self._topics if "traject" in name or "command" in name)
            problem = f"nobody knows {command.topic}; topics that look like commands: {', '.join(near) or 'none'}"
        return StreamReport(
            name="command",
            topic=command.topic,
            expected_type=expected,
            seen_type=self._topics.get(command.topic),
            messages=self._commands_sent,
            problem=problem,
        )
