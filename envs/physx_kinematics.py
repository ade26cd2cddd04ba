"""Poses of the links of many articulations at once, compiled.

Every row is computed by scalar float64 arithmetic that never looks at another row, so the result for one environment
does not depend on how many there are. Poses are [x, y, z, qw, qx, qy, qz] as in ManiSkill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from robopolicy.errors import RobopolicyError

FIXED, REVOLUTE, PRISMATIC = 0, 1, 2
JOINT_TYPES = {
    "fixed": FIXED,
    "undefined": FIXED,
    "revolute": REVOLUTE,
    "revolute_unwrapped": REVOLUTE,
    "prismatic": PRISMATIC,
}

Floats = NDArray[np.float64]


class ArticulationTable:
    """Constant data of all articulations, flat over links, as `forward_kinematics` wants it."""

    def __init__(self, articulations: Sequence[Any], first_row: int) -> None:
        self.first_link = np.zeros(len(articulations) + 1, np.int64)
        parent, kind, index, in_parent, child_inverse = [], [], [], [], []
        for a, articulation in enumerate(articulations):
            links, base = articulation.links, int(self.first_link[a])
            active = list(articulation.active_joints)
            position = {link: i for i, link in enumerate(links)}
            for link in links:
                joint, up = link.joint, link.parent
                if up is not None and joint.type not in JOINT_TYPES:
                    raise RobopolicyError(
                        f"A joint of type {joint.type!r} ({joint.name}) cannot be batched on the CPU; known are "
                        f"{', '.join(JOINT_TYPES)}. Use backend 'single'."
                    )
                parent.append(-1 if up is None else base + position[up])
                kind.append(FIXED if up is None else JOINT_TYPES[joint.type])
                index.append(active.index(joint) if joint in active else -1)
                in_parent.append(pose_numbers(joint.pose_in_parent))
                child_inverse.append(pose_numbers(joint.pose_in_child.inv()))
            self.first_link[a + 1] = base + len(links)
        count = len(parent)
        self.parent, self.kind = np.array(parent, np.int64), np.array(kind, np.int64)
        self.q_index = np.array(index, np.int64)
        self.in_parent = np.array(in_parent, float).reshape(count, 7)
        self.child_inverse = np.array(child_inverse, float).reshape(count, 7)
        self.row = first_row + np.arange(count, dtype=np.int64)
        self.root_row = self.row[self.first_link[:-1]]
        self.sign = np.ones(count)


def pose_numbers(pose: Any) -> NDArray[np.float32]:
    """Return a SAPIEN pose as [x, y, z, qw, qx, qy, qz]."""
    return np.concatenate([pose.p, pose.q])


@numba.njit(cache=True, nogil=True, inline="always")
def quaternion_product(a: Any, b: Any) -> Any:
    """Return the Hamilton product of two quaternions, w first; float32 stays float32."""
    return (
        a[0] * b[0] - a[1] * b[1] - a[2] * b[2] - a[3] * b[3],
        a[0] * b[1] + a[1] * b[0] + a[2] * b[3] - a[3] * b[2],
        a[0] * b[2] - a[1] * b[3] + a[2] * b[0] + a[3] * b[1],
        a[0] * b[3] + a[1] * b[2] - a[2] * b[1] + a[3] * b[0],
    )


@numba.njit(cache=True, nogil=True, inline="always")
def _rotate(q: Any, v: Any) -> Any:
    tx = 2.0 * (q[2] * v[2] - q[3] * v[1])
    ty = 2.0 * (q[3] * v[0] - q[1] * v[2])
    tz = 2.0 * (q[1] * v[1] - q[2] * v[0])
    return (
        v[0] + q[0] * tx + q[2] * tz - q[3] * ty,
        v[1] + q[0] * ty + q[3] * tx - q[1] * tz,
        v[2] + q[0] * tz + q[1] * ty - q[2] * tx,
    )


@numba.njit(cache=True, nogil=True)
def forward_kinematics(
    first_link: NDArray[np.int64],
    parent: NDArray[np.int64],
    kind: NDArray[np.int64],
    q_index: NDArray[np.int64],
    in_parent: Floats,
    child_inverse: Floats,
    sign: Floats,
    root_pose: NDArray[np.float32],
    qpos: NDArray[np.float32],
    body_row: NDArray[np.int64],
    out: NDArray[np.float32],
) -> None:
    """Write the pose of every link into `out[body_row[link], :7]`.

    The links of articulation `a` are `first_link[a]:first_link[a + 1]`, parents before children; `parent` is a position
    in the list of all links or -1; `in_parent` and `child_inverse` [L, 7] are the joint frame seen from the parent link
    and the link seen from the joint frame, whose x axis is the joint's. `root_pose` [A, 7], `qpos` [A, D].
    """
    pose = np.empty((parent.shape[0], 7))
    for a in range(first_link.shape[0] - 1):
        for link in range(first_link[a], first_link[a + 1]):
            if parent[link] < 0:
                for k in range(7):
                    pose[link, k] = root_pose[a, k]
            else:
                _place_link(pose, link, parent[link], kind[link], q_index[link], in_parent, child_inverse, qpos[a])
            row = body_row[link]
            for k in range(3):
                out[row, k] = pose[link, k]
            for k in range(3, 7):
                out[row, k] = pose[link, k] * sign[link]


@numba.njit(cache=True, nogil=True)
def _place_link(
    pose: Floats, link: int, up: int, kind: int, index: int, in_parent: Floats, child_inverse: Floats, q: Any
) -> None:
    x, f = in_parent[link], child_inverse[link]
    rot = quaternion_product((pose[up, 3], pose[up, 4], pose[up, 5], pose[up, 6]), (x[3], x[4], x[5], x[6]))
    d = _rotate((pose[up, 3], pose[up, 4], pose[up, 5], pose[up, 6]), (x[0], x[1], x[2]))
    px, py, pz = pose[up, 0] + d[0], pose[up, 1] + d[1], pose[up, 2] + d[2]
    if kind == REVOLUTE:
        # PhysX wraps the angle to [-pi, pi] first; the sign of the quaternion depends on it
        half = 0.5 * q[index] - np.pi * np.round(q[index] / (2.0 * np.pi))
        rot = quaternion_product(rot, (np.cos(half), np.sin(half), 0.0, 0.0))
    elif kind == PRISMATIC:
        d = _rotate(rot, (np.float64(q[index]), 0.0, 0.0))
        px, py, pz = px + d[0], py + d[1], pz + d[2]
    d = _rotate(rot, (f[0], f[1], f[2]))
    rot = quaternion_product(rot, (f[3], f[4], f[5], f[6]))
    scale = 1.0 / np.sqrt(rot[0] ** 2 + rot[1] ** 2 + rot[2] ** 2 + rot[3] ** 2)
    pose[link, 0], pose[link, 1], pose[link, 2] = px + d[0], py + d[1], pz + d[2]
    for k in range(4):
        pose[link, 3 + k] = rot[k] * scale
