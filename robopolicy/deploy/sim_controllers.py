"""Controllers of a simulated arm, with the behaviour of ROS's: what a command means, and what silence does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import numpy as np

from robopolicy.errors import RobopolicyError

from .contract import Floats
from .kinematics import Chain
from .messages import MessageError, stamp_of

GRIPPER_TOLERANCE_M = 1e-3
STALLED_M, STALLED_S = 5e-4, 0.2
"""Fingers that moved less in this time stand still; their velocity is no measure, it trembles."""
KEPT_COMMANDS = 4096
MOST_BEFORE_S = 0.02
"""A twist counts for the time before it came, too, back to the cycle before, but no further."""


class _Duration(msgspec.Struct):
    sec: int = 0
    nanosec: int = 0
    secs: int = 0
    nsecs: int = 0

    @property
    def seconds(self) -> float:
        return self.sec + self.secs + 1e-9 * (self.nanosec + self.nsecs)


class _Point(msgspec.Struct, forbid_unknown_fields=True):
    positions: list[float]
    time_from_start: _Duration
    velocities: list[float] = []
    accelerations: list[float] = []
    effort: list[float] = []


class _Trajectory(msgspec.Struct, forbid_unknown_fields=True):
    joint_names: list[str]
    points: list[_Point]
    header: dict[str, Any] = {}


class _Array(msgspec.Struct, forbid_unknown_fields=True):
    data: list[float]
    layout: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """A command as the controller took it."""

    arrival_s: float
    """Monotonic."""
    kind: str
    """`trajectory`, `positions` or `twist`."""
    positions: Floats
    """Of the first point [J]; a twist [6]."""
    velocities: Floats | None
    points: int


class ArmController:
    """Follows trajectories (interpolated), bare positions (at once) and twists (until they time out)."""

    def __init__(
        self,
        joints: Sequence[str],
        *,
        timeout_s: float = 0.0,
        start_from: Literal["desired", "measured"] = "desired",
        chain: Chain | None = None,
    ) -> None:
        """`start_from`: where a new trajectory begins; controllers that take the measured state follow it less well."""
        self._joints, self._timeout_s, self._start_from, self._chain = tuple(joints), timeout_s, start_from, chain
        self._desired = np.zeros(len(joints))
        self._velocity = np.zeros(len(joints))
        self._knots: list[tuple[float, Floats, Floats | None]] = []
        self._twist: tuple[float, Floats] | None = None
        self._sampled_s: float | None = None
        self._on_replaced: Callable[[], None] | None = None
        self.accepted: deque[Accepted] = deque(maxlen=KEPT_COMMANDS)
        self.refused = 0
        self.why_refused = ""

    def reset(self, position: Floats) -> None:
        """Forget every command and hold `position` [J]."""
        self._replace(None)
        self._desired, self._velocity = position.copy(), np.zeros(len(position))
        self._knots, self._twist, self._sampled_s = [], None, None

    def trajectory(
        self,
        message: Any,
        *,
        now_s: float,
        wall_s: float,
        measured: Floats,
        on_replaced: Callable[[], None] | None = None,
    ) -> float | None:
        """Take a JointTrajectory; return when it ends (monotonic), or None if it was refused.

        Args:
            now_s, wall_s: the monotonic and the robot's clock.
            on_replaced: called when another command takes over before the end.
        """
        try:
            knots, velocities = self._read(message, now_s, wall_s)
        except (MessageError, msgspec.ValidationError, OverflowError) as error:
            self.refused, self.why_refused = self.refused + 1, str(error)
            return None
        self._replace(on_replaced)
        self._twist = None
        if self._start_from == "measured":
            self._desired, self._velocity = measured.copy(), np.zeros(len(measured))
        if not knots:  # an empty trajectory holds where the arm is
            self._desired, self._velocity, self._knots = measured.copy(), np.zeros(len(measured)), []
            knots = [(now_s, self._desired, None)]
        start_velocity = self._velocity.copy() if velocities else None
        self._knots = [(now_s, self._desired.copy(), start_velocity), *knots]
        self._note("trajectory", now_s, knots[0][1], knots[0][2], len(knots))
        return knots[-1][0]

    def positions(self, message: Any, *, now_s: float) -> bool:
        """Take a Float64MultiArray of joint positions; say whether it was accepted."""
        try:
            values = np.array(msgspec.convert(message, _Array).data)
            if len(values) != len(self._joints) or not np.isfinite(values).all():
                raise MessageError(f"{len(values)} numbers for {len(self._joints)} joints, or one is not finite")
        except (MessageError, msgspec.ValidationError, OverflowError) as error:
            self.refused, self.why_refused = self.refused + 1, str(error)
            return False
        self._replace(None)
        self._twist, self._knots = None, []
        self._desired, self._velocity = values, np.zeros(len(values))
        self._note("positions", now_s, values, None, 1)
        return True

    def twist(self, message: Any, *, now_s: float) -> bool:
        """Take a TwistStamped in the frame of the base; say whether it was accepted."""
        try:
            parts = [message["twist"][part][axis] for part in ("linear", "angular") for axis in "xyz"]
            values = np.array(parts, dtype=np.float64)
            if self._chain is None or not np.isfinite(values).all():
                raise MessageError("not finite, or the arm's kinematics are not known")
            if stamp_of(message) is None:
                raise MessageError("a twist without a stamp is as old as time")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            self.refused, self.why_refused = self.refused + 1, str(error)
            return False
        self._replace(None)
        self._knots, self._twist = [], (now_s, values)
        self._note("twist", now_s, values, None, 1)
        return True

    def target(self, now_s: float) -> Floats:
        """Return where the joints should be now, [J]."""
        last_s, self._sampled_s = self._sampled_s, now_s
        if self._twist is not None and self._chain is not None:
            began_s, twist = self._twist
            if now_s - began_s > (self._timeout_s or 0.1):
                self._twist = None
            elif last_s is not None:
                passed_s = min(now_s - last_s, now_s - began_s + MOST_BEFORE_S)
                self._desired = self._chain.moved(self._desired, twist * passed_s)
        elif self._knots:
            self._desired, self._velocity = _interpolate(self._knots, now_s)
            end_s = self._knots[-1][0]
            if now_s >= end_s:
                self._on_replaced = None
                if self._timeout_s and now_s - end_s > self._timeout_s:
                    self._knots, self._velocity = [], np.zeros(len(self._desired))
        return self._desired

    def _read(
        self, message: Any, now_s: float, wall_s: float
    ) -> tuple[list[tuple[float, Floats, Floats | None]], bool]:
        """Return the points as (monotonic time, position, velocity), and whether they have velocities."""
        told = msgspec.convert(message, _Trajectory)
        if not told.points:
            return [], False
        if sorted(told.joint_names) != sorted(self._joints):
            raise MessageError(f"the joints {', '.join(told.joint_names)} are not {', '.join(self._joints)}")
        order = [told.joint_names.index(name) for name in self._joints]
        stamp_s = stamp_of({"header": told.header})
        start_s = now_s if stamp_s is None else now_s + stamp_s - wall_s  # a stamp in the past eats the motion's time
        knots: list[tuple[float, Floats, Floats | None]] = []
        with_velocity = all(point.velocities for point in told.points)
        for point in told.points:
            rows = (point.positions, point.velocities) if point.velocities else (point.positions,)
            if any(len(row) != len(order) for row in rows) or not all(np.isfinite(row).all() for row in rows):
                raise MessageError("a point has another number of joints, or a number is not finite")
            at_s = start_s + point.time_from_start.seconds
            if knots and at_s <= knots[-1][0]:
                raise MessageError("the points' times do not increase")
            velocity = np.array(point.velocities)[order] if with_velocity else None
            knots.append((at_s, np.array(point.positions)[order], velocity))
        if knots[-1][0] < now_s:
            raise MessageError("the trajectory ends in the past")
        return knots, with_velocity

    def _replace(self, on_replaced: Callable[[], None] | None) -> None:
        before, self._on_replaced = self._on_replaced, on_replaced
        if before is not None:
            before()

    def _note(self, kind: str, now_s: float, positions: Floats, velocities: Floats | None, points: int) -> None:
        self.accepted.append(
            Accepted(arrival_s=now_s, kind=kind, positions=positions, velocities=velocities, points=points)
        )


def _interpolate(knots: Sequence[tuple[float, Floats, Floats | None]], now_s: float) -> tuple[Floats, Floats]:
    """Return position and velocity at `now_s`: cubic between knots with velocities, else linear; at rest after them."""
    if now_s >= knots[-1][0]:
        return knots[-1][1].copy(), np.zeros(len(knots[-1][1]))
    index = max(i for i, knot in enumerate(knots) if knot[0] <= now_s or i == 0)
    (t0, p0, v0), (t1, p1, v1) = knots[index], knots[index + 1]
    width = t1 - t0
    u = min(max((now_s - t0) / width, 0.0), 1.0) if width > 0 else 1.0
    if v0 is None or v1 is None:
        return p0 + u * (p1 - p0), (p1 - p0) / width if width > 0 else np.zeros(len(p0))
    d0, d1 = v0 * width, v1 * width
    a, b = 2 * (p0 - p1) + d0 + d1, 3 * (p1 - p0) - 2 * d0 - d1
    return ((a * u + b) * u + d0) * u + p0, ((3 * a * u + 2 * b) * u + d0) / width


class GripperController:
    """Two fingers driven to one place; a goal ends when they are there, or stand still on something."""

    def __init__(self, finger_m: float, *, message_per_m: float) -> None:
        """`message_per_m`: of GripperCommand.position per metre of opening, as the robot file has it."""
        self.target_m = finger_m
        """One finger's place."""
        self._per_finger = 0.5 / message_per_m
        self._done: Callable[[bool, bool], None] | None = None
        self._moved = (0.0, 0.0)
        self.commands: deque[tuple[float, float]] = deque(maxlen=KEPT_COMMANDS)
        """(monotonic arrival, opening in metres)."""

    def reset(self, finger_m: float) -> None:
        self.target_m = finger_m
        self._end(False, False)

    def command(self, goal: Mapping[str, Any], now_s: float, done: Callable[[bool, bool], None]) -> None:
        """Take a GripperCommand goal; `done(reached_goal, stalled)` is called when it ends.

        Raises:
            RobopolicyError: the goal has no finite position.
        """
        command = goal.get("command")
        position = command.get("position") if isinstance(command, Mapping) else None
        if not isinstance(position, int | float) or not np.isfinite(position):
            raise RobopolicyError(f"A gripper goal needs command.position; got {goal}.")
        self._end(False, False)
        self.target_m, self._done, self._moved = float(position) * self._per_finger, done, (now_s, np.inf)
        self.commands.append((now_s, 2 * self.target_m))

    def watch(self, finger_m: float, now_s: float) -> None:
        """See whether the goal has ended, with a finger at `finger_m`."""
        if self._done is None:
            return
        if abs(finger_m - self._moved[1]) > STALLED_M:
            self._moved = (now_s, finger_m)
        reached = abs(finger_m - max(self.target_m, 0.0)) < GRIPPER_TOLERANCE_M
        if reached or now_s - self._moved[0] > STALLED_S:
            self._end(reached, not reached)

    def _end(self, reached: bool, stalled: bool) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(reached, stalled)
