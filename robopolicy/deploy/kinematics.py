"""Forward and inverse kinematics of the arms that are deployed to, compiled; numbers from their makers' URDFs.

Poses are [x, y, z, qw, qx, qy, qz] in the frame of the robot's base. The inverse repeats the settings of ManiSkill's
CPU controllers (damped least squares in steps of 0.1 until the error is under 1e-4, at most 100 of them, else the arm
keeps its position), since a policy was trained on what they make of its actions. It stands apart from the simulation's
own batched kinematics, which repeat another program to the last bit: this package runs where no simulator is installed.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

from robopolicy.deploy.contract import Floats
from robopolicy.errors import UnknownNameError

TOLERANCE, MAX_ITERATIONS, STEP, DAMPING = 1e-4, 100, 0.1, 1e-6


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A serial chain of revolute joints about the z axes of their frames."""

    origins: Floats
    """[J + 1, 3] m: each joint's frame from the one before; the last leads from the last joint to the tool centre."""
    rolls: Floats
    """[J + 1] rad, about x: turns that follow the shifts."""
    tool_yaw: float
    """rad, about z, of the tool against the last joint."""

    def forward(self, position: Floats) -> Floats:
        """Return the pose [7] of the tool centre at joint `position` [J]."""
        out = np.empty(7)
        forward(self.origins, self.rolls, self.tool_yaw, np.ascontiguousarray(position, np.float64), out)
        return out

    def jacobian(self, position: Floats) -> Floats:
        """Return [6, J]: velocity (m/s) and turn (rad/s) of the tool centre per joint velocity, in the base's frame."""
        count = len(position)
        axes, points = np.empty((count, 3)), np.empty((count, 3))
        _axes(self.origins, self.rolls, np.ascontiguousarray(position, np.float64), axes, points)
        return np.concatenate([np.cross(axes, self.forward(position)[:3] - points), axes], axis=1).T

    def moved(self, position: Floats, way: Floats) -> Floats:
        """Return `position` [J] after the tool went the short `way` [6] (m, rad), by damped least squares.

        Unlike `inverse`, which is content within its tolerance, it also goes ways of a few micrometres.
        """
        jacobian = self.jacobian(position)
        damped = jacobian @ jacobian.T + DAMPING * np.eye(6)
        return position + jacobian.T @ np.linalg.solve(damped, way)

    def inverse(self, pose: Floats, start: Floats) -> tuple[Floats, bool]:
        """Return joint positions [J] that reach `pose` [7] from `start` [J], and whether they do.

        Where they do not, they are `start`.
        """
        out = np.array(start, np.float64)
        found = inverse(self.origins, self.rolls, self.tool_yaw, np.ascontiguousarray(pose, np.float64), out)
        return (out, True) if found else (np.array(start, np.float64), False)


_QUARTER = math.pi / 2
CHAINS = {
    "panda": Chain(
        origins=np.array(
            [
                [0.0, 0.0, 0.333],
                [0.0, 0.0, 0.0],
                [0.0, -0.316, 0.0],
                [0.0825, 0.0, 0.0],
                [-0.0825, 0.384, 0.0],
                [0.0, 0.0, 0.0],
                [0.088, 0.0, 0.0],
                [0.0, 0.0, 0.107 + 0.1034],
            ]
        ),
        rolls=np.array([0.0, -_QUARTER, _QUARTER, _QUARTER, -_QUARTER, _QUARTER, _QUARTER, 0.0]),
        tool_yaw=-math.pi / 4,
    )
}
"""Name in a robot file to chain."""


@functools.cache
def find_chain(name: str) -> Chain:
    """Return the chain called `name`, compiled: a control loop has no time for that later.

    Raises:
        UnknownNameError: there is none.
    """
    if name not in CHAINS:
        raise UnknownNameError("kinematic chain", name, CHAINS)
    chain = CHAINS[name]
    rest = np.zeros(len(chain.rolls) - 1)
    chain.inverse(chain.forward(rest), rest)
    chain.jacobian(rest)
    return chain


@numba.njit(cache=True, nogil=True, inline="always")
def multiply(a: Any, b: Any) -> Any:
    """Product of the quaternions `a` and `b`, w first."""
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


@numba.njit(cache=True, nogil=True, inline="always")
def rotate(q: Any, v: Any) -> Any:
    """The vector `v` turned by the quaternion `q`."""
    tx = 2.0 * (q[2] * v[2] - q[3] * v[1])
    ty = 2.0 * (q[3] * v[0] - q[1] * v[2])
    tz = 2.0 * (q[1] * v[1] - q[2] * v[0])
    return (
        v[0] + q[0] * tx + q[2] * tz - q[3] * ty,
        v[1] + q[0] * ty + q[3] * tx - q[1] * tz,
        v[2] + q[0] * tz + q[1] * ty - q[2] * tx,
    )


@numba.njit(cache=True, nogil=True)
def forward(origins: Floats, rolls: Floats, tool_yaw: float, position: Floats, out: Floats) -> None:
    """Write the pose [7] of the tool centre into `out`; the quaternion's sign is that of the product of half turns."""
    q = (1.0, 0.0, 0.0, 0.0)
    x, y, z = 0.0, 0.0, 0.0
    count = position.shape[0]
    for k in range(count + 1):
        d = rotate(q, (origins[k, 0], origins[k, 1], origins[k, 2]))
        x, y, z = x + d[0], y + d[1], z + d[2]
        q = multiply(q, (math.cos(0.5 * rolls[k]), math.sin(0.5 * rolls[k]), 0.0, 0.0))
        half = 0.5 * (position[k] if k < count else tool_yaw)
        q = multiply(q, (math.cos(half), 0.0, 0.0, math.sin(half)))
    out[0], out[1], out[2], out[3], out[4], out[5], out[6] = x, y, z, q[0], q[1], q[2], q[3]


@numba.njit(cache=True, nogil=True)
def _axes(origins: Floats, rolls: Floats, position: Floats, axes: Floats, points: Floats) -> None:
    """Write axis and origin [J, 3] of every joint in the base frame."""
    q = (1.0, 0.0, 0.0, 0.0)
    x, y, z = 0.0, 0.0, 0.0
    for k in range(position.shape[0]):
        d = rotate(q, (origins[k, 0], origins[k, 1], origins[k, 2]))
        x, y, z = x + d[0], y + d[1], z + d[2]
        q = multiply(q, (math.cos(0.5 * rolls[k]), math.sin(0.5 * rolls[k]), 0.0, 0.0))
        axes[k, 0], axes[k, 1], axes[k, 2] = rotate(q, (0.0, 0.0, 1.0))
        points[k, 0], points[k, 1], points[k, 2] = x, y, z
        half = 0.5 * position[k]
        q = multiply(q, (math.cos(half), 0.0, 0.0, math.sin(half)))


@numba.njit(cache=True, nogil=True)
def _difference(pose: Floats, goal: Floats, err: Floats) -> float:
    """Write what leads from `pose` to `goal` in the base frame, [6]: shift and rotation vector; return its norm."""
    q = multiply((goal[3], goal[4], goal[5], goal[6]), (pose[3], -pose[4], -pose[5], -pose[6]))
    sign = 1.0 if q[0] >= 0.0 else -1.0
    sine = math.sqrt(q[1] * q[1] + q[2] * q[2] + q[3] * q[3])
    angle = 2.0 * math.atan2(sine, sign * q[0])
    scale = sign * (angle / sine if sine > 1e-12 else 2.0)
    total = 0.0
    for i in range(3):
        err[i] = goal[i] - pose[i]
        err[i + 3] = scale * q[i + 1]
        total += err[i] * err[i] + err[i + 3] * err[i + 3]
    return math.sqrt(total)


@numba.njit(cache=True, nogil=True)
def inverse(origins: Floats, rolls: Floats, tool_yaw: float, goal: Floats, position: Floats) -> bool:
    """Move `position` [J] in place until the tool centre is at `goal` [7]; return whether it got there."""
    count = position.shape[0]
    pose, err, y = np.empty(7), np.empty(6), np.empty(6)
    axes, points, jac, work = np.empty((count, 3)), np.empty((count, 3)), np.empty((6, count)), np.empty((6, 6))
    for _ in range(MAX_ITERATIONS + 1):
        forward(origins, rolls, tool_yaw, position, pose)
        norm = _difference(pose, goal, err)
        if norm < TOLERANCE:
            return True
        if not norm < 1e6:
            return False
        _axes(origins, rolls, position, axes, points)
        for k in range(count):
            ax, ay, az = axes[k, 0], axes[k, 1], axes[k, 2]
            rx, ry, rz = pose[0] - points[k, 0], pose[1] - points[k, 1], pose[2] - points[k, 2]
            jac[0, k], jac[1, k], jac[2, k] = ay * rz - az * ry, az * rx - ax * rz, ax * ry - ay * rx
            jac[3, k], jac[4, k], jac[5, k] = ax, ay, az
        _damped_step(jac, err, work, y, position)
    return False


@numba.njit(cache=True, nogil=True)
def _damped_step(jac: Floats, err: Floats, work: Floats, y: Floats, position: Floats) -> None:
    """Move `position` by STEP * J^T (J J^T + DAMPING)^-1 err; `work` [6, 6] takes the Cholesky factor."""
    count = position.shape[0]
    for i in range(6):
        for j in range(i + 1):
            s = DAMPING if i == j else 0.0
            for k in range(count):
                s += jac[i, k] * jac[j, k]
            for k in range(j):
                s -= work[i, k] * work[j, k]
            work[i, j] = math.sqrt(s) if i == j else s / work[j, j]
    for i in range(6):
        s = err[i]
        for k in range(i):
            s -= work[i, k] * y[k]
        y[i] = s / work[i, i]
    for i in range(5, -1, -1):
        s = y[i]
        for k in range(i + 1, 6):
            s -= work[k, i] * y[k]
        y[i] = s / work[i, i]
    for k in range(count):
        s = 0.0
        for i in range(6):
            s += jac[i, k] * y[i]
        position[k] += STEP * s
