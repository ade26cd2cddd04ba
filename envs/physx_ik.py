"""Closed-loop inverse kinematics of a serial chain, for many rows at once.

It repeats what ManiSkill's CPU simulation does through Pinocchio: steps of `0.1` along the damped least-squares
solution of the logarithm of the pose error, until its norm is under 1e-4 or 100 steps have passed. Eight rows are
solved at a time (`physx_lanes`), the last eight filled up with copies; each goes its own way to the last bit.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from .physx_kinematics import PRISMATIC
from .physx_lanes import LANES, any_below, arc_cosine, choose_below, lanes, load, root, sine_cosine, store

Floats = NDArray[np.float64]
EPS, MAX_ITERATIONS, STEP, DAMPING = 1e-4, 100, 0.1, 1e-6
"""ManiSkill's iteration limit and SAPIEN's default tolerance, step and damping."""
SMALL_ANGLE = float(np.finfo(np.float64).eps ** 0.25)
"""Below it Pinocchio uses the first terms of the series."""
WIDE_ANGLE = np.pi - 1e-2
"""From it on Pinocchio reads the axis from the diagonal."""


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _chain(fixed: Floats, kind: NDArray[np.int64], q: Floats, axes: Floats, points: Floats, frame: Floats) -> None:
    """Run along the chain: joint axes and origins (3 lanes per joint) in the base frame, `frame` of the last link.

    `q` (n lanes), `frame` (12 lanes: [3, 4]). `fixed` [n + 1, 3, 4]: from the previous joint's moved frame to the next
    joint's; the last leads to the link.
    """
    n = kind.shape[0]
    zero, one = lanes(0.0), lanes(1.0)
    r00, r01, r02, r10, r11, r12, r20, r21, r22 = one, zero, zero, zero, one, zero, zero, zero, one
    x, y, z = zero, zero, zero
    for k in range(n + 1):
        f = fixed[k]
        x = x + r00 * f[0, 3] + r01 * f[1, 3] + r02 * f[2, 3]
        y = y + r10 * f[0, 3] + r11 * f[1, 3] + r12 * f[2, 3]
        z = z + r20 * f[0, 3] + r21 * f[1, 3] + r22 * f[2, 3]
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
        store(axes, 3 * k, r00), store(axes, 3 * k + 1, r10), store(axes, 3 * k + 2, r20)
        if kind[k] == PRISMATIC:
            move = load(q, k)
            x, y, z = x + r00 * move, y + r10 * move, z + r20 * move
        else:
            s, c = sine_cosine(load(q, k))
            r01, r02 = c * r01 + s * r02, c * r02 - s * r01
            r11, r12 = c * r11 + s * r12, c * r12 - s * r11
            r21, r22 = c * r21 + s * r22, c * r22 - s * r21
        store(points, 3 * k, x), store(points, 3 * k + 1, y), store(points, 3 * k + 2, z)
    store(frame, 0, r00), store(frame, 1, r01), store(frame, 2, r02), store(frame, 3, x)
    store(frame, 4, r10), store(frame, 5, r11), store(frame, 6, r12), store(frame, 7, y)
    store(frame, 8, r20), store(frame, 9, r21), store(frame, 10, r22), store(frame, 11, z)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _axis(m: Floats, angle: Any, s: Any, c: Any) -> Any:
    """Return the rotation vector of `m` (12 lanes: [3, 4]), whose angle has sine `s` and cosine `c`."""
    m10, m01, m20, m02, m21, m12 = load(m, 4), load(m, 1), load(m, 8), load(m, 2), load(m, 9), load(m, 6)
    scale = choose_below(SMALL_ANGLE, angle, 0.5 * angle / s, 0.5)
    wx, wy, wz = scale * (m21 - m12), scale * (m02 - m20), scale * (m10 - m01)
    if any_below(WIDE_ANGLE, angle):
        ratio = angle * angle / (1.0 - c)
        x2, y2, z2 = (load(m, 0) - c) * ratio, (load(m, 5) - c) * ratio, (load(m, 10) - c) * ratio
        x, y, z = (root(choose_below(0.0, x2, x2, 0.0)), root(choose_below(0.0, y2, y2, 0.0)),
                   root(choose_below(0.0, z2, z2, 0.0)))  # fmt: skip
        wx = choose_below(angle, WIDE_ANGLE, wx, choose_below(m12, m21, x, 0.0 - x))
        wy = choose_below(angle, WIDE_ANGLE, wy, choose_below(m20, m02, y, 0.0 - y))
        wz = choose_below(angle, WIDE_ANGLE, wz, choose_below(m01, m10, z, 0.0 - z))
    return wx, wy, wz


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _log6(m: Floats, out: Floats, turn: Floats, mix: Floats) -> None:
    """Write the logarithm `out` (6 lanes: v, w) of the rigid motion `m` (12 lanes: [3, 4]).

    [[turn, mix], [0, turn]] (9 lanes each: [3, 3]) becomes the logarithm's derivative at the inverse of `m`. The
    formulas and thresholds are those of Pinocchio's `log6` and `Jlog6`.
    """
    trace = load(m, 0) + load(m, 5) + load(m, 10)
    trace = choose_below(trace, 3.0, choose_below(-1.0, trace, trace, -1.0), 3.0)
    angle = arc_cosine(0.5 * (trace - 1.0))
    s, c = sine_cosine(angle)
    wx, wy, wz = _axis(m, angle, s, c)
    t2 = angle * angle
    beta = 1.0 / t2 - s / (2.0 * angle * (1.0 - c))
    beta = choose_below(angle, SMALL_ANGLE, 1.0 / 12.0 + t2 / 720.0, beta)
    slope = -2.0 / (t2 * t2) + (1.0 + s / angle) / (t2 * 2.0 * (1.0 - c))
    slope = choose_below(angle, SMALL_ANGLE, 1.0 / 360.0, slope)
    alpha = angle * s / (2.0 * (1.0 - c))
    diagonal = choose_below(angle, SMALL_ANGLE, 1.0 - t2 / 12.0, alpha)
    alpha = choose_below(angle, SMALL_ANGLE, 1.0 - t2 / 12.0 - t2 * t2 / 720.0, alpha)
    px, py, pz = load(m, 3), load(m, 7), load(m, 11)
    dot = wx * px + wy * py + wz * pz
    store(out, 0, alpha * px - 0.5 * (wy * pz - wz * py) + beta * dot * wx)
    store(out, 1, alpha * py - 0.5 * (wz * px - wx * pz) + beta * dot * wy)
    store(out, 2, alpha * pz - 0.5 * (wx * py - wy * px) + beta * dot * wz)
    store(out, 3, wx), store(out, 4, wy), store(out, 5, wz)

    px, py, pz = (
        0.0 - (load(m, 0) * px + load(m, 4) * py + load(m, 8) * pz),
        0.0 - (load(m, 1) * px + load(m, 5) * py + load(m, 9) * pz),
        0.0 - (load(m, 2) * px + load(m, 6) * py + load(m, 10) * pz),
    )
    _derivative(0.0 - wx, 0.0 - wy, 0.0 - wz, px, py, pz, t2, beta, slope, diagonal, turn, mix)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _derivative(
    wx: Any, wy: Any, wz: Any, px: Any, py: Any, pz: Any,
    t2: Any, beta: Any, slope: Any, diagonal: Any, turn: Floats, mix: Floats,
) -> None:  # fmt: skip
    """Write `turn` and `mix` of `_log6` for the rotation vector w and the shift p of the inverse motion."""
    t00, t01, t02 = beta * wx * wx + diagonal, beta * wx * wy - 0.5 * wz, beta * wx * wz + 0.5 * wy
    t10, t11, t12 = beta * wy * wx + 0.5 * wz, beta * wy * wy + diagonal, beta * wy * wz - 0.5 * wx
    t20, t21, t22 = beta * wz * wx - 0.5 * wy, beta * wz * wy + 0.5 * wx, beta * wz * wz + diagonal
    store(turn, 0, t00), store(turn, 1, t01), store(turn, 2, t02)
    store(turn, 3, t10), store(turn, 4, t11), store(turn, 5, t12)
    store(turn, 6, t20), store(turn, 7, t21), store(turn, 8, t22)
    dot = wx * px + wy * py + wz * pz
    a, b, d = slope * dot, 0.0 - (t2 * slope + 2.0 * beta), dot * beta
    ux, uy, uz = a * wx + b * px, a * wy + b * py, a * wz + b * pz
    rows = (
        (ux * wx + beta * wx * px + d, ux * wy + beta * wx * py - 0.5 * pz, ux * wz + beta * wx * pz + 0.5 * py),
        (uy * wx + beta * wy * px + 0.5 * pz, uy * wy + beta * wy * py + d, uy * wz + beta * wy * pz - 0.5 * px),
        (uz * wx + beta * wz * px - 0.5 * py, uz * wy + beta * wz * py + 0.5 * px, uz * wz + beta * wz * pz + d),
    )
    for i in range(3):
        c0, c1, c2 = rows[i]
        store(mix, 3 * i, c0 * t00 + c1 * t10 + c2 * t20)
        store(mix, 3 * i + 1, c0 * t01 + c1 * t11 + c2 * t21)
        store(mix, 3 * i + 2, c0 * t02 + c1 * t12 + c2 * t22)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _relative(frame: Floats, goal: Floats, out: Floats) -> None:
    """Write frame^-1 * goal, all 12 lanes: [3, 4]."""
    dx, dy, dz = load(goal, 3) - load(frame, 3), load(goal, 7) - load(frame, 7), load(goal, 11) - load(frame, 11)
    for i in range(3):
        f0, f1, f2 = load(frame, i), load(frame, 4 + i), load(frame, 8 + i)
        for j in range(3):
            store(out, 4 * i + j, f0 * load(goal, j) + f1 * load(goal, 4 + j) + f2 * load(goal, 8 + j))
        store(out, 4 * i + 3, f0 * dx + f1 * dy + f2 * dz)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _jacobian(
    kind: NDArray[np.int64], axes: Floats, points: Floats, frame: Floats, turn: Floats, mix: Floats, jac: Floats
) -> None:
    """Write how the error's logarithm changes with each joint: [[turn, mix], [0, turn]] times the Jacobian.

    `jac` holds 6 lanes per joint.
    """
    for k in range(kind.shape[0]):
        ax, ay, az = load(axes, 3 * k), load(axes, 3 * k + 1), load(axes, 3 * k + 2)
        if kind[k] == PRISMATIC:
            lx, ly, lz = ax, ay, az
            ax, ay, az = lanes(0.0), lanes(0.0), lanes(0.0)
        else:
            rx = load(frame, 3) - load(points, 3 * k)
            ry = load(frame, 7) - load(points, 3 * k + 1)
            rz = load(frame, 11) - load(points, 3 * k + 2)
            lx, ly, lz = ay * rz - az * ry, az * rx - ax * rz, ax * ry - ay * rx
        vx = load(frame, 0) * lx + load(frame, 4) * ly + load(frame, 8) * lz
        vy = load(frame, 1) * lx + load(frame, 5) * ly + load(frame, 9) * lz
        vz = load(frame, 2) * lx + load(frame, 6) * ly + load(frame, 10) * lz
        wx = load(frame, 0) * ax + load(frame, 4) * ay + load(frame, 8) * az
        wy = load(frame, 1) * ax + load(frame, 5) * ay + load(frame, 9) * az
        wz = load(frame, 2) * ax + load(frame, 6) * ay + load(frame, 10) * az
        for i in range(3):
            t0, t1, t2 = load(turn, 3 * i), load(turn, 3 * i + 1), load(turn, 3 * i + 2)
            m0, m1, m2 = load(mix, 3 * i), load(mix, 3 * i + 1), load(mix, 3 * i + 2)
            store(jac, 6 * k + i, t0 * vx + t1 * vy + t2 * vz + m0 * wx + m1 * wy + m2 * wz)
            store(jac, 6 * k + i + 3, t0 * wx + t1 * wy + t2 * wz)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _damped_step(jac: Floats, free: NDArray[np.bool_], err: Floats, work: Floats, y: Floats, q: Floats) -> None:
    """Move `q` by STEP * J^T (J J^T + DAMPING)^-1 err, by the factors L D L^T of the 6x6 matrix.

    `work` (36 lanes: [6, 6]) takes L below its diagonal, the transpose of L D above it, and 1 / D on it.
    """
    n = free.shape[0]
    for i in range(6):
        for j in range(i + 1):
            s = lanes(DAMPING) if i == j else lanes(0.0)
            for k in range(n):
                if free[k]:
                    s = s + load(jac, 6 * k + i) * load(jac, 6 * k + j)
            for k in range(j):
                s = s - load(work, 6 * k + i) * load(work, 6 * j + k)
            if i == j:
                store(work, 7 * i, 1.0 / s)
            else:
                store(work, 6 * j + i, s)
                store(work, 6 * i + j, s * load(work, 7 * j))
    for i in range(6):
        s = load(err, i)
        for k in range(i):
            s = s - load(work, 6 * i + k) * load(y, k)
        store(y, i, s)
    for i in range(5, -1, -1):
        s = load(y, i) * load(work, 7 * i)
        for k in range(i + 1, 6):
            s = s - load(work, 6 * k + i) * load(y, k)
        store(y, i, s)
    for k in range(n):
        if free[k]:
            s = lanes(0.0)
            for i in range(6):
                s = s + load(jac, 6 * k + i) * load(y, i)
            store(q, k, load(q, k) + STEP * s)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _solve_lanes(
    fixed: Floats, kind: NDArray[np.int64], free: NDArray[np.bool_], goal: Floats, q: Floats, found: Floats
) -> Any:
    """Write joint positions (n lanes) that reach `goal` (12 lanes), from `q` (n lanes, changed).

    Returns lanes: negative where the tolerance was reached.
    """
    n = kind.shape[0]
    axes, points, frame = np.empty(3 * n * LANES), np.empty(3 * n * LANES), np.empty(12 * LANES)
    err, rel, jac = np.empty(6 * LANES), np.empty(12 * LANES), np.empty(6 * n * LANES)
    turn, mix = np.empty(9 * LANES), np.empty(9 * LANES)
    work, y = np.empty(36 * LANES), np.empty(6 * LANES)
    for k in range(n):
        store(found, k, load(q, k))
    best = lanes(np.inf)
    for _ in range(MAX_ITERATIONS + 1):
        _chain(fixed, kind, q, axes, points, frame)
        _relative(frame, goal, rel)
        _log6(rel, err, turn, mix)
        square = lanes(0.0)
        for i in range(6):
            square = square + load(err, i) * load(err, i)
        norm = root(square)
        for k in range(n):
            store(found, k, choose_below(norm, best, load(q, k), load(found, k)))
        best = choose_below(norm, best, norm, best)
        best = choose_below(best, EPS, -1.0, best)  # nothing is better from now on
        if not any_below(0.0, best):
            break
        _jacobian(kind, axes, points, frame, turn, mix, jac)
        _damped_step(jac, free, err, work, y, q)
    return best


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
    goals, q, found = np.empty(12 * LANES), np.empty(n * LANES), np.empty(n * LANES)
    state = np.empty(LANES)
    for first in range(0, count, LANES):
        for lane in range(LANES):
            row = min(first + lane, count - 1)
            for i in range(12):
                goals[i * LANES + lane] = goal[row, i // 4, i % 4]
            for k in range(n):
                q[k * LANES + lane] = start[row, k]
        store(state, 0, _solve_lanes(fixed, kind, free, goals, q, found))
        for row in range(first, min(first + LANES, count)):
            success[row] = state[row - first] < 0.0
            for k in range(n):
                out[row, k] = found[k * LANES + row - first]
    return success
