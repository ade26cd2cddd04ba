"""ManiSkill's end-effector controllers for a batch on the CPU: the target pose and inverse kinematics of its CPU path."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController
from mani_skill.utils.structs.pose import Pose
from numpy.typing import NDArray
from torch import Tensor

from . import physx_ik
from .physx_kinematics import FIXED, JOINT_TYPES, _quat_mul, _rotate
from .physx_threads import worker_pool

ROWS_PER_TASK = 4
"""Rows a thread solves at a time; fewer are not worth handing over."""


@numba.njit(cache=True, nogil=True)
def _euler_quaternion(x: float, y: float, z: float) -> Any:
    """Return the quaternion (w >= 0) of turning about x, then the new y, then the new z ("XYZ")."""
    q = _quat_mul(
        _quat_mul((np.cos(0.5 * x), np.sin(0.5 * x), 0.0, 0.0), (np.cos(0.5 * y), 0.0, np.sin(0.5 * y), 0.0)),
        (np.cos(0.5 * z), 0.0, 0.0, np.sin(0.5 * z)),
    )
    return (-q[0], -q[1], -q[2], -q[3]) if q[0] < 0.0 else q


@numba.njit(cache=True, nogil=True)
def _relative_pose(body: NDArray[np.float32], base: NDArray[np.int64], link: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the poses [N, 7] of rows `link` seen from rows `base`, quaternions with w >= 0."""
    out = np.empty((base.shape[0], 7))
    for i in range(base.shape[0]):
        b, e = body[base[i]].astype(np.float64), body[link[i]].astype(np.float64)
        inverse = (b[3], -b[4], -b[5], -b[6])
        p = _rotate(inverse, (e[0] - b[0], e[1] - b[1], e[2] - b[2]))
        q = _quat_mul(inverse, (e[3], e[4], e[5], e[6]))
        sign = -1.0 if q[0] < 0.0 else 1.0
        out[i, 0], out[i, 1], out[i, 2] = p
        for k in range(4):
            out[i, 3 + k] = sign * q[k]
    return out


@numba.njit(cache=True, nogil=True)
def _target_pose(
    action: NDArray[np.float32], before: NDArray[np.float64], delta: bool, body_shift: bool, body_turn: bool
) -> NDArray[np.float64]:
    """Return the pose [N, 7] in the base frame that `action` [N, 3 or 6] asks for, from the pose `before` [N, 7]."""
    out = np.empty((action.shape[0], 7))
    for i in range(action.shape[0]):
        a = action[i].astype(np.float64)
        turn = (1.0, 0.0, 0.0, 0.0)
        if a.shape[0] == 6:
            turn = _euler_quaternion(a[3], a[4], a[5])
        shift, q = (a[0], a[1], a[2]), turn
        if delta:
            old = (before[i, 3], before[i, 4], before[i, 5], before[i, 6])
            if body_shift:
                shift = _rotate(old, shift)
            q = _quat_mul(old, turn) if body_turn else _quat_mul(turn, old)
            shift = (before[i, 0] + shift[0], before[i, 1] + shift[1], before[i, 2] + shift[2])
        sign = -1.0 if q[0] < 0.0 else 1.0
        out[i, 0], out[i, 1], out[i, 2] = shift
        for k in range(4):
            out[i, 3 + k] = sign * q[k]
    return out


@numba.njit(cache=True, nogil=True)
def _joint_goal(target: NDArray[np.float64], tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the goals [N, 3, 4] of the last joint's link: `target` [N, 7] of the end effector times `tail` [3, 4]."""
    out = np.empty((target.shape[0], 3, 4))
    for i in range(target.shape[0]):
        w, x, y, z = target[i, 3], target[i, 4], target[i, 5], target[i, 6]
        norm = np.sqrt(w * w + x * x + y * y + z * z)
        w, x, y, z = w / norm, x / norm, y / norm, z / norm
        for k in range(4):
            v = _rotate((w, x, y, z), (tail[0, k], tail[1, k], tail[2, k]))
            for r in range(3):
                out[i, r, k] = v[r] + (target[i, r] if k == 3 else 0.0)
    return out


class ChainSolver:
    """Inverse kinematics from the root of a controller's URDF to its end effector, for all environments at once."""

    def __init__(self, controller: Any) -> None:
        kinematics = controller.kinematics
        articulation = controller.articulation._objs[0]
        active = list(articulation.active_joints)
        links = controller.articulation.links
        # a mobile base, for one, has links that the arm's URDF does not know
        in_urdf = {link._objs[0]: link.name in kinematics._kinematic_chain_link_names for link in links}
        path, link = [], kinematics.end_link._objs[0]
        while link is not None and in_urdf[link]:
            path.insert(0, link)
            link = link.parent
        fixed, kinds, order, pose = [], [], [], np.eye(4)
        for link in path[1:]:
            joint = link.joint
            pose = pose @ joint.pose_in_parent.to_transformation_matrix()
            moves = JOINT_TYPES[joint.type] != FIXED
            if moves:
                fixed.append(pose)
                kinds.append(JOINT_TYPES[joint.type])
                order.append(active.index(joint))
                pose = np.eye(4)
            pose = pose @ joint.pose_in_child.inv().to_transformation_matrix()
            if moves:
                to_last_link, beyond = pose, np.eye(4)
            elif order:
                beyond = np.linalg.inv(to_last_link) @ pose
        self._fixed = np.array([m[:3] for m in [*fixed, to_last_link]], np.float64)
        self._tail = np.linalg.inv(beyond)[:3]
        self._kind, self.columns = np.array(kinds, np.int64), np.array(order, np.int64)
        controlled = controller.active_joint_indices.numpy()
        self._free = np.isin(self.columns, controlled)
        self._place = np.array([order.index(j) if j in order else -1 for j in controlled.tolist()], np.int64)
        self._controlled = controlled

    def solve(self, target: NDArray[np.float64], qpos: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return positions [N, J] of the controlled joints that bring the end effector to `target` [N, 7].

        `qpos` [N, D]: where all joints are. Rows without a solution keep their positions, as ManiSkill does.
        """
        goal = _joint_goal(target, self._tail)
        start = np.ascontiguousarray(qpos[:, self.columns], dtype=np.float64)
        found, success = np.empty_like(start), np.empty(len(start), np.bool_)

        def task(rows: slice) -> None:
            success[rows] = physx_ik.solve(self._fixed, self._kind, self._free, goal[rows], start[rows], found[rows])

        slices = [slice(i, i + ROWS_PER_TASK) for i in range(0, len(start), ROWS_PER_TASK)]
        if len(slices) == 1:
            task(slices[0])
        else:
            worker_pool().map(task, slices)
        out = qpos[:, self._controlled]
        moves = self._place >= 0
        out[:, moves] = np.where(success[:, None], found[:, self._place[moves]], out[:, moves])
        return out


def set_end_effector_action(self: Any, action: Tensor) -> None:
    """Do what `PDEEPosController.set_action` does on the CPU, for all environments at once."""
    action = self._preprocess_action(action)
    self._step = 0
    self._start_qpos = self.qpos
    solver = self.__dict__.get("_chain_solver")
    if solver is None:
        solver = self._chain_solver = ChainSolver(self)
    if self.config.use_target:
        before = self._target_pose.raw_pose.numpy().astype(np.float64)
    else:
        body = self.articulation.px.cuda_rigid_body_data.torch().numpy()
        before = _relative_pose(body, self.root_link._body_data_index.numpy(), self.ee_link._body_data_index.numpy())
    frame = self.config.frame
    target = _target_pose(
        action.numpy(),
        before,
        bool(self.config.use_delta),
        "body_translation" in frame,
        isinstance(self, PDEEPoseController) and "body_aligned_body_rotation" in frame,
    )
    self._target_pose = Pose(torch.from_numpy(target.astype(np.float32)))
    self._target_qpos = torch.from_numpy(solver.solve(target, self.articulation.get_qpos().numpy()))
    if self.config.interpolate:
        self._step_size = (self._target_qpos - self._start_qpos) / self._sim_steps
    else:
        self.set_drive_targets(self._target_qpos)
