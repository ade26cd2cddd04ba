"""The controller loop: one turn per command period on a monotonic clock, waiting for neither network nor policy.

A turn reads the newest state, asks the watchdogs, looks up the action that is due, turns it into a joint target, moves
the command towards the target, filters it and hands it to the robot. With nothing due it brakes and holds; with
something wrong it stops.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from robopolicy.deploy import watchdog
from robopolicy.deploy.contract import Floats, Recorder, Robot, RobotState, Tick
from robopolicy.deploy.limits import SafetyFilter
from robopolicy.deploy.observations import ObservationBuilder, joints_at
from robopolicy.deploy.playback import Playlist, Slot, TimedPlan
from robopolicy.deploy.realtime import put_first
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.runner import PolicyRunner
from robopolicy.deploy.semantics import ActionConverter, GripperLogic
from robopolicy.deploy.watchdog import Vitals

STATUS_S = 0.2
"""Period of the heartbeat."""
MOST_LAG_TURNS, MOVED_RAD = 50, 0.05
KEPT_TURNS = 1 << 19
"""Of how many turns the lateness is kept: an hour and a half at 100 Hz."""


@dataclass
class LoopStats:
    """What the loop saw of itself."""

    turns: int = 0
    missed: int = 0
    """Deadlines that were left out because the loop was more than a period late."""
    late_s: Floats = field(default_factory=lambda: np.zeros(KEPT_TURNS, np.float32))
    work_s: Floats = field(default_factory=lambda: np.zeros(KEPT_TURNS, np.float32))
    missed_without_cpu: int = 0
    """Of these, those before which this process got the processor for less than half of the time: a busy machine."""
    holds: int = 0
    seams_rad: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Jump of the joint target at each new plan, against what the plan before wanted of the same moment."""
    unreached: int = 0
    """Goals that inverse kinematics did not reach; the arm kept its position."""
    boxed: int = 0
    """Goals that lay outside the workspace and were moved to its edge."""
    followed: deque[tuple[Floats, Floats]] = field(default_factory=lambda: deque(maxlen=4096))
    """What was sent and where the arm was, turn by turn."""
    shadow_rad: deque[float] = field(default_factory=lambda: deque(maxlen=65536))
    """Shadow mode: largest joint distance between what was proposed for a moment and where the arm was then."""

    def recent_late_s(self) -> Floats:
        """Return the lateness of the last few seconds' turns."""
        end = self.turns % KEPT_TURNS
        return self.late_s[max(0, end - 500) : end]

    def following_turns(self) -> int | None:
        """Return by how many turns the arm follows what is sent, from the last motion; None where nothing moved."""
        if len(self.followed) < 2 * MOST_LAG_TURNS:
            return None
        sent, measured = (np.array(side) for side in zip(*self.followed, strict=True))
        if np.ptp(sent, axis=0).max() < MOVED_RAD:
            return None
        count = len(sent) - MOST_LAG_TURNS
        gaps = [np.abs(measured[d : d + count] - sent[:count]).mean() for d in range(MOST_LAG_TURNS)]
        return int(np.argmin(gaps))

    def jitter_ms(self) -> dict[str, float]:
        """Return median, p99 and most lateness in ms."""
        kept = self.late_s[: min(self.turns, KEPT_TURNS)]
        if not len(kept):
            return {"median": 0.0, "p99": 0.0, "max": 0.0}
        median, p99 = np.percentile(kept, (50, 99))
        return {"median": 1e3 * float(median), "p99": 1e3 * float(p99), "max": 1e3 * float(kept.max())}


class ControlLoop:
    """Drives one robot; `run` is the body of its thread, `turn` one period, without any waiting.

    Args:
        send: False computes everything and sends nothing (`mode=shadow`).
        seam_blend_s: time over which the jump of the target at a new plan is faded out.
        on_stop: called with the reason when something is wrong. It must stop the robot and call `halt`.
    """

    def __init__(
        self,
        robot: Robot,
        file: RobotFile,
        *,
        safety: SafetyFilter,
        converter: ActionConverter,
        gripper: GripperLogic | None,
        builder: ObservationBuilder,
        playlist: Playlist,
        runner: PolicyRunner,
        speed: float,
        send: bool,
        seam_blend_s: float,
        on_stop: Callable[[str], None],
        status: Callable[[], dict[str, Any]],
        recorders: Sequence[Recorder] = (),
    ) -> None:
        self.phase = "disarmed"
        self.stats = LoopStats()
        self.vitals = Vitals()
        self.safety = safety
        self._recorders = recorders
        self._robot, self._file = robot, file
        self._converter, self._gripper, self._builder = converter, gripper, builder
        self._playlist, self._runner = playlist, runner
        self._period_s = 1.0 / file.command.rate_hz
        self._lag_s = max(0.0, file.trained_lag_s / speed - file.arm_lag_s)
        self._seam_blend_s = seam_blend_s
        self._send = send
        self._on_stop, self._status = on_stop, status
        joints = len(file.joints)
        self._target, self._wanted, self._velocity, self._seam = np.zeros((4, joints))
        self._slot: Slot | None = None
        self._targets: deque[tuple[float, Floats]] = deque(maxlen=64)
        self._seam_at_s = -math.inf
        self._generation: int | None = None
        self._last_turn_s = self._status_at_s = -math.inf
        self._last_state: RobotState | None = None
        self._closed = threading.Event()
        self._lock = threading.RLock()  # a signal's stop may come while this very thread arms

    # ---- from other threads ------------------------------------------------------------------------------------------
    def arm(self, measured: Floats) -> None:
        """Begin to follow the playlist from the `measured` position [J], at rest."""
        with self._lock:
            self.safety.reset(measured)
            self._target[:] = measured
            self._seam[:] = 0.0
            self._slot = None
            self._targets.clear()
            if self._gripper is not None:
                self._gripper.reset()
            self._generation = self._robot.link().generation
            self.phase = "waiting"

    def halt(self, phase: str) -> None:
        """Send nothing from now on; `phase` says why."""
        with self._lock:
            self.phase = phase

    def close(self) -> None:
        self._closed.set()

    # ---- the thread --------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Turn at every period until closed. Deadlines that passed are left out, not caught up with."""
        put_first()
        deadline_s, cpu_s = time.monotonic(), time.process_time()
        try:
            while not self._closed.is_set():
                now_s = time.monotonic()
                if now_s < deadline_s:
                    time.sleep(deadline_s - now_s)
                    now_s = time.monotonic()
                late_s = now_s - deadline_s
                self.turn(now_s, late_s)
                missed = int(late_s / self._period_s)
                used_s, cpu_s = time.process_time() - cpu_s, time.process_time()
                self.stats.missed += missed
                self.stats.missed_without_cpu += missed if used_s < 0.5 * late_s else 0
                deadline_s += (1 + missed) * self._period_s
        except Exception as error:  # whatever it is: without a loop the arm must stop
            self._on_stop(f"the control loop failed: {type(error).__name__}: {error}")
            raise

    def turn(self, now_s: float, late_s: float = 0.0) -> None:
        """Do one period's work at `now_s`."""
        state = self._robot.state()
        if state is not None and state is not self._last_state:
            self._builder.clock.note(state.stamp_s, state.arrival_s)
            self._last_state = state
        self._take_vitals(now_s, late_s, state)
        dt_s, self._last_turn_s = now_s - self._last_turn_s, now_s
        with self._lock:
            tick = self._act(now_s, dt_s, late_s, state)
        reason = ""
        if self.phase in ("waiting", "moving", "holding"):
            reason = watchdog.why_stop(self.vitals, self._file.watchdogs, generation=self._generation)
            reason = reason or (self.safety.why_stop if self._send else "")
        if reason:
            self._on_stop(reason)
        index = self.stats.turns % KEPT_TURNS
        work_s = time.monotonic() - now_s
        self.stats.late_s[index], self.stats.work_s[index] = late_s, work_s
        self.stats.turns += 1
        for recorder in self._recorders:
            recorder.tick(tick(work_s))
        if now_s - self._status_at_s >= STATUS_S:
            self._status_at_s = now_s
            self._robot.publish_status(self._status())

    def _take_vitals(self, now_s: float, late_s: float, state: RobotState | None) -> None:
        vitals, clock = self.vitals, self._builder.clock
        vitals.state_age_s = math.inf if state is None else now_s - min(clock.time(state), state.arrival_s)
        vitals.late_s, vitals.link, vitals.clock_jumped = late_s, self._robot.link(), clock.jumped
        vitals.inferring_s, vitals.spread_s = self._runner.inferring_s(now_s), self._runner.spread_s
        vitals.observation_age_s, vitals.stream = 0.0, ""
        for name in self._builder.moving_streams:
            if name not in self._builder.required:
                continue
            samples = self._robot.samples(name)
            age = now_s - clock.time(samples[-1]) if samples else math.inf
            if age > vitals.observation_age_s:
                vitals.observation_age_s, vitals.stream = age, name

    def _act(self, now_s: float, dt_s: float, late_s: float, state: RobotState | None) -> Callable[[float], Tick]:
        """Follow the playlist for one period and return what makes the record of it."""
        sent = sent_velocity = action = wanted = opening = None
        clamped, rejected = 0, ""
        if self.phase in ("waiting", "moving", "holding") and state is not None and self._fresh(state, now_s):
            slot = self._playlist.slot(now_s)
            if slot is not None:
                self.phase = "moving"
                opening = self._follow(slot, now_s, state)
                self._shape(now_s, dt_s)
                wanted, action = self._wanted.copy(), slot.action
                out = self.safety.step(self._wanted, self._velocity, state.position, dt_s, target=self._target)
            else:
                self.phase = "waiting" if self.phase == "waiting" else "holding"
                self.stats.holds += self.phase == "holding"
                if not self._send and state is not None:
                    self._compare_shadow(state.position)
                self._slot = None
                out = self.safety.brake(dt_s)
            clamped, rejected = out.clamped, out.rejected
            if self._send and not self.safety.why_stop:
                sent, sent_velocity = out.position.copy(), out.velocity.copy()
                self._robot.send(sent, sent_velocity, opening)
                self.stats.followed.append((sent, state.position))
        phase, age_s, index = self.phase, self.vitals.state_age_s, self.stats.turns
        measured = None if state is None else state.position

        def record(work_s: float) -> Tick:
            return Tick(
                time_s=now_s,
                index=index,
                late_s=late_s,
                work_s=work_s,
                phase=phase,
                measured=measured,
                state_age_s=age_s,
                wanted=wanted,
                sent=sent,
                sent_velocity=sent_velocity,
                gripper=opening,
                action=action,
                clamped=clamped,
                rejected=rejected,
            )

        return record

    def _fresh(self, state: RobotState, now_s: float) -> bool:
        return self.vitals.state_age_s <= self._file.watchdogs.state_age_s

    # ---- from actions to commands ------------------------------------------------------------------------------------
    def _follow(self, slot: Slot, now_s: float, state: RobotState) -> float | None:
        """Take up `slot` if it is new; return the opening to command to the gripper, if any."""
        old = self._slot
        if old is not None and old.plan is slot.plan and old.index == slot.index:
            return None
        states = self._robot.states()
        times = [self._builder.clock.time(s) for s in states]
        measured = joints_at(slot.due_s, states, times)[0] if states else state.position
        new_plan = old is None or old.plan is not slot.plan
        target = self._target_of(slot, measured, new_plan)
        if new_plan and old is not None:
            self._note_seam(old.plan, target, measured, now_s)
        if not self._send:
            self._compare_shadow(state.position)
            self.safety.reset(state.position, ramp=False)
        self._target[:] = target
        self._targets.append((slot.due_s, target))
        self._slot = slot
        if self._gripper is None:
            return None
        opening = self._gripper(float(slot.action[-1]), now_s)
        if opening is not None:
            self._builder.commanded(opening, now_s)
        return opening

    def _target_of(self, slot: Slot, measured: Floats, new_plan: bool) -> Floats:
        """Return the joint target of `slot`, with the increments before it where they add up."""
        first, before = slot.index, self._target
        if self._converter.delta_from == "target":
            if new_plan:
                first, before = 0, self._target_before(slot.plan.start_s)
            else:
                assert self._slot is not None
                first = self._slot.index + 1
        for index in range(first, slot.index + 1):
            target = self._converter(slot.plan.actions[index], measured, before)
            before = target.position
        self.stats.unreached += not target.reached
        self.stats.boxed += target.boxed
        return before

    def _target_before(self, time_s: float) -> Floats:
        """Return the target that was in force when the plan from `time_s` on was made."""
        for due_s, target in reversed(self._targets):
            if due_s < time_s - 1e-6:
                return target
        return self._targets[0][1] if self._targets else self._target

    def _note_seam(self, before: TimedPlan, target: Floats, measured: Floats, now_s: float) -> None:
        """Measure how far a new plan's target lies from what the plan before wanted of the same moment, and fade it."""
        index = before.index(now_s)
        if index >= len(before.actions) or self._converter.delta_from == "target":
            return
        seam = self._converter(before.actions[index], measured, self._target).position - target
        self.stats.seams_rad.append(float(np.abs(seam).max()))
        self._seam[:], self._seam_at_s = seam, now_s

    def _compare_shadow(self, measured: Floats) -> None:
        if self._slot is not None:
            self.stats.shadow_rad.append(float(np.abs(self.safety.last - measured).max()))

    def _shape(self, now_s: float, dt_s: float) -> None:
        """Write where the command should be one period from now, and how fast, into `_wanted` and `_velocity`.

        With a lag, the command approaches the target as ManiSkill's drives would; without, it goes there in a straight
        line over the control period.
        """
        assert self._slot is not None
        step_s = min(max(dt_s, 0.2 * self._period_s), 2.0 * self._period_s)
        target = self._target
        if self._seam_blend_s > 0.0 and now_s < self._seam_at_s + self._seam_blend_s:
            target = target + self._seam * (1.0 - (now_s - self._seam_at_s) / self._seam_blend_s)
        last = self.safety.last
        if self._lag_s > 0.0:
            share = 1.0 - math.exp(-step_s / self._lag_s)
        else:
            left_s = self._slot.due_s + self._slot.plan.period_s - now_s
            share = min(1.0, step_s / max(left_s, step_s))
        np.subtract(target, last, out=self._velocity)
        self._velocity *= share / step_s
        np.multiply(self._velocity, step_s, out=self._wanted)
        self._wanted += last
