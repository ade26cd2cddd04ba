"""Closed-loop inverse kinematics of a serial chain, for many rows at once.

It repeats what ManiSkill's CPU simulation does through Pinocchio: steps of `0.1` along the damped least-squares
solution of the logarithm of the pose error, until its norm is under 1e-4 or 100 steps have passed.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from .physx_kinematics import PRISMATIC

Floats = NDArray[np.float64]
EPS, MAX_ITERATIONS, STEP, DAMPING = 1e-4, 100, 0.1, 1e-6
"""ManiSkill's iteration limit and SAPIEN's default tolerance, step and damping."""
SMALL_ANGLE = float(np.finfo(np.float64).eps ** 0.25)
"""Below it Pinocchio uses the first terms of the series."""


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _chain(fixed: Floats, kind: NDArray[np.int64], q: Floats, axes: Floats, points: Floats, frame: Floats) -> None:
    """Run along the chain: joint axes and origins [n, 3] in the base frame, `frame` [3, 4] of the last joint's link.

    `fixed` [n + 1, 3, 4]: from the previous joint's moved frame to the next joint's; the last leads to the link.
    """
    n = kind.shape[0]
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0
    x, y, z = 0.0, 0.0, 0.0
    for k in range(n + 1):
        f = fixed[k]
        x += r00 * f[0, 3] + r01 * f[1, 3] + r02 * f[2, 3]
        y += r10 * f[0, 3] + r11 * f[1, 3] + r12 * f[2, 3]
        z += r20 * f[0, 3] + r21 * f[1, 3] + r22 * f[2, 3]
        a0, a1, a2 = r00, r01, r02
        r00 = a0 * f[0, 0] + a1 * f[1, 0] + a2 * f[2, 0]
        r01 = a0 * f[0, 1] + a1 * f[1, 1] + a2 * f[2, 1]
        r02 = a0 * f[0, 2] + a1 * f[1, 2] + a2 * f[2, 2]
        a0, a1, a2 = r10, r11, r12
        r10 = a0 * f[0, 0] + a1 * f[1, 0] + a2 * f[2, 0]
        r11 = a0 * f[0, 1] + a1 * f[1, 1] + a2 * f[2, 1]
        r12 = a0 * f[0, 2] + a1 * f[1, 2] + a2 * f[2, 2]
        a0, a1, a2 = r20, r21, r22
        r20 = a0 * f[0, 0] + a1 * f[1, 0] + a2 * f[2, 0]
        r21 = a0 * f[0, 1] + a1 * f[1, 1] + a2 * f[2, 1]
        r22 = a0 * f[0, 2] + a1 * f[1, 2] + a2 * f[2, 2]
        if k == n:
            break
        axes[k, 0], axes[k, 1], axes[k, 2] = r00, r10, r20
        if kind[k] == PRISMATIC:
            x, y, z = x + r00 * q[k], y + r10 * q[k], z + r20 * q[k]
        else:
            c, s = np.cos(q[k]), np.sin(q[k])
            r01, r02 = c * r01 + s * r02, c * r02 - s * r01
            r11, r12 = c * r11 + s * r12, c * r12 - s * r11
            r21, r22 = c * r21 + s * r22, c * r22 - s * r21
        points[k, 0], points[k, 1], points[k, 2] = x, y, z
    frame[0, 0], frame[0, 1], frame[0, 2], frame[0, 3] = r00, r01, r02, x
    frame[1, 0], frame[1, 1], frame[1, 2], frame[1, 3] = r10, r11, r12, y
    frame[2, 0], frame[2, 1], frame[2, 2], frame[2, 3] = r20, r21, r22, z


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _log6(m: Floats, out: Floats, turn: Floats, mix: Floats) -> None:
    """Write the logarithm `out` [v, w] of the rigid motion `m` [3, 4].

    [[turn, mix], [0, turn]] becomes the logarithm's derivative at the inverse of `m`. The formulas and thresholds are
    those of Pinocchio's `log6` and `Jlog6`.
    """
    trace = m[0, 0] + m[1, 1] + m[2, 2]
    angle = 0.0 if trace >= 3.0 else np.pi if trace <= -1.0 else np.arccos(0.5 * (trace - 1.0))
    s, c = np.sin(angle), np.cos(angle)
    if angle < np.pi - 1e-2:
        scale = 0.5 * angle / s if angle > SMALL_ANGLE else 0.5
        wx, wy, wz = scale * (m[2, 1] - m[1, 2]), scale * (m[0, 2] - m[2, 0]), scale * (m[1, 0] - m[0, 1])
    else:
        ratio = angle * angle / (1.0 - c)
        wx = np.sqrt(max((m[0, 0] - c) * ratio, 0.0)) * (1.0 if m[2, 1] > m[1, 2] else -1.0)
        wy = np.sqrt(max((m[1, 1] - c) * ratio, 0.0)) * (1.0 if m[0, 2] > m[2, 0] else -1.0)
        wz = np.sqrt(max((m[2, 2] - c) * ratio, 0.0)) * (1.0 if m[1, 0] > m[0, 1] else -1.0)
    t2 = angle * angle
    if angle < SMALL_ANGLE:
        alpha, beta, slope = 1.0 - t2 / 12.0 - t2 * t2 / 720.0, 1.0 / 12.0 + t2 / 720.0, 1.0 / 360.0
        diagonal = 1.0 - t2 / 12.0
    else:
        alpha = angle * s / (2.0 * (1.0 - c))
        beta = 1.0 / t2 - s / (2.0 * angle * (1.0 - c))
        slope = -2.0 / (t2 * t2) + (1.0 + s / angle) / (t2 * 2.0 * (1.0 - c))
        diagonal = alpha
    px, py, pz = m[0, 3], m[1, 3], m[2, 3]
    dot = wx * px + wy * py + wz * pz
    out[0] = alpha * px - 0.5 * (wy * pz - wz * py) + beta * dot * wx
    out[1] = alpha * py - 0.5 * (wz * px - wx * pz) + beta * dot * wy
    out[2] = alpha * pz - 0.5 * (wx * py - wy * px) + beta * dot * wz
    out[3], out[4], out[5] = wx, wy, wz

    wx, wy, wz = -wx, -wy, -wz
    px, py, pz = (
        -(m[0, 0] * px + m[1, 0] * py + m[2, 0] * pz),
        -(m[0, 1] * px + m[1, 1] * py + m[2, 1] * pz),
        -(m[0, 2] * px + m[1, 2] * py + m[2, 2] * pz),
    )
    dot = wx * px + wy * py + wz * pz
    turn[0, 0], turn[0, 1], turn[0, 2] = beta * wx * wx + diagonal, beta * wx * wy - 0.5 * wz, beta * wx * wz + 0.5 * wy
    turn[1, 0], turn[1, 1], turn[1, 2] = beta * wy * wx + 0.5 * wz, beta * wy * wy + diagonal, beta * wy * wz - 0.5 * wx
    turn[2, 0], turn[2, 1], turn[2, 2] = beta * wz * wx - 0.5 * wy, beta * wz * wy + 0.5 * wx, beta * wz * wz + diagonal
    a, b, d = slope * dot, -(t2 * slope + 2.0 * beta), dot * beta
    ux, uy, uz = a * wx + b * px, a * wy + b * py, a * wz + b * pz
    c00, c01, c02 = (
        ux * wx + beta * wx * px + d,
        ux * wy + beta * wx * py - 0.5 * pz,
        ux * wz + beta * wx * pz + 0.5 * py,
    )
    c10, c11, c12 = (
        uy * wx + beta * wy * px + 0.5 * pz,
        uy * wy + beta * wy * py + d,
        uy * wz + beta * wy * pz - 0.5 * px,
    )
    c20, c21, c22 = (
        uz * wx + beta * wz * px - 0.5 * py,
        uz * wy + beta * wz * py + 0.5 * px,
        uz * wz + beta * wz * pz + d,
    )
    for k in range(3):
        mix[0, k] = c00 * turn[0, k] + c01 * turn[1, k] + c02 * turn[2, k]
        mix[1, k] = c10 * turn[0, k] + c11 * turn[1, k] + c12 * turn[2, k]
        mix[2, k] = c20 * turn[0, k] + c21 * turn[1, k] + c22 * turn[2, k]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _relative(frame: Floats, goal: Floats, out: Floats) -> None:
    """Write frame^-1 * goal, all [3, 4]."""
    dx, dy, dz = goal[0, 3] - frame[0, 3], goal[1, 3] - frame[1, 3], goal[2, 3] - frame[2, 3]
    for i in range(3):
        f0, f1, f2 = frame[0, i], frame[1, i], frame[2, i]
        for j in range(3):
            out[i, j] = f0 * goal[0, j] + f1 * goal[1, j] + f2 * goal[2, j]
        out[i, 3] = f0 * dx + f1 * dy + f2 * dz


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _jacobian(
    kind: NDArray[np.int64], axes: Floats, points: Floats, frame: Floats, turn: Floats, mix: Floats, jac: Floats
) -> None:
    """Write how the error's logarithm changes with each joint, [6, n]: [[turn, mix], [0, turn]] times the Jacobian."""
    for k in range(kind.shape[0]):
        ax, ay, az = axes[k, 0], axes[k, 1], axes[k, 2]
        if kind[k] == PRISMATIC:
            lx, ly, lz = ax, ay, az
            ax, ay, az = 0.0, 0.0, 0.0
        else:
            rx, ry, rz = frame[0, 3] - points[k, 0], frame[1, 3] - points[k, 1], frame[2, 3] - points[k, 2]
            lx, ly, lz = ay * rz - az * ry, az * rx - ax * rz, ax * ry - ay * rx
        vx = frame[0, 0] * lx + frame[1, 0] * ly + frame[2, 0] * lz
        vy = frame[0, 1] * lx + frame[1, 1] * ly + frame[2, 1] * lz
        vz = frame[0, 2] * lx + frame[1, 2] * ly + frame[2, 2] * lz
        wx = frame[0, 0] * ax + frame[1, 0] * ay + frame[2, 0] * az
        wy = frame[0, 1] * ax + frame[1, 1] * ay + frame[2, 1] * az
        wz = frame[0, 2] * ax + frame[1, 2] * ay + frame[2, 2] * az
        for i in range(3):
            jac[i, k] = turn[i, 0] * vx + turn[i, 1] * vy + turn[i, 2] * vz
            jac[i, k] += mix[i, 0] * wx + mix[i, 1] * wy + mix[i, 2] * wz
            jac[i + 3, k] = turn[i, 0] * wx + turn[i, 1] * wy + turn[i, 2] * wz


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _damped_step(jac: Floats, free: NDArray[np.bool_], err: Floats, work: Floats, y: Floats, q: Floats) -> None:
    """Move `q` by STEP * J^T (J J^T + DAMPING)^-1 err, by a Cholesky factor of the 6x6 matrix in `work`."""
    n = q.shape[0]
    for i in range(6):
        for j in range(i + 1):
            s = DAMPING if i == j else 0.0
            for k in range(n):
                if free[k]:
                    s += jac[i, k] * jac[j, k]
            for k in range(j):
                s -= work[i, k] * work[j, k]
            work[i, j] = np.sqrt(s) if i == j else s / work[j, j]
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
    for k in range(n):
        if free[k]:
            s = 0.0
            for i in range(6):
                s += jac[i, k] * y[i]
            q[k] += STEP * s


@numba.njit(cache=True, nogil=True, error_model="numpy")
def solve(
    fixed: Floats, kind: NDArray[np.int64], free: NDArray[np.bool_], goal: Floats, start: Floats, out: Floats
) -> NDArray[np.bool_]:
    """Write joint positions [N, n] that bring the last joint's link to `goal` [N, 3, 4], from `start` [N, n].

    Returns [N] bool, false where the tolerance was not reached (then `out` is the best seen). `free` [n]: joints that
    may move.
    """
    count, n = start.shape
    success = np.zeros(count, np.bool_)
    axes, points, frame = np.empty((n, 3)), np.empty((n, 3)), np.empty((3, 4))
    err, rel, jac = np.empty(6), np.empty((3, 4)), np.empty((6, n))
    turn, mix = np.empty((3, 3)), np.empty((3, 3))
    work, y, q = np.empty((6, 6)), np.empty(6), np.empty(n)
    for row in range(count):
        best = np.inf
        for k in range(n):
            q[k] = start[row, k]
        for _ in range(MAX_ITERATIONS + 1):
            _chain(fixed, kind, q, axes, points, frame)
            _relative(frame, goal[row], rel)
            _log6(rel, err, turn, mix)
            norm = np.sqrt((err * err).sum())
            if norm < best:
                best = norm
                for k in range(n):
                    out[row, k] = q[k]
            if norm < EPS:
                success[row] = True
                break
            _jacobian(kind, axes, points, frame, turn, mix, jac)
            _damped_step(jac, free, err, work, y, q)
    return success
