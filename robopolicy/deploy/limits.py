"""The safety filter: the last thing a command passes before it leaves, independent of the policy, compiled.

It moves the last command sent towards the wanted one as far as the limits allow within the time that really passed:

- A wanted position that is not finite, has the wrong length or is further away than a policy can mean is *rejected*:
  the arm brakes to rest along its limits instead. So is any while measured and sent positions lie too far apart.
- Anything else is *clamped*: position (with the room that braking needs), velocity, acceleration, jerk, speed of the
  tool centre, and the box that the tool centre must stay in.

Clamps and rejections are counted by reason. The filter is not a safety device: the arm's own limits and the emergency
stop are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from robopolicy.deploy import limiting
from robopolicy.deploy.contract import Floats
from robopolicy.deploy.kinematics import Chain
from robopolicy.deploy.robot import RobotFile

CLAMPS = ("position", "velocity", "acceleration", "jerk", "tool speed", "workspace")
"""What can be clamped; bit `i` of a clamp mask is the i-th."""
REJECTIONS = ("not finite", "wrong length", "jump", "following error", "first command")
LEAST_SPEED = 0.1
"""Share of the velocity limits at the start of the ramp after arming."""


@dataclass(slots=True)
class Filtered:
    """What the filter made of one wanted position. The arrays are the filter's own and change at its next call."""

    position: Floats
    velocity: Floats
    clamped: int = 0
    rejected: str = ""


@dataclass
class Counts:
    """How often each reason occurred since the filter was built."""

    passed: int = 0
    clamps: dict[str, int] = field(default_factory=lambda: dict.fromkeys(CLAMPS, 0))
    rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REJECTIONS, 0))


class SafetyFilter:
    """Holds what was sent last and lets nothing past the limits of a robot file.

    Args:
        speed: share of real time at which the motion is played, (0, 1]: velocity limits shrink by it, acceleration by
            its square, jerk by its cube, which is what the same path takes when played that much slower.
    """

    def __init__(self, robot: RobotFile, chain: Chain, *, speed: float = 1.0) -> None:
        limits, safety = robot.limits, robot.safety
        self.safety = safety
        self.counts = Counts()
        self.rejections_in_a_row = 0
        self.clamps_in_a_row = 0
        self._dt_s = 1.0 / robot.command.rate_hz
        self._chain = chain
        self._low = np.array(limits.position_low) + safety.position_margin_rad
        self._high = np.array(limits.position_high) - safety.position_margin_rad
        self._velocity = np.array(limits.velocity) * safety.velocity_scale * speed
        self._acceleration = np.array(limits.acceleration) * safety.acceleration_scale * speed**2
        self._jerk = np.array(limits.jerk) * safety.jerk_scale * speed**3
        self._tool_speed = safety.tcp_speed_m_s * speed
        base = np.array([*robot.frames.base_position_m, *robot.frames.base_quaternion])
        self._base = base
        self._box = np.array([safety.workspace_low_m, safety.workspace_high_m])
        joints = len(robot.joints)
        self._last, self._last_velocity, self._last_acceleration = np.zeros((3, joints))
        self._out = Filtered(np.zeros(joints), np.zeros(joints))
        self._work = np.zeros((4, joints))
        self._pose = np.zeros((2, 7))
        self._since_arming_s = 0.0
        self._first = True
        self.reset(np.zeros(joints))
        self.step(np.zeros(joints), np.zeros(joints), np.zeros(joints), self._dt_s)  # compiles
        self.counts = Counts()

    @property
    def last(self) -> Floats:
        """[J] rad: what was sent last."""
        return self._last

    def reset(self, measured: Floats, *, ramp: bool = True) -> None:
        """Start anew at rest at the `measured` position [J], with the ramp or at full speed."""
        self._last[:] = measured
        self._last_velocity[:] = 0.0
        self._last_acceleration[:] = 0.0
        self._since_arming_s, self._first = 0.0 if ramp else self.safety.ramp_in_s, True
        self.rejections_in_a_row = self.clamps_in_a_row = 0

    def step(
        self,
        wanted: Floats,
        wanted_velocity: Floats,
        measured: Floats,
        dt_s: float,
        *,
        target: Floats | None = None,
    ) -> Filtered:
        """Return what may be sent now.

        Args:
            wanted: where the policy wants the arm to be one turn from now, rad.
            wanted_velocity: [J] rad/s, how fast the wanted position moves.
            measured: [J] rad.
            target: [J] rad, where the wanted motion leads; None: `wanted` itself. Jumps are told by it, too.
            dt_s: time since the last call, on the monotonic clock. No more than two command periods are used: after a
                pause the arm does not catch up by a leap.
        """
        out = self._out
        dt_s = min(max(dt_s, 0.2 * self._dt_s), 2.0 * self._dt_s)
        goal = wanted if target is None else target
        out.rejected = self._why_not(wanted, goal, wanted_velocity, measured)
        if out.rejected:
            self.counts.rejections[out.rejected] += 1
            self.rejections_in_a_row += 1
            self._move(self._last, True, dt_s)
            return out
        ramp = self.safety.ramp_in_s
        share = 1.0 if ramp <= 0.0 else min(1.0, LEAST_SPEED + (1.0 - LEAST_SPEED) * self._since_arming_s / ramp)
        self._since_arming_s += dt_s
        self._first = False
        self.rejections_in_a_row = 0
        self._work[3] = wanted_velocity
        out.clamped = self._move(wanted, False, dt_s, share)
        self.clamps_in_a_row = self.clamps_in_a_row + 1 if out.clamped else 0
        self._count(out.clamped)
        return out

    def brake(self, dt_s: float) -> Filtered:
        """Return the next command on the way to rest; nothing is wanted and nothing counted."""
        self._out.rejected = ""
        self._out.clamped = 0
        self._move(self._last, True, min(max(dt_s, 0.2 * self._dt_s), 2.0 * self._dt_s))
        return self._out

    @property
    def why_stop(self) -> str:
        """Say why the arm should stop for good, in words; empty while there is no reason."""
        safety = self.safety
        if safety.stop_after_rejections and self.rejections_in_a_row >= safety.stop_after_rejections:
            return f"{self.rejections_in_a_row} commands in a row were rejected: {self._out.rejected}"
        if safety.stop_after_clamps and self.clamps_in_a_row >= safety.stop_after_clamps:
            return f"{self.clamps_in_a_row} commands in a row were clamped: {', '.join(clamp_names(self._out.clamped))}"
        return ""

    def _why_not(self, wanted: Floats, goal: Floats, wanted_velocity: Floats, measured: Floats) -> str:
        count = self._last.shape
        if {wanted.shape, goal.shape, wanted_velocity.shape, measured.shape} != {count}:
            return "wrong length"
        safety, last = self.safety, self._last
        why = limiting.check(wanted, goal, wanted_velocity, measured, last, safety.jump_rad, safety.following_error_rad)
        if not why and self._first and limiting.distance(self._last, measured) > self.safety.first_command_rad:
            return "first command"
        return ("", "not finite", "jump", "following error")[why]

    def _move(self, wanted: Floats, braking: bool, dt_s: float, share: float = 1.0) -> int:
        if braking:
            self._work[3] = 0.0
        chain = self._chain
        clamped = limiting.limit(
            wanted,
            self._work[3],
            braking,
            dt_s,
            share,
            self._low,
            self._high,
            self._velocity,
            self._acceleration,
            self._jerk,
            self._tool_speed,
            self._box,
            self._base,
            chain.origins,
            chain.rolls,
            chain.tool_yaw,
            self._last,
            self._last_velocity,
            self._last_acceleration,
            self._work,
            self._pose,
        )
        self._out.position[:] = self._last
        self._out.velocity[:] = self._last_velocity
        return int(clamped)

    def _count(self, clamped: int) -> None:
        self.counts.passed += 1
        if clamped:
            for i, name in enumerate(CLAMPS):
                self.counts.clamps[name] += clamped >> i & 1


def clamp_names(mask: int) -> list[str]:
    """Return the reasons in a clamp mask."""
    return [name for i, name in enumerate(CLAMPS) if mask >> i & 1]
