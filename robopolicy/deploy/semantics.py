"""What a policy's actions mean at a robot: whether they fit its file at all, and as absolute joint targets.

The arithmetic is that of ManiSkill's controllers, which the policy learned with: increments of the tool centre are
added in the frame of the robot's base to the measured pose (or to the previous target), inverse kinematics starts at
the measured joints, and a goal that cannot be reached leaves the arm where it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from robopolicy.deploy import kinematics
from robopolicy.deploy.contract import Floats
from robopolicy.deploy.kinematics import Chain
from robopolicy.deploy.robot import Gripper, RobotFile
from robopolicy.errors import SpecMismatchError
from robopolicy.types import ActionSpec, TaskSpec

JOINT_MODES = {
    "pd_joint_pos": "none",
    "pd_joint_delta_pos": "measured",
    "pd_joint_target_delta_pos": "target",
}
TOOL_MODES = {
    "pd_ee_delta_pos": "measured",
    "pd_ee_target_delta_pos": "target",
    "pd_ee_delta_pose": "measured",
    "pd_ee_target_delta_pose": "target",
    "pd_ee_pose": "none",
}
"""Control modes that can be deployed, and what their increments are added to."""


def require_fit(spec: TaskSpec, robot: RobotFile) -> None:
    """Check that a policy trained for `spec` can be played on `robot`.

    Raises:
        SpecMismatchError: lists every difference.
    """
    found = [*_action_differences(spec, robot), *_observation_differences(spec, robot)]
    if found:
        raise SpecMismatchError(f"The checkpoint (task {spec.name!r})", f"robot file {robot.name!r}", found)


def _action_differences(spec: TaskSpec, robot: RobotFile) -> list[str]:
    action, found = spec.action, []
    modes = JOINT_MODES | TOOL_MODES
    if spec.robot != robot.simulated_as:
        found.append(f"robot: trained on {spec.robot!r}, the file stands for {robot.simulated_as!r}")
    if action.control_mode not in modes:
        return [
            *found,
            f"control mode: {action.control_mode!r} cannot be turned into joint targets; known: {', '.join(modes)}",
        ]
    if action.delta_from != modes[action.control_mode]:
        found.append(
            f"delta_from: the checkpoint says {action.delta_from!r}, {action.control_mode} means "
            f"{modes[action.control_mode]!r}"
        )
    if action.control_mode in TOOL_MODES and action.frame != "base":
        found.append(f"frame: increments in the frame {action.frame!r} are not known, only 'base'")
    arm = arm_names(action)
    expected = robot.joints if action.control_mode in JOINT_MODES else _tool_names(action.control_mode)
    if arm != expected:
        found.append(f"order of action dimensions: {', '.join(arm)} against {', '.join(expected)}")
    numbers = (*action.low, *action.high, *action.physical_low, *action.physical_high)
    if not all(map(math.isfinite, numbers)) or any(lo >= hi for lo, hi in zip(action.low, action.high, strict=True)):
        found.append("scale: the bounds of the actions are not finite or empty")
    if not 1.0 <= 1.0 / action.control_dt_s <= robot.command.rate_hz / 2:
        found.append(
            f"rate: actions every {action.control_dt_s:g} s need commands at {2 / action.control_dt_s:g} Hz or more; "
            f"command.rate_hz is {robot.command.rate_hz:g}"
        )
    grippers = [i for i, discrete in enumerate(action.discrete) if discrete]
    if grippers and robot.gripper is None:
        found.append("gripper: the policy has one, the robot file none")
    if len(grippers) > 1 or (grippers and (grippers != [action.dim - 1] or action.delta[-1])):
        found.append("gripper: only one gripper with two ends, as last dimension, can be deployed")
    return found


def _observation_differences(spec: TaskSpec, robot: RobotFile) -> list[str]:
    from robopolicy.deploy.observations import source_width

    found = []
    for name, modality in spec.observation.items():
        for path, width in modality.fields.items():
            source = robot.observations.get(path)
            if source is None:
                found.append(f"observation {name}: {path} has no source; add it under `observations`")
            elif modality.is_image and source not in robot.streams:
                found.append(f"observation {name}: {path}: {source!r} is not a stream")
            elif not modality.is_image and (why := source_width(source, robot, width)):
                found.append(f"observation {name}: {path}: {why}")
    return found


def _tool_names(mode: str) -> tuple[str, ...]:
    d = "" if TOOL_MODES[mode] == "none" else "d"
    axes = ("x", "y", "z", "rx", "ry", "rz") if mode.endswith("pose") else ("x", "y", "z")
    return tuple(f"ee_{d}{axis}" for axis in axes)


def arm_names(action: ActionSpec) -> tuple[str, ...]:
    """Return the names of the dimensions that move the arm."""
    return tuple(name for name, discrete in zip(action.names, action.discrete, strict=True) if not discrete)


@dataclass(frozen=True, slots=True)
class Target:
    """Where one action wants the arm."""

    position: Floats
    """[J] rad."""
    reached: bool
    """False where inverse kinematics found nothing: then it is the start."""
    boxed: bool
    """Whether the tool centre's goal lay outside the workspace and was moved to its edge."""


class ActionConverter:
    """Turns actions into absolute joint targets.

    Args:
        chain: of the same robot.
    """

    def __init__(self, action: ActionSpec, robot: RobotFile, chain: Chain) -> None:
        self.delta_from = action.delta_from
        self._joint_mode = action.control_mode in JOINT_MODES
        self._delta = action.delta_from != "none"
        self._turns = action.control_mode.endswith("pose")
        count = len(arm_names(action))
        self._arm = slice(0, count)
        self._low, self._high = np.array(action.low), np.array(action.high)
        physical_low, physical_high = np.array(action.physical_low), np.array(action.physical_high)
        self._scale = (physical_high - physical_low) / (self._high - self._low)
        self._offset = physical_low - self._low * self._scale
        self._normalised_turns = self._turns and bool(np.any(np.abs(self._scale[3:count]) != 1.0))
        self._chain = chain
        self._base = np.array([*robot.frames.base_position_m, *robot.frames.base_quaternion])
        self._box = np.array([robot.safety.workspace_low_m, robot.safety.workspace_high_m])

    def __call__(self, action: Floats, measured: Floats, before: Floats) -> Target:
        """Return the joint target of `action` [A], environment units.

        Args:
            measured: [J] rad, when the action was due.
            before: [J] rad, the previous target.
        """
        physical = self.physical(np.asarray(action, np.float64))[self._arm]
        anchor = before if self.delta_from == "target" else measured
        if self._joint_mode:
            return Target(anchor + physical if self._delta else physical.copy(), True, False)
        goal = np.empty(7)
        if self._delta:
            pose = self._chain.forward(anchor)
            goal[:3] = pose[:3] + physical[:3]
            goal[3:] = pose[3:]
            if self._turns:
                goal[3:] = kinematics.multiply(tuple(euler_quaternion(physical[3:])), tuple(pose[3:]))
        else:
            goal[:3] = physical[:3]
            goal[3:] = euler_quaternion(physical[3:])
        boxed = self._into_box(goal)
        position, reached = self._chain.inverse(goal, measured)
        return Target(position, reached, boxed)

    def physical(self, action: Floats) -> Floats:
        """Return `action` [A] in the controller's units, clipped to its bounds as ManiSkill does it."""
        clipped = np.clip(action, self._low, self._high)
        if self._normalised_turns:  # ManiSkill shortens turns to length 1 instead of clipping each
            clipped[3:6] = action[3:6] / max(1.0, float(np.linalg.norm(action[3:6])))
        return clipped * self._scale + self._offset

    def _into_box(self, goal: Floats) -> bool:
        """Move the position of `goal` [7], in the base frame, into the workspace; return whether it was outside."""
        q = tuple(self._base[3:])
        world = self._base[:3] + np.array(kinematics.rotate(q, tuple(goal[:3])))
        inside = np.clip(world, self._box[0], self._box[1])
        if np.array_equal(inside, world):
            return False
        back = (q[0], -q[1], -q[2], -q[3])
        goal[:3] = kinematics.rotate(back, tuple(inside - self._base[:3]))
        return True


def euler_quaternion(angles: Floats) -> Floats:
    """Return the quaternion [4], w >= 0, that turns about x, then the new y, then the new z by `angles` [3]."""
    half = 0.5 * np.asarray(angles, np.float64)
    (cx, cy, cz), (sx, sy, sz) = np.cos(half), np.sin(half)
    q = kinematics.multiply(kinematics.multiply((cx, sx, 0.0, 0.0), (cy, 0.0, sy, 0.0)), (cz, 0.0, 0.0, sz))
    return np.array(q) if q[0] >= 0.0 else -np.array(q)


class GripperLogic:
    """Turns a policy's gripper value into openings to command: with a dead band, and not too often.

    Two-ended only: whichever end of the action's range is physically wider means open.
    """

    def __init__(self, action: ActionSpec, gripper: Gripper) -> None:
        self._gripper = gripper
        self._low, self._high = action.low[-1], action.high[-1]
        self._high_opens = action.physical_high[-1] >= action.physical_low[-1]
        self.opening_m: float | None = None
        """What was commanded last."""
        self._since_s = -math.inf

    def __call__(self, value: float, now_s: float) -> float | None:
        """Return the opening to command now, or None: nothing new."""
        share = (value - self._low) / (self._high - self._low)
        share = share if self._high_opens else 1.0 - share
        band = 0.5 * self._gripper.hysteresis
        if self.opening_m is not None and abs(share - 0.5) <= band:
            return None
        wanted = self._gripper.open_m if share >= 0.5 else self._gripper.closed_m
        if wanted == self.opening_m or now_s - self._since_s < self._gripper.resend_s:
            return None
        self.opening_m, self._since_s = wanted, now_s
        return wanted

    def reset(self) -> None:
        """Forget what was commanded."""
        self.opening_m, self._since_s = None, -math.inf


def find_gripper(action: ActionSpec, robot: RobotFile) -> GripperLogic | None:
    """Return what turns the policy's gripper dimension into commands; None where there is no gripper to command."""
    gripper = robot.gripper
    has_one = any(action.discrete) and gripper is not None and gripper.interface != "none"
    return GripperLogic(action, gripper) if has_one and gripper is not None else None
