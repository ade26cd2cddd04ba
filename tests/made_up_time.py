"""Deployment in made-up time: session, loop and runner as they are, a physics step per turn, delays as one chooses.

Nothing runs in threads and nothing waits, so the outcome does not depend on the machine's load.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ideal_arm
import pytest
import scripted_planner
import torch
from ideal_arm import IdealArm, Memory, panda
from scripted_planner import ScriptedPlanner

from robopolicy.deploy import loop, runner, session
from robopolicy.deploy.contract import Floats, LinkStatus, RobotState, Sample, StreamReport
from robopolicy.deploy.playback import TimedPlan
from robopolicy.deploy.session import Session

if TYPE_CHECKING:
    from robopolicy.envs.stepping import SteppedRobot

DT = 0.01


class Clock:
    """Stands for the module `time` in the modules of deployment; processor time passes as `work` says."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.cpu_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s + 1e9

    def process_time(self) -> float:
        return self.cpu_s

    def sleep(self, seconds: float) -> None:
        raise AssertionError("nothing waits in made-up time")

    def work(self, seconds: float, *, cpu: float = 1.0) -> None:
        """Let time pass, of which this process gets the processor for the share `cpu`."""
        self.now_s += seconds
        self.cpu_s += cpu * seconds

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (loop, runner, session, ideal_arm, scripted_planner):
            monkeypatch.setattr(module, "time", self)


class Stage:
    """A session on an ideal arm that follows at once. While the planner thinks, the arm and the loop go on."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        planner: ScriptedPlanner,
        *,
        streams: Mapping[str, Floats] | None = None,
        file: Any = None,
        **settings: Any,
    ) -> None:
        self.clock = Clock()
        self.clock.install(monkeypatch)
        self.clock.sleep = self._let_pass  # type: ignore[method-assign]
        self.memory = Memory()
        self.planner, self.arm = planner, IdealArm(streams=streams)
        self.session = Session(self.arm, file or panda(), planner, recorders=[self.memory], **settings)
        self.session.builder.clock.reset()
        self.arm.publish(self.clock.now_s)

    def begin(self) -> None:
        assert self.session.begin() == ""

    def run(self, until: Callable[[], bool], *, limit_s: float = 20.0) -> float:
        """Go on until the condition holds; return how long it took, in made-up time."""
        begun_s = self.clock.now_s
        while not until():
            assert self.clock.now_s < begun_s + limit_s, self.session.snapshot()
            if self.session.runner._running.is_set():
                self.session.runner._turn()
            self._turn()
        return self.clock.now_s - begun_s

    def run_for(self, seconds: float) -> None:
        end_s = self.clock.now_s + seconds - 1e-9
        self.run(lambda: self.clock.now_s >= end_s, limit_s=2 * seconds)

    def _let_pass(self, seconds: float) -> None:
        for _ in range(round(seconds / DT)):
            self._turn()

    def _turn(self) -> None:
        self.arm.publish(self.clock.now_s)
        self.session.loop.turn(self.clock.now_s)
        self.clock.work(DT)


class DelayedRobot:
    """Implements `contract.Robot` on a simulation that is stepped by hand."""

    def __init__(self, sim: SteppedRobot, clock: Clock, *, command_s: float, state_s: float) -> None:
        self.sim, self.clock, self.command_s, self.state_s = sim, clock, command_s, state_s
        self.armed = False
        self.reset(0)

    def reset(self, seed: int) -> None:
        self.sim.reset(seed)
        self.succeeded = False
        self._states: deque[RobotState] = deque(maxlen=100)
        self._samples: dict[str, deque[Sample]] = {n: deque(maxlen=100) for n in ("obj_pose", "goal_pos")}
        self._commands: deque[tuple[float, Floats, float | None]] = deque()
        self._measured: deque[tuple[RobotState, dict[str, Sample]]] = deque()
        self._target, self._finger_m = self.sim.position()[:7].copy(), 0.04
        for _ in range(3):
            self._measure()
            self.clock.now_s += DT

    def step(self) -> None:
        now_s = self.clock.now_s
        while self._commands and self._commands[0][0] <= now_s + 1e-9:
            _, self._target, opening = self._commands.popleft()
            self._finger_m = self._finger_m if opening is None else opening / 2
        self.sim.drive(self._target, self._finger_m)
        self.sim.step()
        self.succeeded |= self.sim.success
        self.clock.now_s += DT
        self._measure()

    def _measure(self) -> None:
        q, v, extras, now_s = self.sim.position(), self.sim.velocity(), self.sim.extras(), self.clock.now_s
        times: dict[str, float] = {"stamp_s": now_s - 500.0, "arrival_s": now_s + self.state_s}
        state = RobotState(
            **times, position=q[:7], velocity=v[:7], gripper_width_m=q[7] + q[8], gripper_velocity_m_s=v[7] + v[8]
        )
        self._measured.append((state, {n: Sample(**times, value=extras[n]) for n in self._samples}))
        while self._measured and self._measured[0][0].arrival_s <= now_s + 1e-9:
            state, samples = self._measured.popleft()
            self._states.append(state)
            for name, sample in samples.items():
                self._samples[name].append(sample)

    def state(self) -> RobotState | None:
        return self._states[-1] if self._states else None

    def states(self) -> Sequence[RobotState]:
        return list(self._states)

    def samples(self, stream: str) -> Sequence[Sample]:
        return list(self._samples[stream])

    def send(self, position: Floats, velocity: Floats, gripper: float | None) -> None:
        self._commands.append((self.clock.now_s + self.command_s, position.copy(), gripper))

    def stop(self, reason: str) -> None:
        self.armed = False

    def rearm(self) -> None:
        self.armed = True

    def link(self) -> LinkStatus:
        return LinkStatus(connected=True, data_age_s=0.0, ping_s=0.0, generation=1)

    def reports(self) -> Sequence[StreamReport]:
        return []

    def call(self, service: str, request: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        raise NotImplementedError

    def listen(self, *, on_stop: Callable[[str], None]) -> None: ...
    def publish_status(self, status: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


def play(session: Session, robot: DelayedRobot, seed: int, *, inference_s: float, limit_s: float = 5.0) -> bool:
    """Play the episode of `seed`; return whether it succeeded."""
    robot.reset(seed)
    clock, runner, playlist = robot.clock, session.runner, session.playlist
    publish, waiting = playlist.publish, deque[tuple[float, TimedPlan]]()
    playlist.publish = lambda plan: waiting.append((clock.now_s + inference_s, plan))  # type: ignore[method-assign]
    assert session.begin(seed) == ""
    try:
        for _ in range(round(limit_s / DT)):
            with torch.no_grad():
                if not waiting:
                    runner._turn()
            if waiting and waiting[0][0] <= clock.now_s + 1e-9:
                plan = waiting.popleft()[1]
                if playlist.stood_still_since(plan.observed_s):
                    plan = TimedPlan(plan.number, plan.observed_s, clock.now_s, plan.period_s, plan.actions)
                publish(plan)
            session.loop.turn(clock.now_s)
            robot.step()
            assert not session.stopped.is_set(), session.stop_reason
            if robot.succeeded:
                return True
        return False
    finally:
        playlist.publish = publish  # type: ignore[method-assign]
        session.end()
