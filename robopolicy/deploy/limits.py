"""The safety filter: the last thing a command passes before it leaves, independent of the policy, compiled.

It moves the last command sent towards the wanted one as far as the limits allow within the time that really passed:

- A wanted position that is not finite, has the wrong length or is further away than a policy can mean is *rejected*:
  the arm brakes to rest along its limits instead. So is any while measured and sent positions lie too far apart.
- Anything else is *clamped*: position (with the room that braking needs), velocity, acceleration, jerk, speed of the
  tool centre, and the box that the tool centre must stay in.

Clamps and rejections are counted by reason. The filter is not a safety device: the arm's own limits and the emergency
stop are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numba
import numpy as np

from robopolicy.deploy import kinematics
from robopolicy.deploy.contract import Floats
from robopolicy.deploy.kinematics import Chain
from robopolicy.deploy.robot import RobotFile

CLAMPS = ("position", "velocity", "acceleration", "jerk", "tool speed", "workspace")
"""What can be clamped; bit `i` of a clamp mask is the i-th."""
REJECTIONS = ("not finite", "wrong length", "jump", "following error", "first command")
POSITION, VELOCITY, ACCELERATION, JERK, TOOL_SPEED, WORKSPACE = (1 << i for i in range(6))
BRAKING_POINTS = 4
LEAST_SPEED = 0.1
"""Share of the velocity limits at the start of the ramp after arming."""


@dataclass(slots=True)
class Filtered:
    """What the filter made of one wanted position. The arrays are the filter's own and change at its next call."""

    position: Floats
    velocity: Floats
    clamped: int = 0
    rejected: str = ""


@dataclass
class Counts:
    """How often each reason occurred since the filter was built."""

    passed: int = 0
    clamps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLAMPS, 0))
    rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))


class SafetyFilter:
    """Holds what was sent last and lets nothing past the limits of a robot file.

    Args:
        speed: share of real time at which the motion is played, (0, 1]: velocity limits shrink by it, acceleration by
            its square, jerk by its cube, which is what the same path takes when played that much slower.
    """

    def __init__(self, robot: RobotFile, chain: Chain, *, speed: float = 1.0) -> None:
        limits, safety = robot.limits, robot.safety
        self.safety = safety
        self.counts = Counts()
        self.rejections_in_a_row = 0
        self.clamps_in_a_row = 0
        self._dt_s = 1.0 / robot.command.rate_hz
        self._chain = chain
        self._low = np.array(limits.position_low) + safety.position_margin_rad
        self._high = np.array(limits.position_high) - safety.position_margin_rad
        self._velocity = np.array(limits.velocity) * safety.velocity_scale * speed
        self._acceleration = np.array(limits.acceleration) * safety.acceleration_scale * speed**2
        self._jerk = np.array(limits.jerk) * safety.jerk_scale * speed**3
        self._tool_speed = safety.tcp_speed_m_s * speed
        base = np.array([*robot.frames.base_position_m, *robot.frames.base_quaternion])
        self._base = base
        self._box = np.array([safety.workspace_low_m, safety.workspace_high_m])
        joints = len(robot.joints)
        self._last, self._last_velocity, self._last_acceleration = np.zeros((3, joints))
        self._out = Filtered(np.zeros(joints), np.zeros(joints))
        self._work = np.zeros((4, joints))
        self._pose = np.zeros((2, 7))
        self._end = np.full(joints, np.inf)
        self._since_arming_s = 0.0
        self._first = True
        self.reset(np.zeros(joints))
        self.step(np.zeros(joints), np.zeros(joints), np.zeros(joints), self._dt_s)  # compiles
        self.counts = Counts()

    @property
    def last(self) -> Floats:
        """[J] rad: what was sent last."""
        return self._last

    def reset(self, measured: Floats) -> None:
        """Start anew at rest at the `measured` position [J], with the ramp."""
        self._last[:] = measured
        self._last_velocity[:] = 0.0
        self._last_acceleration[:] = 0.0
        self._since_arming_s, self._first = 0.0, True
        self.rejections_in_a_row = self.clamps_in_a_row = 0

    def step(
        self,
        wanted: Floats,
        wanted_velocity: Floats,
        measured: Floats,
        dt_s: float,
        *,
        target: Floats | None = None,
        ends_there: bool = True,
    ) -> Filtered:
        """Return what may be sent now.

        Args:
            wanted: where the policy wants the arm to be one turn from now, rad.
            wanted_velocity: [J] rad/s, how fast the wanted position moves.
            measured: [J] rad.
            target: [J] rad, where the wanted motion leads; None: `wanted` itself. Jumps are told by it.
            ends_there: the motion ends at the target, and the arm stays slow enough to stop there.
            dt_s: time since the last call, on the monotonic clock. No more than two command periods are used: after a
                pause the arm does not catch up by a leap.
        """
        out = self._out
        dt_s = min(max(dt_s, 0.2 * self._dt_s), 2.0 * self._dt_s)
        goal = wanted if target is None else target
        out.rejected = self._why_not(wanted, goal, wanted_velocity, measured)
        if out.rejected:
            self.counts.rejections[out.rejected] += 1
            self.rejections_in_a_row += 1
            self._move(self._last, True, dt_s)
            return out
        ramp = self.safety.ramp_in_s
        share = 1.0 if ramp <= 0.0 else min(1.0, LEAST_SPEED + (1.0 - LEAST_SPEED) * self._since_arming_s / ramp)
        self._since_arming_s += dt_s
        self._first = False
        self.rejections_in_a_row = 0
        self._work[3] = wanted_velocity
        self._end[:] = target if target is not None and ends_there else np.inf
        out.clamped = self._move(wanted, False, dt_s, share)
        self.clamps_in_a_row = self.clamps_in_a_row + 1 if out.clamped else 0
        self._count(out.clamped)
        return out

    def brake(self, dt_s: float) -> Filtered:
        """Return the next command on the way to rest; nothing is wanted and nothing counted."""
        self._out.rejected = ""
        self._out.clamped = 0
        self._move(self._last, True, min(max(dt_s, 0.2 * self._dt_s), 2.0 * self._dt_s))
        return self._out

    @property
    def why_stop(self) -> str:
        """Say why the arm should stop for good, in words; empty while there is no reason."""
        safety = self.safety
        if safety.stop_after_rejections and self.rejections_in_a_row >= safety.stop_after_rejections:
            return f"{self.rejections_in_a_row} commands in a row were rejected: {self._out.rejected}"
        if safety.stop_after_clamps and self.clamps_in_a_row >= safety.stop_after_clamps:
            return f"{self.clamps_in_a_row} commands in a row were clamped: {', '.join(clamp_names(self._out.clamped))}"
        return ""

    def _why_not(self, wanted: Floats, goal: Floats, wanted_velocity: Floats, measured: Floats) -> str:
        count = self._last.shape
        if {wanted.shape, goal.shape, wanted_velocity.shape, measured.shape} != {count}:
            return "wrong length"
        safety, last = self.safety, self._last
        why = _check(wanted, goal, wanted_velocity, measured, last, safety.jump_rad, safety.following_error_rad)
        if not why and self._first and _distance(self._last, measured) > self.safety.first_command_rad:
            return "first command"
        return ("", "not finite", "jump", "following error")[why]

    def _move(self, wanted: Floats, braking: bool, dt_s: float, share: float = 1.0) -> int:
        if braking:
            self._work[3] = 0.0
        chain = self._chain
        clamped = _limit(
            wanted,
            self._work[3],
            self._end,
            braking,
            dt_s,
            share,
            self._low,
            self._high,
            self._velocity,
            self._acceleration,
            self._jerk,
            self._tool_speed,
            self._box,
            self._base,
            chain.origins,
            chain.rolls,
            chain.tool_yaw,
            self._last,
            self._last_velocity,
            self._last_acceleration,
            self._work,
            self._pose,
        )
        self._out.position[:] = self._last
        self._out.velocity[:] = self._last_velocity
        return int(clamped)

    def _count(self, clamped: int) -> None:
        self.counts.passed += 1
        if clamped:
            for i, name in enumerate(CLAMPS):
                self.counts.clamps[name] += clamped >> i & 1


def clamp_names(mask: int) -> list[str]:
    """Return the reasons in a clamp mask."""
    return [name for i, name in enumerate(CLAMPS) if mask >> i & 1]


@numba.njit(cache=True, nogil=True)
def _distance(a: Floats, b: Floats) -> float:
    most = 0.0
    for k in range(a.shape[0]):
        most = max(most, abs(a[k] - b[k]))
    return most


@numba.njit(cache=True, nogil=True)
def _check(
    wanted: Floats, goal: Floats, velocity: Floats, measured: Floats, last: Floats, jump: float, following: float
) -> int:
    """Return 0 if the command may be considered, else 1 not finite, 2 jump, 3 following error."""
    for k in range(wanted.shape[0]):
        finite = math.isfinite(wanted[k]) and math.isfinite(goal[k]) and math.isfinite(velocity[k])
        if not (finite and math.isfinite(measured[k])):
            return 1
    if _distance(wanted, last) > jump or _distance(goal, last) > jump:
        return 2
    if _distance(last, measured) > following:
        return 3
    return 0


@numba.njit(cache=True, nogil=True, inline="always")
def _reachable_speed(distance: float, acceleration: float, jerk: float, dt_s: float) -> float:
    """Most speed from which one can still come to rest within `distance` >= 0.

    At speed v it takes v dt + v (2 a / j) + v^2 / (2 a): a turn, the time to build the braking up, and the braking.
    """
    delay = dt_s + 2.0 * acceleration / jerk
    return acceleration * (math.sqrt(delay * delay + 2.0 * distance / acceleration) - delay)


@numba.njit(cache=True, nogil=True)
def _approach(
    k: int,
    wanted: float,
    wanted_velocity: float,
    end: float,
    share: float,
    dt_s: float,
    low: Floats,
    high: Floats,
    velocity: Floats,
    acceleration: Floats,
    jerk: Floats,
    last: Floats,
    clamped: int,
) -> tuple[float, int]:
    """Return the velocity of joint `k` that heads for `wanted` and can still stop before its ends, and the clamps."""
    if wanted < low[k] or wanted > high[k]:
        wanted, wanted_velocity = min(max(wanted, low[k]), high[k]), 0.0
        clamped |= POSITION
    gap = wanted - wanted_velocity * dt_s - last[k]  # what is behind now, beside the wanted motion
    near = _reachable_speed(abs(gap), acceleration[k], jerk[k], dt_s)
    v = wanted_velocity + (near if gap >= 0.0 else -near)
    left = end - last[k]
    if math.isfinite(left) and v * left > 0.0:
        enough = _reachable_speed(abs(left), acceleration[k], jerk[k], dt_s)
        v = min(max(v, -enough), enough)
    top = velocity[k] * share
    if abs(v) > top:
        v = top if v > 0.0 else -top
        clamped |= VELOCITY
    up = _reachable_speed(max(high[k] - last[k], 0.0), acceleration[k], jerk[k], dt_s)
    down = _reachable_speed(max(last[k] - low[k], 0.0), acceleration[k], jerk[k], dt_s)
    if v > up or v < -down:
        v = min(max(v, -down), up)
        clamped |= POSITION
    return v, clamped


@numba.njit(cache=True, nogil=True)
def _within_rates(
    k: int, v: float, dt_s: float, acceleration: Floats, jerk: Floats, last_v: Floats, last_a: Floats, clamped: int
) -> tuple[float, int]:
    """Return `v` brought within acceleration and jerk of what was sent before, and the clamps.

    Acceleration grows only so far that it can be taken back, at the jerk allowed, by the time `v` is reached.
    """
    change = jerk[k] * dt_s
    lacking = v - last_v[k]
    a = jerk[k] * (math.sqrt(dt_s * dt_s + 2.0 * abs(lacking) / jerk[k]) - dt_s)
    a = min(a, abs(lacking) / dt_s)
    if lacking < 0.0:
        a = -a
    if abs(a) > acceleration[k]:
        a = acceleration[k] if a > 0.0 else -acceleration[k]
        clamped |= ACCELERATION
    if a > last_a[k] + change or a < last_a[k] - change:
        a = min(max(a, last_a[k] - change), last_a[k] + change)
        clamped |= JERK
    return last_v[k] + a * dt_s, clamped


@numba.njit(cache=True, nogil=True)
def _outside(point: Floats, box: Floats) -> float:
    """How far `point` lies outside the box, m."""
    most = 0.0
    for i in range(3):
        most = max(most, box[0, i] - point[i], point[i] - box[1, i])
    return most


@numba.njit(cache=True, nogil=True)
def _place(base: Floats, origins: Floats, rolls: Floats, tool_yaw: float, position: Floats, pose: Floats) -> None:
    """Write the tool centre [3] in the frame of the observations into `pose`."""
    kinematics.forward(origins, rolls, tool_yaw, position, pose)
    p = kinematics.rotate((base[3], base[4], base[5], base[6]), (pose[0], pose[1], pose[2]))
    pose[0], pose[1], pose[2] = base[0] + p[0], base[1] + p[1], base[2] + p[2]


@numba.njit(cache=True, nogil=True)
def _leaves_box(
    dt_s: float,
    acceleration: Floats,
    jerk: Floats,
    box: Floats,
    base: Floats,
    origins: Floats,
    rolls: Floats,
    tool_yaw: float,
    last: Floats,
    last_v: Floats,
    velocity: Floats,
    at: Floats,
    peak: Floats,
    pose: Floats,
) -> bool:
    """Say whether the tool centre would leave the box if the arm took this turn at `velocity` and then braked to rest.

    Looked at are BRAKING_POINTS moments of the braking; `pose[0]` holds where the tool centre is.
    """
    already, longest = _outside(pose[0], box), 0.0
    for k in range(last.shape[0]):
        # while an acceleration along the motion is taken back, at the jerk allowed, the velocity still grows
        gaining = max(0.0, (velocity[k] - last_v[k]) / dt_s * (1.0 if velocity[k] > 0.0 else -1.0))
        peak[k] = abs(velocity[k]) + 0.5 * gaining * gaining / jerk[k]
        longest = max(longest, peak[k] / acceleration[k] + 2.0 * acceleration[k] / jerk[k])
    for point in range(1, BRAKING_POINTS + 1):
        passed = longest * point / BRAKING_POINTS
        for k in range(last.shape[0]):
            v, a = peak[k], acceleration[k]
            delay = 2.0 * a / jerk[k]
            moving = max(0.0, min(passed - delay, v / a))
            way = v * min(passed, delay) + v * moving - 0.5 * a * moving * moving
            at[k] = last[k] + velocity[k] * dt_s + (way if velocity[k] > 0.0 else -way)
        _place(base, origins, rolls, tool_yaw, at, pose[1])
        out = _outside(pose[1], box)
        if out > 0.0 and out > already - 1e-5:
            return True
    return False


@numba.njit(cache=True, nogil=True)
def _limit(
    wanted: Floats,
    wanted_velocity: Floats,
    end: Floats,
    braking: bool,
    dt_s: float,
    share: float,
    low: Floats,
    high: Floats,
    velocity: Floats,
    acceleration: Floats,
    jerk: Floats,
    tool_speed: float,
    box: Floats,
    base: Floats,
    origins: Floats,
    rolls: Floats,
    tool_yaw: float,
    last: Floats,
    last_v: Floats,
    last_a: Floats,
    work: Floats,
    pose: Floats,
) -> int:
    """Move `last`, `last_v`, `last_a` [J] one turn on; return the clamps. `work` [4, J], `pose` [2, 7]: scratch."""
    count, clamped = last.shape[0], 0
    target, ahead, rest = work[0], work[1], work[2]
    for k in range(count):
        target[k] = 0.0
        if not braking:
            target[k], clamped = _approach(
                k,
                wanted[k],
                wanted_velocity[k],
                end[k],
                share,
                dt_s,
                low,
                high,
                velocity,
                acceleration,
                jerk,
                last,
                clamped,
            )
    _place(base, origins, rolls, tool_yaw, last, pose[0])
    if not braking:
        for k in range(count):
            ahead[k] = last[k] + target[k] * dt_s
        _place(base, origins, rolls, tool_yaw, ahead, pose[1])
        d = 0.0
        for i in range(3):
            d += (pose[1, i] - pose[0, i]) ** 2
        if math.sqrt(d) > tool_speed * dt_s:
            slower = tool_speed * dt_s / math.sqrt(d)
            clamped |= TOOL_SPEED
            for k in range(count):
                target[k] *= slower
    rates = 0
    for k in range(count):
        ahead[k], rates = _within_rates(k, target[k], dt_s, acceleration, jerk, last_v, last_a, rates)
    if not braking and _leaves_box(
        dt_s, acceleration, jerk, box, base, origins, rolls, tool_yaw, last, last_v, ahead, rest, target, pose
    ):
        clamped |= WORKSPACE
        for k in range(count):
            ahead[k], _ = _within_rates(k, 0.0, dt_s, acceleration, jerk, last_v, last_a, 0)
    for k in range(count):
        last_a[k] = (ahead[k] - last_v[k]) / dt_s
        last_v[k] = ahead[k]
        last[k] += ahead[k] * dt_s
    return clamped | rates
