"""The arithmetic of the safety filter, compiled: joint by joint, without new memory. See `limits.py`."""

from __future__ import annotations

import math

import numba

from robopolicy.deploy import kinematics
from robopolicy.deploy.contract import Floats

POSITION, VELOCITY, ACCELERATION, JERK, TOOL_SPEED, WORKSPACE = (1 << i for i in range(6))
"""Bits of a clamp mask."""
BRAKING_POINTS = 4


@numba.njit(cache=True, nogil=True)
def distance(a: Floats, b: Floats) -> float:
    most = 0.0
    for k in range(a.shape[0]):
        most = max(most, abs(a[k] - b[k]))
    return most


@numba.njit(cache=True, nogil=True)
def check(
    wanted: Floats, goal: Floats, velocity: Floats, measured: Floats, last: Floats, jump: float, following: float
) -> int:
    """Return 0 if the command may be considered, else 1 not finite, 2 jump, 3 following error."""
    for k in range(wanted.shape[0]):
        finite = math.isfinite(wanted[k]) and math.isfinite(goal[k]) and math.isfinite(velocity[k])
        if not (finite and math.isfinite(measured[k])):
            return 1
    if distance(wanted, last) > jump or distance(goal, last) > jump:
        return 2
    if distance(last, measured) > following:
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
def limit(
    wanted: Floats,
    wanted_velocity: Floats,
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
