"""How a filtered command and a stop become messages, for each way in which controllers take them.

| interface | message | silence means | stop |
| --- | --- | --- | --- |
| joint_trajectory | JointTrajectory: the command, then rest | the arm brakes to rest | a trajectory to rest |
| follow_joint_trajectory | the same as a goal (action, ROS 1: topic) | the same | cancel and a trajectory to rest |
| forward_position | Float64MultiArray, bare numbers | the last position holds | the last position again |
| servo_twist | TwistStamped in the base frame, leading back to the way | Servo's own timeout halts | zero twist |
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from . import messages
from .contract import Floats
from .kinematics import find_chain
from .messages import Dialect, Message
from .robot import Gripper, RobotFile

Clock = Callable[[], float]
Measured = Callable[[], Floats | None]
"""Where the arm is, [J]; None where that is not known."""

SHORTEST_BRAKE_S, LONGEST_BRAKE_S = 0.05, 0.5
COMMAND_LASTS_S = 0.5
"""An arm that was commanded so recently still moves as commanded, or slower."""
CATCH_UP_PER_S, MOST_CATCH_UP_M_S, MOST_CATCH_UP_RAD_S = 1.0, 0.05, 0.25
"""Velocities add up to no place by themselves: by how much a twist leads the tool back to where it should be."""
TRAJECTORY_GOAL = "control_msgs/FollowJointTrajectory"
GRIPPER_GOAL = "control_msgs/GripperCommand"


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """A message for a topic."""

    topic: str
    message: Message


@dataclass(frozen=True, kw_only=True, slots=True)
class Goal:
    """A goal for a ROS 2 action."""

    action: str
    type_name: str
    goal: Message


class Interface(Protocol):
    """One way to command an arm; knows the robot file, holds no state but the last command."""

    def topics(self, dialect: Dialect) -> Mapping[str, str]:
        """Return what has to be advertised: topic to type."""

    def command(self, position: Floats, velocity: Floats, dialect: Dialect) -> Publish | Goal:
        """Return what moves the arm to `position` [J] by one command period from now, passing at `velocity` [J]."""

    def stop(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> Sequence[Publish]:
        """Return what stops an arm measured at `position` [J] (None: unknown) moving at `velocity` [J]."""


class JointTrajectory:
    """Short trajectories on a topic, each replacing the one before."""

    def __init__(self, robot: RobotFile, clock: Clock, measured: Measured) -> None:
        self._robot, self._topic, self._clock = robot, robot.command.topic, clock
        self._joints = robot.command.joints or robot.joints
        self._order = [robot.joints.index(name) for name in self._joints]
        self._period_s = 1.0 / robot.command.rate_hz
        limits = robot.limits
        self._low, self._high = np.array(limits.position_low), np.array(limits.position_high)
        self._fastest = np.array(limits.velocity)
        self._braking = np.array(limits.acceleration) * robot.safety.acceleration_scale
        self._last: tuple[float, Floats] | None = None

    def topics(self, dialect: Dialect) -> Mapping[str, str]:
        return {self._topic: messages.JOINT_TRAJECTORY}

    def command(self, position: Floats, velocity: Floats, dialect: Dialect) -> Publish | Goal:
        return Publish(topic=self._topic, message=self._moving(position, velocity, dialect))

    def stop(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> Sequence[Publish]:
        return (Publish(topic=self._topic, message=self._resting(position, velocity, dialect)),)

    def _moving(self, position: Floats, velocity: Floats, dialect: Dialect) -> dict[str, Any]:
        self._last = (time.monotonic(), velocity.copy())
        brake_s = self._brake_s(velocity)
        rest = np.clip(position + 0.5 * brake_s * velocity, self._low, self._high)
        return self._trajectory([(self._period_s, position, velocity), (self._period_s + brake_s, rest, None)], dialect)

    def _resting(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> dict[str, Any]:
        if position is None:  # an empty trajectory asks controllers to hold where they are
            return self._trajectory([], dialect)
        if velocity is None:
            return self._trajectory([(SHORTEST_BRAKE_S, position, None)], dialect)
        velocity = self._believed(velocity)
        brake_s = self._brake_s(velocity)
        rest = np.clip(position + 0.5 * brake_s * velocity, self._low, self._high)
        return self._trajectory([(brake_s, rest, None)], dialect)

    def _believed(self, measured: Floats) -> Floats:
        """Return the lesser of the measured and the commanded velocity: a wrong one must not send a stop far away."""
        bounded = np.clip(measured, -self._fastest, self._fastest)
        if self._last is None or time.monotonic() - self._last[0] > COMMAND_LASTS_S:
            return bounded
        commanded = self._last[1]
        return np.where(bounded * commanded > 0, np.sign(bounded) * np.minimum(abs(bounded), abs(commanded)), 0.0)

    def _brake_s(self, velocity: Floats) -> float:
        return float(np.clip((np.abs(velocity) / self._braking).max(), SHORTEST_BRAKE_S, LONGEST_BRAKE_S))

    def _trajectory(self, points: Sequence[tuple[float, Floats, Floats | None]], dialect: Dialect) -> dict[str, Any]:
        """Return a trajectory through (time, position, velocity), where None is rest."""
        rows = []
        for time_s, position, velocity in points:
            speed = np.zeros(len(position)) if velocity is None else velocity
            rows.append(messages.trajectory_point(time_s, position[self._order], speed[self._order], dialect=dialect))
        return messages.trajectory(self._joints, rows, frame=self._robot.command.frame, dialect=dialect)


class FollowJointTrajectory(JointTrajectory):
    """The same trajectories as goals of an action, for controllers that offer nothing else.

    Stopping also publishes to the topic of the same controller, since a goal outlives its client and a blocked bridge
    does not hear a cancel.
    """

    def __init__(self, robot: RobotFile, clock: Clock, measured: Measured) -> None:
        super().__init__(robot, clock, measured)
        self._action = robot.command.topic
        self._controller = self._action.removesuffix("/follow_joint_trajectory")

    def _topic_of(self, dialect: Dialect) -> str:
        return f"{self._controller}/{'command' if dialect == 'ros1' else 'joint_trajectory'}"

    def topics(self, dialect: Dialect) -> Mapping[str, str]:
        out = {self._topic_of(dialect): messages.JOINT_TRAJECTORY}
        return out | (ros1_action_topics(self._action, TRAJECTORY_GOAL) if dialect == "ros1" else {})

    def command(self, position: Floats, velocity: Floats, dialect: Dialect) -> Publish | Goal:
        goal = {"trajectory": self._moving(position, velocity, dialect)}
        return action_goal(self._action, TRAJECTORY_GOAL, goal, dialect, self._clock())

    def stop(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> Sequence[Publish]:
        hold = Publish(topic=self._topic_of(dialect), message=self._resting(position, velocity, dialect))
        return (*ros1_cancel(self._action, dialect), hold)


class ForwardPosition:
    """Bare positions in the controller's order: no time stamp, no timeout, the last value holds for ever."""

    def __init__(self, robot: RobotFile, clock: Clock, measured: Measured) -> None:
        self._topic = robot.command.topic
        self._order = [robot.joints.index(name) for name in robot.command.joints or robot.joints]
        self._reach = robot.safety.following_error_rad
        self._last: Floats | None = None

    def topics(self, dialect: Dialect) -> Mapping[str, str]:
        return {self._topic: messages.FLOATS}

    def command(self, position: Floats, velocity: Floats, dialect: Dialect) -> Publish | Goal:
        self._last = position.copy()
        return Publish(topic=self._topic, message=messages.float_array(position[self._order]))

    def stop(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> Sequence[Publish]:
        """Hold the last command if the arm is near it, else where the arm is."""
        hold = self._last
        if hold is None or (position is not None and np.abs(hold - position).max() > self._reach):
            hold = position
        return () if hold is None else (Publish(topic=self._topic, message=messages.float_array(hold[self._order])),)


class ServoTwist:
    """Velocities of the tool centre for MoveIt Servo (`command_in_type: speed_units`), in the frame of the base."""

    def __init__(self, robot: RobotFile, clock: Clock, measured: Measured) -> None:
        self._topic, self._frame, self._clock = robot.command.topic, robot.command.frame, clock
        self._chain, self._measured = find_chain(robot.kinematics), measured
        self._fastest_m_s = robot.safety.tcp_speed_m_s
        self._way: deque[Floats] = deque(maxlen=1 + round(robot.arm_lag_s * robot.command.rate_hz))
        """Poses that were wanted of late; the arm should now be at the first."""

    def topics(self, dialect: Dialect) -> Mapping[str, str]:
        return {self._topic: messages.TWIST}

    def command(self, position: Floats, velocity: Floats, dialect: Dialect) -> Publish | Goal:
        self._way.append(self._chain.forward(position))
        twist = self._chain.jacobian(position) @ velocity
        if (measured := self._measured()) is not None:
            back = CATCH_UP_PER_S * between(self._chain.forward(measured), self._way[0])
            twist[:3] += shortened(back[:3], MOST_CATCH_UP_M_S)
            twist[3:] += shortened(back[3:], MOST_CATCH_UP_RAD_S)
        twist[:3] = shortened(twist[:3], self._fastest_m_s)
        return self._publish(twist, dialect)

    def stop(self, position: Floats | None, velocity: Floats | None, dialect: Dialect) -> Sequence[Publish]:
        self._way.clear()
        return (self._publish(np.zeros(6), dialect),)

    def _publish(self, twist: Floats, dialect: Dialect) -> Publish:
        message = messages.twist_stamped(twist, time_s=self._clock(), frame=self._frame, dialect=dialect)
        return Publish(topic=self._topic, message=message)


INTERFACES: dict[str, type[JointTrajectory] | type[ForwardPosition] | type[ServoTwist]] = {
    "joint_trajectory": JointTrajectory,
    "follow_joint_trajectory": FollowJointTrajectory,
    "forward_position": ForwardPosition,
    "servo_twist": ServoTwist,
}
"""`command.interface` of a robot file to its class."""


def build_interface(robot: RobotFile, clock: Clock = time.time, measured: Measured = lambda: None) -> Interface:
    """Return the command interface that `robot` names; `clock` tells the robot's time, for stamps."""
    return INTERFACES[robot.command.interface](robot, clock, measured)


def gripper_goal(gripper: Gripper, width_m: float, dialect: Dialect, now_s: float) -> Publish | Goal:
    """Return the GripperCommand that opens or closes to `width_m`."""
    body = {"position": float(width_m) * gripper.message_per_m, "max_effort": gripper.max_effort_n}
    return action_goal(gripper.topic, GRIPPER_GOAL, {"command": body}, dialect, now_s)


def action_goal(action: str, type_name: str, goal: Message, dialect: Dialect, now_s: float) -> Publish | Goal:
    """Return a goal as ROS 2 has it (an operation of the bridge) or ROS 1 (a message on `<action>/goal`)."""
    if dialect == "ros2":
        return Goal(action=action, type_name=messages.long_type(type_name, "action"), goal=goal)
    name = {"stamp": messages.time_fields(now_s, dialect), "id": f"{action}-{now_s:.6f}"}
    return Publish(
        topic=f"{action}/goal", message={"header": messages.header(now_s, dialect), "goal_id": name, "goal": goal}
    )


def ros1_action_topics(action: str, type_name: str) -> dict[str, str]:
    """Return the topics of a ROS 1 action that its client publishes, with their types."""
    return {f"{action}/goal": f"{type_name}ActionGoal", f"{action}/cancel": "actionlib_msgs/GoalID"}


def ros1_cancel(action: str, dialect: Dialect) -> tuple[Publish, ...]:
    """Return the message that cancels every goal of a ROS 1 action: an empty id, and time zero."""
    if dialect == "ros2":
        return ()
    return (Publish(topic=f"{action}/cancel", message={"stamp": messages.time_fields(0.0, dialect), "id": ""}),)


def between(before: Floats, after: Floats) -> Floats:
    """Return the way [6] (base frame) from the pose `before` to `after`: metres, and a rotation vector."""
    return np.concatenate([after[:3] - before[:3], turn(before[3:], after[3:])])


def shortened(vector: Floats, most: float) -> Floats:
    """Return `vector`, not longer than `most`."""
    length = float(np.linalg.norm(vector))
    return vector * (most / length) if length > most else vector


def turn(before: Floats, after: Floats) -> Floats:
    """Return the rotation vector [3] (base frame) that leads from quaternion `before` to `after`, w first.

    For small angles, as between two neighbouring moments.
    """
    w0, v0, w1, v1 = before[0], before[1:], after[0], after[1:]
    scalar = w1 * w0 + v1 @ v0
    vector = w0 * v1 - w1 * v0 - np.cross(v1, v0)
    return 2.0 * vector if scalar >= 0 else -2.0 * vector
