"""Closed-loop inverse kinematics of a serial chain, for many rows at once.

It repeats what ManiSkill's CPU simulation does through Pinocchio: steps of `0.1` along the damped least-squares
solution of the logarithm of the pose error, until its norm is under 1e-4 or 100 steps have passed.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .physx_kinematics import PRISMATIC

Floats = NDArray[np.float64]
EPS, MAX_ITERATIONS, STEP, DAMPING = 1e-4, 100, 0.1, 1e-6
"""ManiSkill's iteration limit and SAPIEN's default tolerance, step and damping."""


@numba.njit(cache=True, nogil=True)
def _chain(fixed: Floats, kind: NDArray[np.int64], q: Floats, axes: Floats, points: Floats, frame: Floats) -> None:
    """Run along the chain: joint axes and origins [n, 3] in the base frame, and `frame` [3, 4] of the last joint's link.

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


@numba.njit(cache=True, nogil=True)
def matrix_quaternion(m: Floats) -> Any:
    """Return the quaternion (w, x, y, z), w >= 0, of the rotation in `m` [3, >=3]."""
    t = m[0, 0] + m[1, 1] + m[2, 2]
    if t > 0.0:
        s = 2.0 * np.sqrt(t + 1.0)
        return 0.25 * s, (m[2, 1] - m[1, 2]) / s, (m[0, 2] - m[2, 0]) / s, (m[1, 0] - m[0, 1]) / s
    if m[0, 0] > m[1, 1] and m[0, 0] > m[2, 2]:
        s = 2.0 * np.sqrt(1.0 + m[0, 0] - m[1, 1] - m[2, 2])
        w, x, y, z = (m[2, 1] - m[1, 2]) / s, 0.25 * s, (m[0, 1] + m[1, 0]) / s, (m[0, 2] + m[2, 0]) / s
    elif m[1, 1] > m[2, 2]:
        s = 2.0 * np.sqrt(1.0 + m[1, 1] - m[0, 0] - m[2, 2])
        w, x, y, z = (m[0, 2] - m[2, 0]) / s, (m[0, 1] + m[1, 0]) / s, 0.25 * s, (m[1, 2] + m[2, 1]) / s
    else:
        s = 2.0 * np.sqrt(1.0 + m[2, 2] - m[0, 0] - m[1, 1])
        w, x, y, z = (m[1, 0] - m[0, 1]) / s, (m[0, 2] + m[2, 0]) / s, (m[1, 2] + m[2, 1]) / s, 0.25 * s
    if w < 0.0:
        return -w, -x, -y, -z
    return w, x, y, z


@numba.njit(cache=True, nogil=True)
def _log6(m: Floats, out: Floats) -> None:
    """Write the logarithm [v, w] of the rigid motion `m` [3, 4]."""
    qw, qx, qy, qz = matrix_quaternion(m)
    norm = np.sqrt(qx * qx + qy * qy + qz * qz)
    angle = 2.0 * np.arctan2(norm, qw)
    scale = angle / norm if norm > 1e-12 else 2.0
    wx, wy, wz = scale * qx, scale * qy, scale * qz
    t2 = angle * angle
    if t2 < 1e-8:
        alpha, beta = 1.0 - t2 / 12.0, 1.0 / 12.0 + t2 / 720.0
    else:
        s, c = np.sin(angle), np.cos(angle)
        alpha = angle * s / (2.0 * (1.0 - c))
        beta = 1.0 / t2 - s / (2.0 * angle * (1.0 - c))
    px, py, pz = m[0, 3], m[1, 3], m[2, 3]
    dot = beta * (wx * px + wy * py + wz * pz)
    out[0] = alpha * px - 0.5 * (wy * pz - wz * py) + dot * wx
    out[1] = alpha * py - 0.5 * (wz * px - wx * pz) + dot * wy
    out[2] = alpha * pz - 0.5 * (wx * py - wy * px) + dot * wz
    out[3], out[4], out[5] = wx, wy, wz


@numba.njit(cache=True, nogil=True)
def _relative(goal: Floats, frame: Floats, out: Floats) -> None:
    """Write goal^-1 * frame, all [3, 4]."""
    dx, dy, dz = frame[0, 3] - goal[0, 3], frame[1, 3] - goal[1, 3], frame[2, 3] - goal[2, 3]
    for i in range(3):
        g0, g1, g2 = goal[0, i], goal[1, i], goal[2, i]
        for j in range(3):
            out[i, j] = g0 * frame[0, j] + g1 * frame[1, j] + g2 * frame[2, j]
        out[i, 3] = g0 * dx + g1 * dy + g2 * dz


@numba.njit(cache=True, nogil=True)
def _jacobian(kind: NDArray[np.int64], axes: Floats, points: Floats, frame: Floats, jac: Floats) -> None:
    """Write the Jacobian [6, n], linear above angular, of the link in its own frame."""
    for k in range(kind.shape[0]):
        ax, ay, az = axes[k, 0], axes[k, 1], axes[k, 2]
        if kind[k] == PRISMATIC:
            lx, ly, lz = ax, ay, az
            ax, ay, az = 0.0, 0.0, 0.0
        else:
            rx, ry, rz = frame[0, 3] - points[k, 0], frame[1, 3] - points[k, 1], frame[2, 3] - points[k, 2]
            lx, ly, lz = ay * rz - az * ry, az * rx - ax * rz, ax * ry - ay * rx
        for i in range(3):
            jac[i, k] = frame[0, i] * lx + frame[1, i] * ly + frame[2, i] * lz
            jac[i + 3, k] = frame[0, i] * ax + frame[1, i] * ay + frame[2, i] * az


@numba.njit(cache=True, nogil=True)
def _damped_step(jac: Floats, free: NDArray[np.bool_], err: Floats, work: Floats, y: Floats, q: Floats) -> None:
    """Move `q` by -STEP * J^T (J J^T + DAMPING)^-1 err, by a Cholesky factor of the 6x6 matrix in `work`."""
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
            q[k] -= STEP * s


@numba.njit(cache=True, nogil=True)
def solve(
    fixed: Floats, kind: NDArray[np.int64], free: NDArray[np.bool_], goal: Floats, start: Floats, out: Floats
) -> NDArray[np.bool_]:
    """Write joint positions [N, n] that bring the last joint's link to `goal` [N, 3, 4], from `start` [N, n].

    Returns [N] bool, false where the tolerance was not reached (then `out` is the best seen). `free` [n]: joints that may
    move.
    """
    count, n = start.shape
    success = np.zeros(count, np.bool_)
    axes, points, frame = np.empty((n, 3)), np.empty((n, 3)), np.empty((3, 4))
    err, rel, jac = np.empty(6), np.empty((3, 4)), np.empty((6, n))
    work, y, q = np.empty((6, 6)), np.empty(6), np.empty(n)
    for row in range(count):
        best = np.inf
        for k in range(n):
            q[k] = start[row, k]
        for _ in range(MAX_ITERATIONS):
            _chain(fixed, kind, q, axes, points, frame)
            _relative(goal[row], frame, rel)
            _log6(rel, err)
            norm = np.sqrt((err * err).sum())
            if norm < best:
                best = norm
                for k in range(n):
                    out[row, k] = q[k]
            if norm < EPS:
                success[row] = True
                break
            _jacobian(kind, axes, points, frame, jac)
            _damped_step(jac, free, err, work, y, q)
    return success
