"""What arrives from a robot, kept short: the newest state, about a second of history, the robot's clock.

The bridge's thread writes, others read; nothing here waits, and nothing grows.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from . import messages
from .contract import RobotState, Sample, StreamReport
from .messages import JointReading, Message, MessageError
from .robot import RobotFile

T = TypeVar("T")

KEEP_S = 1.5
MOST_STATES, MOST_SAMPLES, MOST_PICTURES = 2048, 512, 32
WINDOW_S = 10.0
SAME_CLOCK_S = 2.0
"""Clocks further apart than this are not the same clock."""


class ClockOffset:
    """Estimates the robot's clock minus this machine's monotonic clock.

    `stamp - arrival` is the offset less the message's delay, so its maximum over a window is the offset less the
    shortest delay. The bridge's own clock, asked by round trip, shows a delay that all messages share.
    """

    def __init__(self) -> None:
        self._seconds: deque[tuple[float, float]] = deque()
        self._asked: float | None = None
        self._wall_s = time.time() - time.monotonic()

    def add(self, stamp_s: float, arrival_s: float) -> None:
        """Take note of a message stamped `stamp_s` that arrived at `arrival_s` (monotonic)."""
        bound, seconds = stamp_s - arrival_s, self._seconds
        if not seconds or arrival_s - seconds[-1][0] > 1.0:
            seconds.append((arrival_s, bound))
            if arrival_s - seconds[0][0] > WINDOW_S:
                seconds.popleft()
        elif bound > seconds[-1][1]:
            seconds[-1] = (seconds[-1][0], bound)

    def asked(self, robot_s: float, sent_s: float, received_s: float) -> None:
        """Take note of an answer: the bridge's clock showed `robot_s` between the two monotonic times."""
        if received_s - sent_s < 0.1:
            self._asked = robot_s - received_s

    @property
    def offset_s(self) -> float | None:
        """Lower bound of robot's minus monotonic clock; None before the first stamp or answer."""
        stamped = max((bound for _, bound in tuple(self._seconds)), default=None)
        if stamped is None or self._asked is None:
            return stamped if stamped is not None else self._asked
        return max(stamped, self._asked) if abs(self._asked - stamped) < SAME_CLOCK_S else stamped

    def age_s(self, stamp_s: float | None, now_s: float) -> float:
        """Return how old something stamped `stamp_s` is at least; 0 where that is unknown."""
        offset = self.offset_s
        return 0.0 if stamp_s is None or offset is None else now_s - (stamp_s - offset)

    def robot_time_s(self, now_s: float) -> float:
        """Return the robot's clock at the monotonic time `now_s`; this machine's wall clock where it is unknown."""
        offset = self.offset_s
        return now_s + (self._wall_s if offset is None else offset)


class Ring(Generic[T]):
    """The newest entries, by time of arrival; copies leave it."""

    def __init__(self, most: int) -> None:
        self._items: deque[tuple[float, T]] = deque(maxlen=most)
        self._lock = threading.Lock()
        self.total = 0

    def append(self, item: T, arrival_s: float) -> None:
        with self._lock:
            self._items.append((arrival_s, item))
            self.total += 1

    def recent(self) -> list[tuple[float, T]]:
        """Return what arrived within `KEEP_S` of the newest, oldest first."""
        with self._lock:
            items = list(self._items)
        return [pair for pair in items if pair[0] > items[-1][0] - KEEP_S]

    @property
    def newest_s(self) -> float:
        with self._lock:
            return self._items[-1][0] if self._items else -math.inf

    def rate_hz(self) -> float | None:
        """Return the mean rate of what is kept; None with less than three entries."""
        times = [arrival_s for arrival_s, _ in self.recent()]
        return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 2 and times[-1] > times[0] else None


class JointTable:
    """Joint states by name: merges partial ones, ignores joints that are not the robot's, refuses null and NaN."""

    def __init__(self, robot: RobotFile) -> None:
        self._robot = robot
        fingers = robot.gripper.joints if robot.gripper is not None else ()
        self._names = (*robot.joints, *fingers)
        self._index = {name: i for i, name in enumerate(self._names)}
        self._arm = len(robot.joints)
        self._position = np.full(len(self._names), np.nan)
        self._velocity = np.full(len(self._names), np.nan)
        self._arrival_s = np.full(len(self._names), -np.inf)
        self._stamp_s = np.full(len(self._names), np.nan)
        self._ring: Ring[RobotState] = Ring(MOST_STATES)
        self._layout: tuple[tuple[str, ...], np.ndarray, np.ndarray] | None = None
        self.newest: RobotState | None = None
        self.messages = self.refused = 0
        self.problem = ""

    def update(self, message: Message, arrival_s: float) -> RobotState | None:
        """Take in one message; return the new state if it told one."""
        self.messages += 1
        try:
            reading = messages.parse_joint_state(message)
            theirs, ours = self._places(reading)
            position, velocity = reading.position[theirs], reading.velocity[theirs]
            if not np.isfinite(position).all():
                bad = [self._names[i] for i, value in zip(ours, position, strict=True) if not math.isfinite(value)]
                raise MessageError(f"the position of {', '.join(bad)} is not a number")
        except MessageError as error:
            self.refused += 1
            self.problem = str(error)
            return None
        self._position[ours], self._velocity[ours] = position, velocity
        self._arrival_s[ours] = arrival_s
        self._stamp_s[ours] = math.nan if reading.stamp_s is None else reading.stamp_s
        if not (ours < self._arm).any():
            return None
        return self._emit()

    def _places(self, reading: JointReading) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the reading our joints stand, and which they are; both [k] int."""
        if self._layout is None or self._layout[0] != reading.names:
            pairs = [(i, self._index[name]) for i, name in enumerate(reading.names) if name in self._index]
            if len({ours for _, ours in pairs}) < len(pairs):
                raise MessageError("a joint is named twice")
            theirs, ours = np.array(pairs, dtype=np.intp).reshape(-1, 2).T
            self._layout = (reading.names, theirs, ours)
        return self._layout[1], self._layout[2]

    def _emit(self) -> RobotState | None:
        """Make a state of the newest of every joint, as old as the oldest of them."""
        arm = slice(0, self._arm)
        arrival_s = float(self._arrival_s[arm].min())
        if arrival_s == -math.inf:
            lacking = [self._names[i] for i in range(self._arm) if self._arrival_s[i] == -math.inf]
            self.problem = f"the joint states lack {', '.join(lacking)}"
            return None
        if self.problem.startswith("the joint states lack"):
            self.problem = ""
        stamp_s, velocity = float(self._stamp_s[arm].min()), self._velocity[arm].copy()
        fingers = self._position[self._arm :]
        known = len(fingers) > 0 and bool(np.isfinite(fingers).all())
        speed = float(self._velocity[self._arm :].sum()) if known else math.nan
        state = RobotState(
            stamp_s=stamp_s if math.isfinite(stamp_s) else None,
            arrival_s=arrival_s,
            position=self._position[arm].copy(),
            velocity=velocity if np.isfinite(velocity).all() else None,
            gripper_width_m=float(fingers.sum()) if known else None,
            gripper_velocity_m_s=speed if math.isfinite(speed) else None,
        )
        self._ring.append(state, arrival_s)
        self.newest = state
        return state

    def recent(self) -> Sequence[RobotState]:
        """Return the last second or so, oldest first."""
        return [state for _, state in self._ring.recent()]

    def report(self, topics: Mapping[str, str]) -> StreamReport:
        """Say what was seen; `topics` as rosapi lists them, empty if it does not."""
        wanted = self._robot.joint_states
        absent = [topic for topic in wanted.topics if topics and topic not in topics]
        problem = self.problem
        if absent:
            problem = f"the bridge has no topic {', '.join(absent)}; {similar(messages.JOINT_STATE, topics)}"
        elif not self.messages:
            problem = f"no message yet on {', '.join(wanted.topics)}; is the robot's driver running?"
        elif self.refused and problem:
            problem = f"{self.refused} of {self.messages} messages refused: {problem}"
        return _report("joints", ", ".join(wanted.topics), messages.JOINT_STATE, self._ring, topics, problem)


@dataclass(slots=True)
class _Entry:
    """A message, read now or, if it is a picture, when it is wanted."""

    message: Message | None
    arrival_s: float
    sample: Sample | None = None


class StreamTable:
    """One topic beside the joint states. Pictures are decoded when they are asked for, once, by who asks."""

    def __init__(self, name: str, robot: RobotFile) -> None:
        """Raises UnknownNameError if `robot` has no such stream, or its type has no reader."""
        from robopolicy.errors import UnknownNameError

        if name not in robot.streams:
            raise UnknownNameError(f"stream of robot file {robot.name!r}", name, robot.streams)
        self.name, self.stream = name, robot.streams[name]
        self.type_name = messages.short_type(self.stream.type)
        if self.type_name not in messages.PARSERS:
            raise UnknownNameError(f"message type of stream {name!r}", self.stream.type, messages.PARSERS)
        self.is_picture = self.type_name in (messages.COMPRESSED, messages.IMAGE)
        self._ring: Ring[_Entry] = Ring(MOST_PICTURES if self.is_picture else MOST_SAMPLES)
        self._lock = threading.Lock()
        self.messages = self.refused = 0
        self.problem = ""

    def update(self, message: Message, arrival_s: float) -> None:
        """Take in one message."""
        self.messages += 1
        entry = _Entry(message, arrival_s)
        if self.is_picture or self._read(entry):
            self._ring.append(entry, arrival_s)

    def _read(self, entry: _Entry) -> bool:
        """Turn the entry's message into its sample; say whether it could be read."""
        message, entry.message = entry.message, None
        if message is not None:
            try:
                value, stamp_s = messages.PARSERS[self.type_name](message), messages.stamp_of(message)
                entry.sample = Sample(value=value, stamp_s=stamp_s, arrival_s=entry.arrival_s)
            except MessageError as error:
                self.refused, self.problem = self.refused + 1, str(error)
        return entry.sample is not None

    def recent(self) -> Sequence[Sample]:
        """Return the last second or so, oldest first."""
        entries = [entry for _, entry in self._ring.recent()]
        with self._lock:
            for entry in entries:
                self._read(entry)
        return [entry.sample for entry in entries if entry.sample is not None]

    def report(self, topics: Mapping[str, str]) -> StreamReport:
        """Say what was seen; `topics` as rosapi lists them, empty if it does not."""
        stream, problem = self.stream, ""
        seen = topics.get(stream.topic)
        if topics and seen is None:
            problem = f"the bridge has no topic {stream.topic}; {similar(self.type_name, topics)}"
        elif seen is not None and seen != self.type_name:
            problem = f"{stream.topic} is of type {seen}; set streams.{self.name}.type or another topic"
        elif not self.messages:
            problem = f"no message yet on {stream.topic}; does its publisher run?"
        elif self.refused:
            problem = f"{self.refused} of {self.messages} messages refused: {self.problem}"
        return _report(self.name, stream.topic, self.type_name, self._ring, topics, problem)


def similar(type_name: str, topics: Mapping[str, str]) -> str:
    """Name the topics that have the type."""
    found = sorted(topic for topic, kind in topics.items() if kind == type_name)
    return f"of type {type_name} it has {', '.join(found) or 'none'}"


def _report(name: str, topic: str, type_name: str, ring: Ring, topics: Mapping[str, str], problem: str) -> StreamReport:
    newest_s = ring.newest_s
    return StreamReport(
        name=name,
        topic=topic,
        expected_type=type_name,
        seen_type=topics.get(topic),
        messages=ring.total,
        rate_hz=ring.rate_hz(),
        age_s=time.monotonic() - newest_s if newest_s > -math.inf else None,
        problem=problem,
    )
