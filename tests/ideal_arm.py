"""A robot without a network: follows each command exactly, one period later; for tests of what is in front of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from robopolicy.deploy.contract import Floats, LinkStatus, Plan, RobotState, Sample, StreamReport, Tick
from robopolicy.deploy.robot import RobotFile

PANDA = Path(__file__).parents[1] / "configs" / "robot" / "panda.yaml"
REST = np.array([0.0, np.pi / 8, 0.0, -np.pi * 5 / 8, 0.0, np.pi * 3 / 4, np.pi / 4])


DEADLINES = ("state_age_s", "observation_age_s", "inference_s", "loop_overrun_s", "link_s", "spread_s")
PATIENT: dict[str, Any] = {f"watchdogs__{name}": 30.0 for name in DEADLINES}
"""Changes after which no watchdog acts because the machine is busy; for tests in real time of something else."""


def panda(**changes: Any) -> RobotFile:
    """The shipped robot file, with `safety__jump_rad=1.0`-like changes."""
    data = yaml.safe_load(PANDA.read_text())
    for key, value in changes.items():
        *path, last = key.split("__")
        place = data
        for name in path:
            place = place[name]
        place[last] = value
    return RobotFile.from_dict(data)


class IdealArm:
    """Implements `contract.Robot`. `publish` makes one measurement; `run` makes them at 100 Hz until closed."""

    def __init__(self, start: Floats = REST, streams: Mapping[str, Floats] | None = None) -> None:
        self.position, self.velocity = start.copy(), np.zeros_like(start)
        self.streams = {name: np.asarray(value, float) for name, value in (streams or {}).items()}
        self.width_m = 0.08
        self.sent: list[tuple[float, Floats, Floats]] = []
        self.grips: list[float] = []
        self.stops: list[tuple[float, str]] = []
        self.statuses = 0
        self.generation, self.connected, self.ping_s = 1, True, 0.001
        self.silent = False
        self.mute: set[str] = set()
        """Streams that say nothing."""
        self.stamp_offset_s = 1000.0
        self.work_per_state_s = 0.0
        self._armed = False
        self._states: deque[RobotState] = deque(maxlen=100)
        self._samples: dict[str, deque[Sample]] = {name: deque(maxlen=100) for name in self.streams}
        self._closed = threading.Event()
        self._on_stop: Callable[[str], None] | None = None

    def publish(self, now_s: float) -> None:
        if self.silent:
            return
        stamp_s = now_s - self.stamp_offset_s
        state = RobotState(
            stamp_s=stamp_s,
            arrival_s=now_s,
            position=self.position.copy(),
            velocity=self.velocity.copy(),
            gripper_width_m=self.width_m,
            gripper_velocity_m_s=0.0,
        )
        self._states.append(state)
        for name, value in self.streams.items():
            if name in self.mute:
                continue
            self._samples[name].append(Sample(value=value.copy(), stamp_s=stamp_s, arrival_s=now_s))

    def run(self) -> None:
        """Publish at 100 Hz in a thread."""

        def body() -> None:
            while not self._closed.wait(0.01):
                self.publish(time.monotonic())

        self.publish(time.monotonic())
        threading.Thread(target=body, daemon=True).start()

    def state(self) -> RobotState | None:
        return self._states[-1] if self._states else None

    def states(self) -> Sequence[RobotState]:
        return list(self._states)

    def samples(self, stream: str) -> Sequence[Sample]:
        return list(self._samples[stream])

    def send(self, position: Floats, velocity: Floats, gripper: float | None) -> None:
        if not self._armed:
            return
        assert np.isfinite(position).all()
        assert np.isfinite(velocity).all()
        self.sent.append((time.monotonic(), position.copy(), velocity.copy()))
        self.position, self.velocity = position.copy(), velocity.copy()
        if gripper is not None:
            self.grips.append(gripper)
            self.width_m = gripper

    def stop(self, reason: str) -> None:
        self._armed = False
        self.velocity[:] = 0.0
        self.stops.append((time.monotonic(), reason))

    def rearm(self) -> None:
        self._armed = True

    @property
    def armed(self) -> bool:
        return self._armed

    def link(self) -> LinkStatus:
        age_s = time.monotonic() - self._states[-1].arrival_s if self._states else float("inf")
        return LinkStatus(
            connected=self.connected, data_age_s=age_s, ping_s=self.ping_s, generation=self.generation, detail="cut"
        )

    def reports(self) -> Sequence[StreamReport]:
        return []

    def call(self, service: str, request: Mapping[str, Any], *, timeout_s: float) -> Mapping[str, Any]:
        raise NotImplementedError

    def listen(self, *, on_stop: Callable[[str], None]) -> None:
        self._on_stop = on_stop

    def press_estop(self) -> None:
        assert self._on_stop is not None
        self._on_stop("pressed")

    def publish_status(self, status: Mapping[str, Any]) -> None:
        self.statuses += 1

    def close(self) -> None:
        self._closed.set()


class Memory:
    """Implements `contract.Recorder`: keeps everything."""

    def __init__(self) -> None:
        self.ticks: list[Tick] = []
        self.plans: list[Plan] = []
        self.events: list[tuple[str, str]] = []

    def tick(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def plan(self, plan: Plan) -> None:
        self.plans.append(plan)

    def event(self, kind: str, text: str, **data: Any) -> None:
        self.events.append((kind, text))
