"""ManiSkill's end-effector controllers for a batch on the CPU: target poses and inverse kinematics of its CPU path."""

from __future__ import annotations

from typing import Any, NamedTuple
from xml.etree import ElementTree as etree

import numba
import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.utils.structs.pose import Pose
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation
from torch import Tensor

from robopolicy.errors import RobopolicyError

from . import physx_ik
from .physx_kinematics import FIXED, PRISMATIC, REVOLUTE, quaternion_product
from .physx_lanes import LANES
from .physx_native import EntityPoses
from .physx_threads import worker_pool

ROWS_PER_TASK = 2 * LANES
"""Rows a thread solves at a time (about 0.13 ms); fewer are not worth handing over."""


@numba.njit(cache=True, nogil=True, inline="always")
def _multiply(a: Any, b: Any) -> Any:
    """Return the product of two float32 quaternions with w >= 0, in ManiSkill's order of operations."""
    w, x, y, z = quaternion_product(a, b)
    if w < np.float32(0.0):
        return -w, -x, -y, -z
    return w, x, y, z


@numba.njit(cache=True, nogil=True, inline="always")
def _apply(q: Any, v: Any) -> Any:
    """Rotate the float32 vector `v` by `q`, in ManiSkill's order of operations."""
    zero = np.float32(0.0)
    out = quaternion_product(quaternion_product(q, (zero, v[0], v[1], v[2])), (q[0], -q[1], -q[2], -q[3]))
    return out[1], out[2], out[3]


@numba.njit(cache=True, nogil=True)
def _relative_pose(base: NDArray[np.float32], link: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the poses [N, 7] of `link` [N, 7] seen from `base` [N, 7], quaternions with w >= 0."""
    out = np.empty((base.shape[0], 7), np.float32)
    for i in range(base.shape[0]):
        b, e = base[i], link[i]
        inverse = (b[3], -b[4], -b[5], -b[6])
        back = _apply(inverse, (-b[0], -b[1], -b[2]))
        ahead = _apply(inverse, (e[0], e[1], e[2]))
        out[i, 0], out[i, 1], out[i, 2] = back[0] + ahead[0], back[1] + ahead[1], back[2] + ahead[2]
        out[i, 3], out[i, 4], out[i, 5], out[i, 6] = _multiply(inverse, (e[3], e[4], e[5], e[6]))
    return out


@numba.njit(cache=True, nogil=True)
def _euler_matrices(cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return [N, 13]: the matrix (nine numbers) that turns about x, the new y, the new z, and the quaternion's squares.

    The squares are of the four parts, times four.
    """
    out = np.empty((cosine.shape[0], 13), np.float32)
    one = np.float32(1.0)
    for i in range(cosine.shape[0]):
        c, s, m = cosine[i], sine[i], out[i]
        p, r = s[0] * s[1], -(c[0] * s[1])
        m[0], m[1], m[2] = c[1] * c[2], -(c[1] * s[2]), s[1]
        m[3], m[4], m[5] = p * c[2] + c[0] * s[2], -(p * s[2]) + c[0] * c[2], -(s[0] * c[1])
        m[6], m[7], m[8] = r * c[2] + s[0] * s[2], -(r * s[2]) + s[0] * c[2], c[0] * c[1]
        m[9] = one + m[0] + m[4] + m[8]
        m[10] = one + m[0] - m[4] - m[8]
        m[11] = one - m[0] + m[4] - m[8]
        m[12] = one - m[0] - m[4] + m[8]
        for k in range(9, 13):
            m[k] = max(m[k], np.float32(0.0))
    return out


@numba.njit(cache=True, nogil=True)
def _quaternions(matrix: NDArray[np.float32], size: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the quaternions [N, 4], w >= 0, of `matrix` [N, >= 9]; `size` [N, 4] are twice the parts' magnitudes."""
    out = np.empty((matrix.shape[0], 4), np.float32)
    for i in range(matrix.shape[0]):
        m, best = matrix[i], 0
        for k in range(1, 4):
            if size[i, k] > size[i, best]:
                best = k
        large = size[i, best]
        d, square = np.float32(2.0) * max(large, np.float32(0.1)), large * large
        if best == 0:
            q = (square, m[7] - m[5], m[2] - m[6], m[3] - m[1])
        elif best == 1:
            q = (m[7] - m[5], square, m[3] + m[1], m[2] + m[6])
        elif best == 2:
            q = (m[2] - m[6], m[3] + m[1], square, m[5] + m[7])
        else:
            q = (m[3] - m[1], m[6] + m[2], m[7] + m[5], square)
        sign = np.float32(-1.0) if q[0] < np.float32(0.0) else np.float32(1.0)
        for k in range(4):
            out[i, k] = sign * (q[k] / d)
    return out


def euler_quaternions(angles: Tensor) -> NDArray[np.float32]:
    """Return the quaternions [N, 4] of Euler angles [N, 3] ("XYZ"), equal to the last bit to ManiSkill's.

    Sines, cosines and roots are torch's, which are not always the nearest float32; the rest is plain arithmetic.
    """
    matrix = _euler_matrices(angles.cos().numpy(), angles.sin().numpy())
    return _quaternions(matrix, torch.from_numpy(matrix[:, 9:].copy()).sqrt().numpy())


@numba.njit(cache=True, nogil=True)
def _target_pose(
    shift: NDArray[np.float32],
    turn: NDArray[np.float32],
    before: NDArray[np.float32],
    delta: bool,
    body_shift: bool,
    body_turn: bool,
) -> NDArray[np.float32]:
    """Return the pose [N, 7] in the base frame that `shift` [N, 3] and `turn` [N, 4] ask for, from `before` [N, 7]."""
    out = np.empty((shift.shape[0], 7), np.float32)
    for i in range(shift.shape[0]):
        p, q = (shift[i, 0], shift[i, 1], shift[i, 2]), (turn[i, 0], turn[i, 1], turn[i, 2], turn[i, 3])
        if delta:
            old = (before[i, 3], before[i, 4], before[i, 5], before[i, 6])
            if body_shift:
                p = _apply(old, p)
            q = _multiply(old, q) if body_turn else _multiply(q, old)
            p = (before[i, 0] + p[0], before[i, 1] + p[1], before[i, 2] + p[2])
        out[i, 0], out[i, 1], out[i, 2] = p
        out[i, 3], out[i, 4], out[i, 5], out[i, 6] = q
    return out


@numba.njit(cache=True, nogil=True)
def _joint_goal(target: NDArray[np.float32], tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the goals [N, 3, 4] of the last joint's link: `target` [N, 7] of the end effector times `tail` [3, 4]."""
    out = np.empty((target.shape[0], 3, 4))
    m = np.empty((3, 3))
    for i in range(target.shape[0]):
        w, x, y, z = (
            np.float64(target[i, 3]),
            np.float64(target[i, 4]),
            np.float64(target[i, 5]),
            np.float64(target[i, 6]),
        )
        m[0, 0], m[0, 1], m[0, 2] = 1.0 - 2.0 * (y * y + z * z), 2.0 * (x * y - w * z), 2.0 * (x * z + w * y)
        m[1, 0], m[1, 1], m[1, 2] = 2.0 * (x * y + w * z), 1.0 - 2.0 * (x * x + z * z), 2.0 * (y * z - w * x)
        m[2, 0], m[2, 1], m[2, 2] = 2.0 * (x * z - w * y), 2.0 * (y * z + w * x), 1.0 - 2.0 * (x * x + y * y)
        for r in range(3):
            for k in range(4):
                out[i, r, k] = m[r, 0] * tail[0, k] + m[r, 1] * tail[1, k] + m[r, 2] * tail[2, k]
            out[i, r, 3] += target[i, r]
    return out


class Follow(NamedTuple):
    """How an action moves the target pose: from the last one or by itself, in which frames."""

    delta: bool
    body_shift: bool
    body_turn: bool


@numba.njit(cache=True, nogil=True)
def _follow(
    fixed: NDArray[np.float64],
    kind: NDArray[np.int64],
    free: NDArray[np.bool_],
    tail: NDArray[np.float64],
    columns: NDArray[np.int64],
    controlled: NDArray[np.int64],
    place: NDArray[np.int64],
    delta: bool,
    body_shift: bool,
    body_turn: bool,
    shift: NDArray[np.float32],
    turn: NDArray[np.float32],
    before: NDArray[np.float32],
    qpos: NDArray[np.float32],
    target_out: NDArray[np.float32],
    joints_out: NDArray[np.float32],
) -> None:
    """Write target poses and joint positions, see `ChainSolver.solve`.

    `columns` [n]: where the chain's joints stand in `qpos`; `controlled` [J]: the same of the controlled ones, which
    are number `place` [J] of the chain, or -1.
    """
    target = _target_pose(shift, turn, before, delta, body_shift, body_turn)
    goal = _joint_goal(target, tail)
    start, found = np.empty((len(qpos), len(columns))), np.empty((len(qpos), len(columns)))
    for i in range(len(qpos)):
        for k in range(len(columns)):
            start[i, k] = qpos[i, columns[k]]
    success = physx_ik.solve(fixed, kind, free, goal, start, found)
    for i in range(len(qpos)):
        for k in range(7):
            target_out[i, k] = target[i, k]
        for j in range(len(controlled)):
            moves = success[i] and place[j] >= 0
            joints_out[i, j] = found[i, place[j]] if moves else qpos[i, controlled[j]]


class ChainSolver:
    """Inverse kinematics from the root of a controller's URDF to its end effector, for all environments at once.

    The chain comes from the URDF in double precision, as Pinocchio reads it: whether an iteration meets the tolerance
    decides a joint target by 1e-5, so less would not follow ManiSkill's CPU simulation.
    """

    def __init__(self, controller: Any) -> None:
        kinematics = controller.kinematics
        joints = {_link(j, "child"): j for j in etree.parse(kinematics.urdf_path).getroot().iterfind("joint")}
        active = [joint.name for joint in controller.articulation.active_joints]
        fixed: list[NDArray[np.float64]] = []
        kinds: list[int] = []
        order: list[int] = []
        name = kinematics.end_link.name
        path: list[etree.Element] = []
        while name in joints:
            path.insert(0, joints[name])
            name = _link(joints[name], "parent")
        pose, beyond = np.eye(4), np.eye(4)
        for joint in path:
            pose = pose @ _origin(joint)
            kind = _URDF_TYPES[str(joint.get("type"))]
            if kind != FIXED:
                turn = _x_axis_onto(joint)
                fixed.append((pose @ turn)[:3])
                kinds.append(kind)
                order.append(active.index(str(joint.get("name"))))
                pose = turn.T
        # the last joint's link has the joint's own frame; what follows it is rigid
        beyond = turn @ pose
        fixed.append(turn.T[:3])
        columns = np.array(order, np.int64)
        self._controlled = controller.active_joint_indices.numpy()
        place = np.array([order.index(j) if j in order else -1 for j in self._controlled.tolist()], np.int64)
        tail = np.ascontiguousarray(np.linalg.inv(beyond)[:3], np.float64)
        free = np.isin(columns, self._controlled)
        self._chain = (np.array(fixed), np.array(kinds, np.int64), free, tail, columns, self._controlled, place)

    def solve(
        self, follow: Follow, shift: NDArray[np.float32], turn: NDArray[np.float32], before: NDArray[np.float32],
        qpos: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:  # fmt: skip
        """Return the end effector's target poses [N, 7] and the controlled joints' positions [N, J] that reach them.

        `shift`, `turn` and `before` as in `_target_pose`; `qpos` [N, D]: where all joints are. Rows without a solution
        keep their positions, as ManiSkill does.
        """
        count = len(shift)
        target, joints = np.empty((count, 7), np.float32), np.empty((count, len(self._controlled)), np.float32)
        shift, turn, before, qpos = (np.ascontiguousarray(x) for x in (shift, turn, before, qpos))  # compiled for these

        def task(rows: slice) -> None:
            _follow(
                *self._chain, *follow, shift[rows], turn[rows], before[rows], qpos[rows], target[rows], joints[rows]
            )  # fmt: skip

        if count <= ROWS_PER_TASK:
            task(slice(count))
        else:
            worker_pool().map(task, [slice(i, i + ROWS_PER_TASK) for i in range(0, count, ROWS_PER_TASK)])
        return target, joints


_FRAMES = (
    "root_translation",
    "body_translation",
    "root_translation:root_aligned_body_rotation",
    "root_translation:body_aligned_body_rotation",
    "body_translation:root_aligned_body_rotation",
    "body_translation:body_aligned_body_rotation",
)
_URDF_TYPES = {"fixed": FIXED, "revolute": REVOLUTE, "continuous": REVOLUTE, "prismatic": PRISMATIC}


def _link(joint: etree.Element, role: str) -> str:
    return joint.find(role).get("link")  # type: ignore[union-attr, return-value]


def _numbers(element: Any, name: str, default: str) -> NDArray[np.float64]:
    return np.array((default if element is None else element.get(name, default)).split(), float)


def _origin(joint: Any) -> NDArray[np.float64]:
    """Return the joint's frame [4, 4] seen from its parent link."""
    origin = joint.find("origin")
    pose = np.eye(4)
    pose[:3, :3] = Rotation.from_euler("xyz", _numbers(origin, "rpy", "0 0 0")).as_matrix()
    pose[:3, 3] = _numbers(origin, "xyz", "0 0 0")
    return pose


def _x_axis_onto(joint: Any) -> NDArray[np.float64]:
    """Return a rotation [4, 4] that takes the x axis onto the joint's axis."""
    axis = _numbers(joint.find("axis"), "xyz", "1 0 0")
    axis = axis / np.linalg.norm(axis)
    side = np.cross(axis, np.eye(3)[np.argmin(np.abs(axis))])
    side = side / np.linalg.norm(side)
    turn = np.eye(4)
    turn[:3, :3] = np.stack([axis, side, np.cross(axis, side)], axis=1)
    return turn


def set_end_effector_action(self: Any, action: Tensor) -> None:
    """Do what `PDEEPosController.set_action` does on the CPU, for all environments at once."""
    action = self._preprocess_action(action)
    qpos = self.articulation.get_qpos()
    self._step = 0
    self._start_qpos = qpos[..., self.active_joint_indices]
    solver = self.__dict__.get("_chain_solver")
    if solver is None:
        solver = self._chain_solver = ChainSolver(self)
    before = (self._target_pose if self.config.use_target else end_effector_at_base(self)).raw_pose
    frame = self.config.frame
    if self.config.use_delta and frame not in _FRAMES:
        raise RobopolicyError(
            f"This control mode moves in the frame {frame!r}, which ManiSkill's controllers do not implement; "
            f"they know {', '.join(_FRAMES)}."
        )
    if action.shape[1] == 6:
        turn = euler_quaternions(action[:, 3:].contiguous())
    else:
        turn = np.zeros((len(action), 4), np.float32)
        turn[:, 0] = 1
    follow = Follow(
        delta=bool(self.config.use_delta),
        body_shift="body_translation" in frame,
        body_turn=isinstance(self, PDEEPoseController) and "body_aligned_body_rotation" in frame,
    )
    target, joints = solver.solve(follow, action[:, :3].numpy(), turn, before.numpy(), qpos.numpy())
    self._target_pose, self._target_qpos = Pose(torch.from_numpy(target)), torch.from_numpy(joints)
    if self.config.interpolate:
        self._step_size = (self._target_qpos - self._start_qpos) / self._sim_steps
    else:
        self.set_drive_targets(self._target_qpos)


def end_effector_at_base(self: Any) -> Pose:
    """Return the end effector's poses seen from the robot's base, [N, 7]."""
    return Pose(torch.from_numpy(_relative_pose(sapien_poses(self.root_link), sapien_poses(self.ee_link))))


def sapien_poses(link: Any) -> NDArray[np.float32]:
    """Return the poses [N, 7] of a ManiSkill link as SAPIEN tells them: the CPU simulation's to the last bit."""
    reader = link.__dict__.get("_entity_poses")
    if reader is None:
        reader = link._entity_poses = EntityPoses([body.entity for body in link._objs])
    return reader.read()
