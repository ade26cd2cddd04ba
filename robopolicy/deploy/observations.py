"""The policy's observation, rebuilt from what a robot measures and from topics, at moments of one's choosing.

A source in the robot file is one term or the difference of two:

    joints.position, joints.velocity   arm, then the fingers (the opening shared evenly)
    tcp_pose                           pose of the tool centre, by forward kinematics, in the frame of the observations
    grasped                            1 where the gripper was told to close and stands still around something
    <stream>                           a topic of the robot file
    <term>.position, <term>.quaternion a pose's parts

Joints are interpolated to the moment that is asked for; other streams give their newest sample at or before it. The
newest moment that all streams have reached is the observation's time; the history before it is picked by time, at the
period of training.

A modality that the policy can do without (`Policy.optional`) is left out while one of its streams is silent: nothing
has come yet, or its newest sample lies further behind the joints than the watchdogs allow an observation to spread, or
a sample to be old. It is back with the first new sample; what came before the silence is not looked at again.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from robopolicy.deploy import kinematics
from robopolicy.deploy.contract import Floats, Robot, RobotState, Sample
from robopolicy.deploy.kinematics import Chain
from robopolicy.deploy.robot import RobotFile
from robopolicy.types import ModalitySpec, Observation, TaskSpec

STILL_M, STILL_S = 5e-4, 0.04
"""Fingers stand still that move less than this in that time. Their velocity does not tell: ManiSkill's simulation
gives 0.2 m/s for fingers that press on something."""
DRIFT = 1e-3
"""Seconds per second by which the fastest path between the clocks is forgotten: far more than clocks drift."""
SETTLING_S = 2.0
JUMP_S = 0.1
"""A robot clock that leaps ahead by more is not trusted any more."""


class RobotClock:
    """Puts the robot's time stamps on this process's monotonic clock.

    The smallest arrival minus stamp seen so far is the offset plus the fastest path: a message that took longer is
    recognised as old, however regularly such messages arrive.
    """

    def __init__(self) -> None:
        self.offset_s: float | None = None
        """Monotonic minus robot clock; None where stamps are missing."""
        self.jumped = False
        self._first_s = self._noted_s = 0.0

    def note(self, stamp_s: float | None, arrival_s: float) -> None:
        """Learn from one message; call it for every new joint state."""
        if stamp_s is None:
            return
        offset = arrival_s - stamp_s
        if self.offset_s is None:
            self.offset_s, self._first_s, self._noted_s = offset, arrival_s, arrival_s
            return
        grown = self.offset_s + DRIFT * max(0.0, arrival_s - self._noted_s)
        self._noted_s = arrival_s
        settled = arrival_s - self._first_s > SETTLING_S  # the first messages after a subscription may be old ones
        self.jumped |= settled and offset < self.offset_s - JUMP_S
        self.offset_s = min(offset, grown)

    def time(self, item: RobotState | Sample) -> float:
        """Return when `item` was measured, monotonic; its arrival where it has no stamp."""
        if item.stamp_s is None or self.offset_s is None:
            return item.arrival_s
        return min(item.stamp_s + self.offset_s, item.arrival_s)

    def reset(self) -> None:
        self.offset_s, self.jumped = None, False


@dataclass(frozen=True, slots=True)
class Built:
    """One observation window and when it was."""

    observation: Observation
    """[1, O, ...]."""
    time_s: float
    """Monotonic, of its newest frame."""
    spread_s: float
    """How far the newest samples of the streams lie apart."""
    arrays: dict[str, NDArray[np.generic]]
    """The same without the batch axis, for the recording."""
    missing: tuple[str, ...] = ()
    """Modalities that were left out."""


def terms(source: str) -> list[tuple[str, str]]:
    """Return the (name, part) pairs of a source."""
    out = []
    for term in source.split(" - "):
        name, _, part = term.strip().rpartition(".")
        out.append(
            (name, part) if part in ("position", "quaternion") and name != "joints" and name else (term.strip(), "")
        )
    return out


def source_width(source: str, robot: RobotFile, wanted: int) -> str:
    """Say why `source` cannot give a vector of width `wanted`; empty if it can."""
    fingers = len(robot.gripper.joints) if robot.gripper else 0
    widths = {"joints.position": len(robot.joints) + fingers, "joints.velocity": len(robot.joints) + fingers}
    widths |= {"tcp_pose": 7, "grasped": 1}
    kinds = {"PoseStamped": 7, "PointStamped": 3}
    found = set()
    for name, part in terms(source):
        if name == "grasped" and robot.gripper is None:
            return "`grasped` needs a gripper"
        if name not in widths and name not in robot.streams:
            return f"{name!r} is neither a stream nor one of {', '.join(widths)}"
        kind = robot.streams[name].type.rpartition("/")[2] if name in robot.streams else ""
        width = widths.get(name, kinds.get(kind, wanted))
        found.add({"position": 3, "quaternion": 4}[part] if part else width)
    if found != {wanted}:
        return f"{source!r} gives {' and '.join(map(str, sorted(found)))} numbers, the policy wants {wanted}"
    return ""


def modality_streams(modality: ModalitySpec, robot: RobotFile) -> set[str]:
    """Return the streams of `robot` that a modality is made of."""
    sources = [robot.observations[path] for path in modality.fields if path in robot.observations]
    return {name for source in sources for name, _ in terms(source) if name in robot.streams}


def needed_streams(spec: TaskSpec, robot: RobotFile) -> list[str]:
    """Return the streams of `robot` that a policy trained for `spec` observes."""
    names = set().union(*(modality_streams(modality, robot) for modality in spec.observation.values()))
    return [name for name in robot.streams if name in names]


class ObservationBuilder:
    """Builds windows for one policy from one robot.

    Args:
        n_obs_steps: frames of a window.
        period_s: time between them: the policy's control period, stretched by the speed.
        speed: share of real time at which the policy is played; velocities are told as the policy knows them.
        optional: modalities that may be missing.
    """

    def __init__(
        self,
        spec: TaskSpec,
        robot: RobotFile,
        chain: Chain,
        *,
        n_obs_steps: int,
        period_s: float,
        speed: float = 1.0,
        optional: frozenset[str] = frozenset(),
    ) -> None:
        self.clock = RobotClock()
        self.streams = needed_streams(spec, robot)
        self._needs = {name: modality_streams(modality, robot) for name, modality in spec.observation.items()}
        self.required = set().union(*(needs for name, needs in self._needs.items() if name not in optional))
        """Streams without which there is no observation."""
        self.moving_streams = [name for name in self.streams if not robot.streams[name].constant]
        self._spec, self._robot, self._chain = spec, robot, chain
        self._steps, self._period_s, self._speed = n_obs_steps, period_s, speed
        self._most_behind_s = min(robot.watchdogs.spread_s, robot.watchdogs.observation_age_s)
        self._silent: set[str] = set()
        self._since_s: dict[str, float] = {}
        self._fingers = len(robot.gripper.joints) if robot.gripper else 0
        self._gripper: deque[tuple[float, float]] = deque(maxlen=16)
        self._start_s = -math.inf
        tool_pose(robot, chain, np.zeros(len(robot.joints)))  # compiles

    def start(self, now_s: float) -> None:
        """Begin an episode: nothing before `now_s` is looked at."""
        self._start_s = now_s
        self._silent, self._since_s = set(), {}
        self._gripper.clear()

    def commanded(self, opening_m: float, now_s: float) -> None:
        """Learn what the gripper was told; called by the loop."""
        self._gripper.append((now_s, opening_m))

    def __call__(self, robot: Robot) -> Built | str:
        """Return the newest window, or why there is none."""
        states = [s for s in robot.states() if s.arrival_s >= self._start_s]
        if not states:
            return "no joint states"
        times = [self.clock.time(s) for s in states]
        samples: dict[str, Sequence[Sample]] = {}
        for name in self.streams:
            if got := self._samples(name, robot, times[-1]):
                samples[name] = got
            elif name in self.required or times[-1] < self._start_s + self._most_behind_s:
                return f"nothing yet on stream {name!r} ({self._robot.streams[name].topic})"
        stream_times = {n: [self.clock.time(s) for s in samples[n]] for n in self.moving_streams if n in samples}
        newest = [times[-1], *(t[-1] for t in stream_times.values())]
        now_s = min(newest)
        first_s = max(times[0], *(t[0] for t in stream_times.values())) if stream_times else times[0]
        missing = tuple(name for name, needs in self._needs.items() if not needs <= samples.keys())
        frames = []
        for step in range(self._steps - 1, -1, -1):
            moment = max(now_s - step * self._period_s, min(first_s, now_s))
            frames.append(self._frame(moment, states, times, samples, stream_times, missing))
        arrays = {name: np.stack([frame[name] for frame in frames]) for name in frames[0]}
        tensors = {name: torch.from_numpy(value)[None] for name, value in arrays.items()}
        return Built(Observation(modalities=tensors), now_s, max(newest) - now_s, arrays, missing)

    def _samples(self, name: str, robot: Robot, joints_s: float) -> Sequence[Sample]:
        """Return what can be used of a stream, with the joints measured at `joints_s`; nothing while it is silent."""
        if self._robot.streams[name].constant:
            return robot.samples(name)
        got = [s for s in robot.samples(name) if s.arrival_s >= max(self._start_s, self._since_s.get(name, -math.inf))]
        if name in self.required:
            return got
        if not got or joints_s - self.clock.time(got[-1]) > self._most_behind_s:
            self._silent.add(name)
            return ()
        if name in self._silent:
            self._silent.remove(name)
            self._since_s[name] = got[-1].arrival_s
        return [s for s in got if s.arrival_s >= self._since_s.get(name, -math.inf)]

    def _frame(
        self,
        moment: float,
        states: Sequence[RobotState],
        times: Sequence[float],
        samples: dict[str, Sequence[Sample]],
        stream_times: dict[str, list[float]],
        missing: Sequence[str],
    ) -> dict[str, NDArray[np.generic]]:
        position, velocity, width, width_velocity = joints_at(moment, states, times)
        values: dict[str, NDArray[np.generic]] = {}
        fingers = np.full(self._fingers, (width or 0.0) / max(1, self._fingers))
        finger_speed = np.full(self._fingers, (width_velocity or 0.0) / max(1, self._fingers))
        values["joints.position"] = np.concatenate([position, fingers])
        values["joints.velocity"] = np.concatenate([velocity, finger_speed]) / self._speed
        values["tcp_pose"] = tool_pose(self._robot, self._chain, position)
        values["grasped"] = np.array([self._grasps(moment, width, states, times)], np.float64)
        for name, found in samples.items():
            at = stream_times.get(name)
            index = len(found) - 1 if at is None else max(0, bisect_right(at, moment + 1e-9) - 1)
            values[name] = found[index].value
        there = {name: spec for name, spec in self._spec.observation.items() if name not in missing}
        return {name: self._modality(modality, values) for name, modality in there.items()}

    def _modality(self, modality: ModalitySpec, values: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        if modality.is_image:
            (path,) = modality.fields
            picture = resize(values[self._robot.observations[path]], modality.shape[1], modality.shape[2])
            return np.ascontiguousarray(np.moveaxis(picture, -1, 0))
        parts = [self._field(path, values) for path in modality.fields]
        return np.concatenate(parts).astype(np.float32)

    def _field(self, path: str, values: dict[str, NDArray[np.generic]]) -> NDArray[np.generic]:
        parts = []
        for name, part in terms(self._robot.observations[path]):
            value = values[name]
            parts.append(value[:3] if part == "position" else value[3:7] if part == "quaternion" else value)
        return parts[0] if len(parts) == 1 else parts[0] - parts[1]  # type: ignore[operator]

    def _grasps(self, moment: float, width: float | None, states: Sequence[RobotState], times: Sequence[float]) -> bool:
        gripper = self._robot.gripper
        if gripper is None or width is None:
            return False
        told = [opening for at, opening in tuple(self._gripper) if at <= moment]
        before = joints_at(moment - STILL_S / self._speed, states, times)[2]
        still = before is not None and abs(width - before) < STILL_M
        return bool(told) and told[-1] == gripper.closed_m and gripper.grasped_above_m < width and still


def joints_at(
    moment: float, states: Sequence[RobotState], times: Sequence[float]
) -> tuple[Floats, Floats, float | None, float | None]:
    """Return position, velocity [J] and the gripper's opening and its velocity at `moment`, interpolated.

    Before the first and after the last state it is that state. Velocities that the robot does not tell are differences.
    """
    index = bisect_right(times, moment)
    if index == 0 or index == len(states):
        state = states[max(0, index - 1)]
        other = states[max(0, index - 2)] if index else states[min(1, len(states) - 1)]
        velocity = state.velocity if state.velocity is not None else _slope(other, state)
        return state.position, velocity, state.gripper_width_m, state.gripper_velocity_m_s
    before, after = states[index - 1], states[index]
    share = (moment - times[index - 1]) / (times[index] - times[index - 1])
    position = before.position + share * (after.position - before.position)
    if before.velocity is not None and after.velocity is not None:
        velocity = before.velocity + share * (after.velocity - before.velocity)
    else:
        velocity = _slope(before, after)
    return (
        position,
        velocity,
        _between(before.gripper_width_m, after.gripper_width_m, share),
        _between(before.gripper_velocity_m_s, after.gripper_velocity_m_s, share),
    )


def tool_pose(robot: RobotFile, chain: Chain, position: Floats) -> Floats:
    """Return the pose [7] of the tool centre in the frame of the observations."""
    base, turn = np.array(robot.frames.base_position_m), robot.frames.base_quaternion
    pose = chain.forward(position)
    q = kinematics.multiply(turn, tuple(pose[3:]))
    return np.array([*(base + np.array(kinematics.rotate(turn, tuple(pose[:3])))), *q])


def resize(picture: NDArray[np.generic], height: int, width: int) -> NDArray[np.generic]:
    """Return `picture` [Y, X, 3] uint8 at another size: the middle part of the right shape, averaged over areas."""
    if picture.shape[:2] == (height, width):
        return picture
    tall, wide = picture.shape[:2]
    scale = min(tall / height, wide / width)
    y, x = round(height * scale), round(width * scale)
    top, left = (tall - y) // 2, (wide - x) // 2
    cut = torch.from_numpy(np.ascontiguousarray(picture[top : top + y, left : left + x])).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(cut, (height, width), mode="area")
    return small[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def _slope(before: RobotState, after: RobotState) -> Floats:
    passed = after.arrival_s - before.arrival_s
    return (after.position - before.position) / passed if passed > 1e-4 else np.zeros_like(after.position)


def _between(before: float | None, after: float | None, share: float) -> float | None:
    return after if before is None or after is None else before + share * (after - before)
