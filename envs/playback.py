"""Plays a joint-space plan under any controller of the arm, in closed loop and as fast as the options allow.

Each control step looks up a point further along the plan and asks the controller for the motion from where the arm
*is* to that point, so that tracking errors are corrected rather than summed up. How far ahead the point may lie is
limited by `speed` and by `max_action`; where the gripper moves, the arm first arrives.

With `Shortening(speed=1, skip_idle=False)` this is ManiSkill's own conversion (`from_pd_joint_pos` in
mani_skill/trajectory/utils/actions/conversion.py), without its second simulation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from robopolicy.errors import RobopolicyError, UnknownNameError

from .solvers import Plan

STILL_RAD = 1e-5
"""Neighbouring plan points closer than this are one place: the solver was waiting."""
SEARCH_STEP = 0.25
"""Resolution, in plan steps, of the search for the furthest admissible point."""
MOST_SETTLING_STEPS = 10
"""A tool that has not settled by then (it pushes against something) no longer delays the plan."""
FINGERS_REST_M = 5e-4
"""Fingers that move less than this in a control step have finished; their velocity is no measure, it trembles."""


@dataclass(frozen=True, kw_only=True)
class Shortening:
    """How a slow plan becomes a short demonstration.

    Median steps of PickCube, PushCube and StackCube in `pd_ee_delta_pos`, with every plan that works kept: 74, 65, 107
    with the solver's timing (speed 1), 45, 39, 61 with speed 2, and 28, 22, 30 with the defaults.
    """

    speed: float = 10.0
    """Plan steps per control step, at most; 1 keeps the solver's own timing."""
    max_action: float = 0.5
    """Largest part of the controller's range that a step may use, (0, 1]; lower is smoother and longer."""
    skip_idle: bool = True
    """Leave a wait for the gripper as soon as the fingers have come to rest."""
    settle_m: float = 0.01
    """Before the gripper moves, wait until the tool is this close to its place, metres."""
    hold_steps: int = 3
    """Steps that follow the first success, standing still; success must last through all of them."""
    extra_steps: int = 15
    """Steps allowed after the end of the plan to reach success."""
    gentler_on_failure: bool = True
    """A motion that fails is tried again at twice the solver's speed, then at its own (fine insertions need it)."""

    def levels(self) -> tuple[Shortening, ...]:
        """Return the settings to try, in order."""
        if not self.gentler_on_failure:
            return (self,)
        twice = replace(self, speed=min(self.speed, 2.0), max_action=1.0, settle_m=min(self.settle_m, 0.003))
        return self, twice, replace(twice, speed=1.0, skip_idle=False)

    def __post_init__(self) -> None:
        if not self.speed >= 1 or not 0 < self.max_action <= 1 or self.settle_m <= 0:
            raise ValueError(f"Shortening needs speed >= 1, 0 < max_action <= 1 and settle_m > 0; got {asdict(self)}.")
        if self.hold_steps < 0 or self.extra_steps < 0:
            raise ValueError(f"hold_steps and extra_steps must not be negative; got {asdict(self)}.")


class ArmCommand:
    """Turns an arm joint target into an action of the environment's arm controller."""

    def __init__(self, env: Any) -> None:
        agent = env.unwrapped.agent
        self.mode: str = agent.control_mode
        if self.mode not in ENCODERS:
            raise UnknownNameError("control mode for demonstrations", self.mode, ENCODERS)
        self._encode = ENCODERS[self.mode]
        self.arm = agent.controller.controllers["arm"]
        self.robot = agent.robot
        self.joints = np.asarray(self.arm.active_joint_indices.cpu()).astype(int)
        config = self.arm.config
        self.low = np.asarray(self.arm.single_action_space.low, dtype=np.float64)
        self.high = np.asarray(self.arm.single_action_space.high, dtype=np.float64)
        self.normalized = bool(config.normalize_action)
        if self.normalized:  # the space is [-1, 1]; what it stands for is in the configuration
            self.low = np.asarray(self.arm.action_space_low.cpu(), dtype=np.float64)
            self.high = np.asarray(self.arm.action_space_high.cpu(), dtype=np.float64)
        self._model = self.robot.create_pinocchio_model()
        self._link: Any = getattr(self.arm, "ee_link", None) or agent.tcp

    def __call__(self, qpos: np.ndarray) -> np.ndarray:
        """Return the arm action [A] float64, not clipped, that moves from the present state to `qpos` [J]."""
        return self._encode(self, qpos)

    def scale(self, value: np.ndarray) -> np.ndarray:
        if not self.normalized:
            return value
        return (value - (self.high + self.low) / 2) / ((self.high - self.low) / 2)

    def pose(self, qpos: np.ndarray) -> tuple[np.ndarray, Rotation]:
        """Return position [3], m, and rotation of the controlled link in the robot's base, for arm joints `qpos`."""
        full = np.asarray(self.robot.get_qpos()[0].cpu(), dtype=np.float64)
        full[self.joints] = qpos
        self._model.compute_forward_kinematics(full)
        pose = self._model.get_link_pose(int(self._link.index[0]))
        return np.asarray(pose.p, dtype=np.float64), _rotation(pose.q)

    def now(self) -> np.ndarray:
        """Return the measured arm joints [J]."""
        return np.asarray(self.robot.get_qpos()[0].cpu(), dtype=np.float64)[self.joints]

    def fingers(self) -> np.ndarray:
        """Return the measured joints that the arm controller does not drive, m."""
        return np.delete(np.asarray(self.robot.get_qpos()[0].cpu(), dtype=np.float64), self.joints)

    def start_pose(self) -> tuple[np.ndarray, Rotation]:
        """Return the pose to which the controller adds increments: measured, or its last target."""
        if self.arm.config.use_target:
            raw = np.asarray(self.arm._target_pose.raw_pose[0].cpu(), dtype=np.float64)
            return raw[:3], _rotation(raw[3:])
        return self.pose(self.now())

    def within(self, action: np.ndarray, limit: float) -> bool:
        """Whether `action` stays within `limit` (part of the range) of a controller of increments."""
        if not self.normalized:
            return bool(np.all(action >= self.low - 1e-6) and np.all(action <= self.high + 1e-6))
        if "pose" in self.mode:  # rotations are clipped by their norm
            return bool(np.abs(action[:3]).max() <= limit and np.linalg.norm(action[3:]) <= limit)
        return bool(np.abs(action).max() <= limit)


def _rotation(wxyz: np.ndarray) -> Rotation:
    return Rotation.from_quat(np.asarray(wxyz, dtype=np.float64)[[1, 2, 3, 0]])


def _absolute_joints(command: ArmCommand, qpos: np.ndarray) -> np.ndarray:
    return qpos


def _joint_increment(command: ArmCommand, qpos: np.ndarray) -> np.ndarray:
    if command.arm.config.use_target:
        return command.scale(qpos - np.asarray(command.arm._target_qpos[0].cpu(), dtype=np.float64))
    return command.scale(qpos - command.now())


def _tool_increment(command: ArmCommand, qpos: np.ndarray) -> np.ndarray:
    return command.scale(command.pose(qpos)[0] - command.start_pose()[0])


def _tool_pose_increment(command: ArmCommand, qpos: np.ndarray) -> np.ndarray:
    (target_p, target_r), (start_p, start_r) = command.pose(qpos), command.start_pose()
    angles = (target_r * start_r.inv()).as_euler("XYZ")
    move = (target_p - start_p - (command.high[:3] + command.low[:3]) / 2) / ((command.high - command.low)[:3] / 2)
    return np.concatenate([move, angles / command.arm.config.rot_lower])  # rot_lower: ManiSkill scales rotations by it


def _tool_pose(command: ArmCommand, qpos: np.ndarray) -> np.ndarray:
    position, rotation = command.pose(qpos)
    return np.concatenate([position, rotation.as_euler("XYZ")])


ENCODERS: dict[str, Callable[[ArmCommand, np.ndarray], np.ndarray]] = {
    "pd_joint_pos": _absolute_joints,
    "pd_joint_delta_pos": _joint_increment,
    "pd_joint_target_delta_pos": _joint_increment,
    "pd_ee_delta_pos": _tool_increment,
    "pd_ee_target_delta_pos": _tool_increment,
    "pd_ee_delta_pose": _tool_pose_increment,
    "pd_ee_target_delta_pose": _tool_pose_increment,
    "pd_ee_pose": _tool_pose,
}
"""Control mode to the function that encodes a joint target for it."""


class ActionOutOfRange(RobopolicyError):
    """A step of the plan needs more than the controller's range; the demonstration would be clipped."""


@dataclass(frozen=True)
class Segment:
    """A stretch of a plan, `first` to `last` inclusive: the arm moves, or waits while the gripper does."""

    first: int
    last: int
    waits: bool


def split(plan: Plan) -> list[Segment]:
    """Cut `plan` where the gripper's command changes and where the arm begins or ends to wait for it.

    A robot without a gripper never waits.
    """
    if plan.gripper.shape[1] == 0:
        return [Segment(0, len(plan) - 1, False)]
    still = np.abs(np.diff(plan.qpos, axis=0)).max(axis=1) < STILL_RAD
    waits = np.zeros(len(plan), dtype=bool)
    waits[1:] |= still
    waits[:-1] |= still
    changes = np.diff(waits.astype(int)) != 0
    changes |= np.abs(np.diff(plan.gripper, axis=0)).max(axis=1) > 0
    edges = [0, *(np.flatnonzero(changes) + 1), len(plan)]
    return [Segment(int(a), int(b) - 1, bool(waits[a])) for a, b in itertools.pairwise(edges)]


class PlanPlayer:
    """Follows one plan: each `action` is the next command; after the end of the plan it keeps the last place."""

    def __init__(self, plan: Plan, command: ArmCommand, shortening: Shortening) -> None:
        self.plan, self.command, self.options = plan, command, shortening
        self._segments = split(plan)
        self._qpos = np.concatenate([command.now()[None], plan.qpos])  # point -1 of the plan is where the arm starts
        self._index = 0
        self._position = -1.0
        self._waited = 0
        self._fingers, self._fingers_rest = command.fingers(), True

    @property
    def finished(self) -> bool:
        return self._position >= len(self.plan) - 1

    def action(self) -> np.ndarray:
        """Return the next environment action [A] float32 and move along the plan.

        Raises:
            ActionOutOfRange: no motion towards the plan fits the controller's range.
        """
        fingers = self.command.fingers()
        self._fingers_rest = bool(np.abs(fingers - self._fingers).max(initial=0.0) < FINGERS_REST_M)
        self._fingers = fingers
        if self._index < len(self._segments) - 1 and self._is_over(self._segments[self._index]):
            self._index, self._waited = self._index + 1, 0
            self._position = self._segments[self._index].first - 1.0
        segment = self._segments[self._index]
        if segment.waits:
            self._position = min(self._position + 1, float(segment.last))
        else:
            self._position = self._furthest(segment)
        self._waited += self._position >= segment.last or segment.waits
        arm = self.command(self._point(self._position))
        if not self.command.within(arm, 1.0):
            raise ActionOutOfRange(f"plan step {self._position:.1f} is beyond the range of {self.command.mode}")
        gripper = self.plan.gripper[max(int(self._position), segment.first)]
        return np.concatenate([arm, gripper]).astype(np.float32)

    def _is_over(self, segment: Segment) -> bool:
        if not segment.waits:
            if self._position < segment.last:
                return False
            settled = self._distance_m(self.plan.qpos[segment.last]) <= self.options.settle_m
            return settled or self._waited > MOST_SETTLING_STEPS
        if self._position >= segment.last:
            return True
        return self.options.skip_idle and self._waited >= 2 and self._fingers_rest

    def _distance_m(self, qpos: np.ndarray) -> float:
        return float(np.linalg.norm(self.command.pose(qpos)[0] - self.command.pose(self.command.now())[0]))

    def _point(self, position: float) -> np.ndarray:
        low = int(np.floor(position)) + 1
        high = min(low + 1, len(self.plan))
        return self._qpos[low] + (position + 1 - low) * (self._qpos[high] - self._qpos[low])

    def _furthest(self, segment: Segment) -> float:
        """Return the position furthest along `segment` that `speed` and `max_action` admit, never a step back."""
        best = self._position
        last = min(best + self.options.speed, float(segment.last))
        while best < last:
            ahead = min(best + SEARCH_STEP, last)
            if not self.command.within(self.command(self._point(ahead)), self.options.max_action):
                break
            best = ahead
        return best
