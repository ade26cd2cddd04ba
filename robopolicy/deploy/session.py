"""One deployment: the parts put together, armed, stopped and armed again.

A stop latches: whatever it was, nothing moves until a person (or a script that says so) arms the robot again, and then
from fresh observations, an empty playlist and the measured position.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from robopolicy.deploy.contract import Plan, Recorder, Robot
from robopolicy.deploy.kinematics import find_chain
from robopolicy.deploy.limits import SafetyFilter
from robopolicy.deploy.loop import ControlLoop
from robopolicy.deploy.observations import ObservationBuilder
from robopolicy.deploy.playback import Playlist
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.runner import EXECUTORS, Executor, PolicyRunner
from robopolicy.deploy.semantics import ActionConverter, find_gripper, require_fit
from robopolicy.errors import RobopolicyError, UnknownNameError
from robopolicy.policies.planners import Planner
from robopolicy.timing import ChunkTiming

Mode = Literal["shadow", "step", "live"]
SILENCE_STOPS = ("joint_trajectory", "follow_joint_trajectory")
"""Interfaces whose commands end at rest, so that silence means stop."""
SWITCH_S = 5e-4
"""How long Python lets another thread run on while the loop waits; its own default is ten times as long."""


class Session:
    """Implements `contract.Commands`.

    Args:
        robot: connected.
        planner: for one robot; its policy in evaluation mode.
        mode: shadow sends nothing; step asks `confirm` before each chunk; live plays.
        n_action_steps: of a chunk, before the next is wanted; None takes the planner's.
        speed: share of real time at which the policy's motion is played, (0, 1].
        optional: modalities of the observation that the policy can do without; see `Policy.optional`.
        force: run a streaming controller without a command timeout of its own all the same.

    Raises:
        SpecMismatchError: the planner's task does not fit the robot file; lists the differences.
        RobopolicyError: a setting that cannot work or is not safe.
    """

    def __init__(
        self,
        robot: Robot,
        file: RobotFile,
        planner: Planner,
        *,
        mode: Mode = "live",
        executor: Executor = "rti",
        n_action_steps: int | None = None,
        speed: float = 1.0,
        seam_blend_s: float = 0.0,
        ensemble_decay: float = 0.01,
        optional: frozenset[str] = frozenset(),
        force: bool = False,
        recorders: Sequence[Recorder] = (),
        confirm: Callable[[Plan], bool] | None = None,
    ) -> None:
        spec, timing = planner.spec, planner.timing
        steps = timing.n_action_steps if n_action_steps is None else n_action_steps
        require_fit(spec, file)
        _require_settings(timing, executor, steps, speed)
        if mode == "live":
            require_timeout(file, force=force)
        self.mode, self.file, self.speed = mode, file, speed
        self.executor: Executor = "sync" if mode == "step" else executor
        self.stop_reason = ""
        """Why the robot stopped; empty while it has not."""
        self.stopped = threading.Event()
        self.episode = ""
        """What is being done, for people."""
        self._robot, self._recorders = robot, list(recorders)
        self._seed = 0
        self._stopping = threading.RLock()
        chain, period_s = find_chain(file.kinematics), spec.action.control_dt_s / speed
        self.playlist = Playlist()
        self.builder = ObservationBuilder(
            spec, file, chain, n_obs_steps=timing.n_obs_steps, period_s=period_s, speed=speed, optional=optional
        )
        self.runner = PolicyRunner(
            planner,
            self.builder,
            self.playlist,
            robot,
            executor=self.executor,
            n_action_steps=steps,
            speed=speed,
            on_fault=self.stop,
            recorders=self._recorders,
            confirm=confirm if mode == "step" else None,
            ensemble_decay=ensemble_decay,
        )
        self.loop = ControlLoop(
            robot,
            file,
            safety=SafetyFilter(file, chain, speed=speed),
            converter=ActionConverter(spec.action, file, chain),
            gripper=find_gripper(spec.action, file),
            builder=self.builder,
            playlist=self.playlist,
            runner=self.runner,
            speed=speed,
            send=mode != "shadow",
            seam_blend_s=seam_blend_s,
            on_stop=self.stop,
            status=self.snapshot,
            recorders=self._recorders,
        )
        self._thread = threading.Thread(target=self.loop.run, name="control", daemon=True)
        robot.listen(on_stop=lambda reason: self.stop(f"emergency stop from ROS: {reason}"))

    def add_recorder(self, recorder: Recorder) -> None:
        """Tell `recorder` of all that happens from now on; before `open`."""
        self._recorders.append(recorder)

    def open(self) -> None:
        """Start the threads; nothing moves before `begin`."""
        self.runner.open()
        if self.stopped.is_set():
            raise RobopolicyError(self.stop_reason[0].upper() + self.stop_reason[1:] + ".")
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(min(self._switch_s, SWITCH_S))
        self._thread.start()

    def begin(self, seed: int = 0) -> str:
        """Arm the robot and play the policy from now on, its noise from `seed`; return why not, empty if it does."""
        if why := self._why_not_ready():
            return why
        state = self._robot.state()
        assert state is not None
        self.builder.clock.reset()
        self.builder.clock.note(state.stamp_s, state.arrival_s)
        self._seed = seed
        self.stop_reason = ""
        self.stopped.clear()
        if self.mode != "shadow":
            self._robot.rearm()
        self._event("start", "armed", seed=seed)
        self._event("reset", "the policy remembers nothing")
        self.loop.arm(state.position)
        self.runner.start(seed)
        if self.stopped.is_set():  # a stop that came while this armed has the last word
            self.stop(self.stop_reason)
        return self.stop_reason

    def begin_within(self, timeout_s: float, seed: int = 0) -> str:
        """`begin` as soon as the robot is ready; return why not after `timeout_s`."""
        until_s = time.monotonic() + timeout_s
        while (why := self.begin(seed)) and time.monotonic() < until_s:
            time.sleep(0.02)
        return why

    def end(self) -> None:
        """Stop playing; the robot holds where it is. No fault: nothing is latched."""
        self.loop.halt("disarmed")
        self.runner.pause()
        if self.mode != "shadow" and self._robot.armed:
            self._robot.stop("the episode is over")
        self._event("end", "disarmed")

    def stop(self, reason: str) -> None:
        """Stop the robot now and latch; from any thread. The first reason is kept."""
        if self.mode != "shadow":
            self._robot.stop(reason)
        self.loop.halt("stopped")
        with self._stopping:
            first = not self.stopped.is_set()
            if first:
                self.stop_reason = reason
                self.stopped.set()
        self.runner.interrupt()
        if first:
            self._event("stop", reason)

    def rearm(self) -> str:
        """Leave a latched stop; return why not, empty if the robot moves again."""
        if not self.stopped.is_set():
            return "the robot is not stopped"
        why = self.begin(self._seed)
        if not why:
            self._event("rearm", "armed again")
        return why

    def close(self) -> None:
        """Stop the robot if it is armed, and end the threads. The robot's connection stays the caller's."""
        self.loop.halt("stopped")
        if self.mode != "shadow" and self._robot.armed:
            self._robot.stop("deploy ends")
        self.runner.close()
        self.loop.close()
        if self._thread.ident is not None:
            self._thread.join(2.0)
            sys.setswitchinterval(self._switch_s)

    def snapshot(self) -> dict[str, Any]:
        """Return plain JSON values: what the heartbeat and a live view show. Cheap: the loop calls it."""
        loop, runner, vitals = self.loop, self.runner, self.loop.vitals
        counts, state, link = loop.safety.counts, self._robot.state(), self._robot.link()
        late_s = loop.stats.recent_late_s()
        return {
            "phase": loop.phase,
            "reason": self.stop_reason,
            "mode": self.mode,
            "executor": self.executor,
            "armed": self._robot.armed,
            "episode": self.episode,
            "waiting_for": runner.waiting_for,
            "missing": ", ".join(runner.missing),
            "diagnostics": {name: _finite(values[-1]) for name, values in list(runner.diagnostics.items())},
            "speed": self.speed,
            "rate_hz": self.file.command.rate_hz,
            "turns": loop.stats.turns,
            "overruns": loop.stats.missed,
            "jitter_p99_s": float(np.percentile(late_s, 99)) if len(late_s) else None,
            "plans": runner.plans,
            "state_age_s": _finite(vitals.state_age_s),
            "observation_age_s": _finite(vitals.observation_age_s),
            "spread_s": vitals.spread_s,
            "inference_s": runner.latencies_s[-1] if runner.latencies_s else None,
            "inference_p95_s": runner.recent_p95_s(),
            "underruns": self.playlist.underruns,
            "passed": counts.passed,
            "clamps": dict(counts.clamps),
            "rejections": dict(counts.rejections),
            "link": "connected" if link.connected else link.detail or "down",
            "ping_s": link.ping_s,
            "generation": link.generation,
            "joints": list(self.file.joints),
            "measured": None if state is None else state.position.tolist(),
            "sent": loop.safety.last.tolist(),
            "gripper_width_m": None if state is None else state.gripper_width_m,
        }

    def summary(self) -> dict[str, Any]:
        """Return what a whole session amounts to, in plain JSON values."""
        stats, runner = self.loop.stats, self.runner
        return {
            "turns": stats.turns,
            "missed_deadlines": stats.missed,
            "missed_without_cpu": stats.missed_without_cpu,
            "jitter_ms": stats.jitter_ms(),
            "plans": runner.plans,
            "inference_ms": _spread_ms(runner.latencies_s),
            "observation_age_ms": _spread_ms(runner.observed_ages_s),
            "skipped_actions_per_plan": float(np.mean(runner.skipped)) if runner.skipped else 0.0,
            "missed_plans": runner.missed_periods,
            "plans_without": dict(runner.without),
            "diagnostics": {
                name: _spread(finite)
                for name, values in runner.diagnostics.items()
                if (finite := [v for v in values if math.isfinite(v)])
            },
            "underruns": self.playlist.underruns,
            "holds": stats.holds,
            "seam_rad": _spread(stats.seams_rad),
            "arm_lag_s": None if (turns := stats.following_turns()) is None else turns / self.file.command.rate_hz,
            "unreached_goals": stats.unreached,
            "goals_moved_into_workspace": stats.boxed,
            "filter_passed": self.loop.safety.counts.passed,
            "filter_clamps": dict(self.loop.safety.counts.clamps),
            "filter_rejections": dict(self.loop.safety.counts.rejections),
            "shadow_rad": _spread(stats.shadow_rad),
            "stop_reason": self.stop_reason,
        }

    def _why_not_ready(self) -> str:
        link, state = self._robot.link(), self._robot.state()
        if not link.connected:
            return f"the link to the robot is down{': ' + link.detail if link.detail else ''}"
        if state is None:
            problems = [report.problem for report in self._robot.reports() if report.problem]
            return "no joint states yet" + (f": {'; '.join(problems)}" if problems else "")
        age_s = time.monotonic() - state.arrival_s
        if age_s > self.file.watchdogs.state_age_s:
            return f"the newest joint state is {age_s:.2f} s old"
        for name in self.builder.required:
            samples = self._robot.samples(name)
            stream = self.file.streams[name]
            if not samples:
                return f"nothing yet on stream {name!r} ({stream.topic})"
            age_s = time.monotonic() - samples[-1].arrival_s
            if not stream.constant and age_s > self.file.watchdogs.observation_age_s:
                return f"the newest sample of stream {name!r} is {age_s:.2f} s old"
        return ""

    def _event(self, kind: str, text: str, **data: Any) -> None:
        for recorder in self._recorders:
            recorder.event(kind, text, **data)


def _require_settings(timing: ChunkTiming, executor: str, n_action_steps: int, speed: float) -> None:
    most = timing.horizon - timing.now
    if executor not in EXECUTORS:
        raise UnknownNameError("executor", executor, EXECUTORS)
    if not 0.0 < speed <= 1.0:
        raise RobopolicyError(f"speed must be in (0, 1]; got {speed:g}.")
    if not 1 <= n_action_steps <= most:
        raise RobopolicyError(
            f"n_action_steps must be in [1, {most}] for horizon={timing.horizon}; got {n_action_steps}."
        )


def require_timeout(file: RobotFile, *, force: bool) -> None:
    """Refuse a controller that goes on for ever when the client vanishes, unless `force`.

    Raises:
        RobopolicyError: says what to set.
    """
    command = file.command
    if command.interface in SILENCE_STOPS or command.timeout_s > 0.0 or force:
        return
    raise RobopolicyError(
        f"Robot file {file.name!r}: the {command.interface} controller at {command.topic} has no command timeout, so "
        "it would go on with the last command if this process or the link died. Set the controller's timeout and say "
        "so in command.timeout_s, use interface joint_trajectory, or pass force=true if something else stops the arm."
    )


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keep Python's garbage collector from walking over all that exists now while the loop runs."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not len(values):
        return None
    median, p95 = np.percentile(np.asarray(values), (50, 95))
    return {"median": float(median), "p95": float(p95), "max": float(max(values))}


def _spread_ms(values_s: Sequence[float]) -> dict[str, float] | None:
    return _spread([1e3 * value for value in values_s])
