"""Deployment from the policy to the robot's side of the bridge: faults on the way, signals, a task that is solved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished
from deploy_peers import HOME, StillArm, robot_data
from ideal_arm import Memory, panda
from made_up_time import Clock, DelayedRobot, play
from scripted_planner import ScriptedPlanner, joint_spec, stay

from robopolicy.deploy.faults import Faults
from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.session import Session
from robopolicy.deploy.sim_robot import SimRobot
from robopolicy.deploy.sim_server import Quirks, RosbridgeServer

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo" / "pick_cube-diffusion"


class Deployed:
    """A session that plays increments on an arm without physics, over a bridge in this process."""

    def __init__(self, dialect: str = "ros2", port: int = 0, blocking: bool = False, **faults: Any) -> None:
        data = robot_data()
        data["watchdogs"]["loop_overrun_s"] = 1.0  # other tests run beside this one
        self.file = RobotFile.from_dict(data)
        self.faults = Faults()
        for name, value in faults.items():
            self.faults.set(name, value)
        self.blocking = blocking
        self.server, self.arm = self.serve(port, dialect)
        spec = joint_spec("pd_joint_delta_pos")
        self.planner = ScriptedPlanner(spec, stay(spec))
        self.memory = Memory()
        self.robot = RemoteRobot(self.file, url=self.server.url)
        self.robot.connect()
        self.session = Session(self.robot, self.file, self.planner, recorders=[self.memory])
        self.session.open()

    def serve(self, port: int, dialect: str = "ros2") -> tuple[RosbridgeServer, SimRobot]:
        server = RosbridgeServer(port=port, dialect=dialect, faults=self.faults, quirks=Quirks(blocking=self.blocking))  # type: ignore[arg-type]
        arm = SimRobot(StillArm(), self.file, server)
        server.start()
        arm.start()
        return server, arm

    def begin(self) -> None:
        assert self.session.begin_within(10.0) == ""
        self.wait(lambda: len(self.arm.arm.accepted) > 20)

    def wait(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> float:
        begun_s = time.monotonic()
        while not condition():
            assert time.monotonic() - begun_s < timeout_s, self.session.snapshot()
            time.sleep(0.005)
        return time.monotonic() - begun_s

    @property
    def commands(self) -> int:
        return len(self.arm.arm.accepted)

    def close(self) -> None:
        self.session.close()
        self.robot.close()
        self.arm.close()
        self.server.close()


@pytest.fixture
def deployed() -> Iterator[Callable[..., Deployed]]:
    made: list[Deployed] = []

    def make(**settings: Any) -> Deployed:
        made.append(Deployed(**settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
def test_an_arm_of_either_ros_is_driven_whatever_order_its_joints_come_in(
    deployed: Callable[..., Deployed], dialect: str
) -> None:
    on = deployed(dialect=dialect, reorder_joints=True, extra_joint=True, null_effort=True)
    on.begin()
    state = on.robot.state()
    assert state is not None
    np.testing.assert_allclose(state.position, HOME, atol=1e-6)
    np.testing.assert_allclose(on.arm.arm.accepted[-1].positions, HOME, atol=1e-3)
    assert on.arm.arm.accepted[-1].points >= 2  # ends at rest: silence means stop
    assert on.arm.arm.refused == 0


@pytest.mark.parametrize(
    ("fault", "value", "limit_s"),
    [("half_dead", True, 0.6), ("silent", True, 0.6), ("nan_joint", "panda_joint3", 0.6)],
)
def test_data_that_stop_coming_stop_the_arm(
    deployed: Callable[..., Deployed], fault: str, value: Any, limit_s: float
) -> None:
    on = deployed()
    on.begin()
    on.faults.set(fault, value)
    assert on.wait(on.session.stopped.is_set) < limit_s
    on.faults.set(fault, "" if fault == "nan_joint" else False)
    time.sleep(0.5)
    count = on.commands
    time.sleep(0.5)
    assert on.commands == count  # latched, though data come again
    on.wait(lambda: on.session.rearm() == "" or not on.session.stopped.is_set())
    on.wait(lambda: on.commands > count + 10)


def test_a_frozen_bridge_gets_no_stale_commands(deployed: Callable[..., Deployed]) -> None:
    on = deployed()
    on.begin()
    before = on.commands
    on.server.freeze(2.0)
    assert on.wait(on.session.stopped.is_set) < 0.5
    frozen_s = time.monotonic()
    time.sleep(2.5)
    late = [a for a in on.arm.arm.accepted if a.arrival_s > frozen_s + 0.1]
    rests = [a for a in late if a.points == 1]
    assert len(late) - len(rests) <= 1  # a command that was under way; the stop itself is told again
    assert len(on.arm.arm.accepted) >= before


def test_a_killed_bridge_that_comes_back_moves_nothing_until_armed(deployed: Callable[..., Deployed]) -> None:
    on = deployed()
    on.begin()
    port = on.server.port
    on.arm.close()
    on.server.close()
    assert on.wait(on.session.stopped.is_set) < 0.5
    time.sleep(1.0)
    on.server, on.arm = on.serve(port)
    on.wait(lambda: on.robot.link().connected and on.robot.link().data_age_s < 0.1, 15.0)
    time.sleep(0.5)
    assert on.commands == 0
    on.wait(lambda: on.session.rearm() == "" or not on.session.stopped.is_set())
    on.wait(lambda: on.commands > 10)


@pytest.mark.parametrize("way", ["topic", "service"])
def test_the_emergency_stop_from_ros_does_not_wait_for_a_slow_service(
    deployed: Callable[..., Deployed], way: str
) -> None:
    """A bridge with the old defaults serves nothing else on a connection while a service runs."""
    on = deployed(blocking=True)
    on.server.offer_service("/slow", "std_srvs/Trigger", lambda args: time.sleep(2.0) or {"success": True})
    on.begin()
    slow = threading.Thread(target=lambda: on.robot.call("/slow", {}, timeout_s=5.0))
    slow.start()
    time.sleep(0.2)
    if way == "topic":
        on.server.publish(on.file.stop.topic, "std_msgs/Bool", {"data": True})
    else:
        threading.Thread(target=lambda: on.server.call_client(on.file.stop.service, {}), daemon=True).start()
    assert on.wait(lambda: any(a.points == 1 for a in on.arm.arm.accepted)) < 0.3
    assert "emergency stop" in on.session.stop_reason
    slow.join()


def test_a_faulty_plan_stops_the_arm_at_the_robots_side(deployed: Callable[..., Deployed]) -> None:
    on = deployed()
    good = on.planner.say
    on.planner.say = lambda obs, call: good(obs, call) if call < 10 else good(obs, call) * float("nan")
    on.begin()
    on.wait(on.session.stopped.is_set)
    assert "not finite" in on.session.stop_reason
    assert ("stop", on.session.stop_reason) in on.memory.events
    time.sleep(0.3)
    for command in on.arm.arm.accepted:
        np.testing.assert_allclose(command.positions, HOME, atol=1e-3)


def live(url: str, cwd: Path, *words: str) -> subprocess.Popen[str]:
    """Start `robopolicy deploy` in live mode."""
    settings = ["live=false", "record=null", "robot.watchdogs.loop_overrun_s=2", "robot.watchdogs.state_age_s=1"]
    command = [sys.executable, "-m", "robopolicy", "deploy", f"checkpoint={ZOO}", f"bridge.url={url}"]
    return subprocess.Popen(
        [*command, "mode=live", "arm=now", *settings, *words],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL)),
    ],
)
def test_a_signal_stops_the_arm_before_deploy_leaves(
    deployed: Callable[..., Deployed], tmp_path: Path, number: signal.Signals
) -> None:
    on = deployed()
    on.session.close()  # the arm and its bridge are used by another process
    process = live(on.server.url, tmp_path)
    try:
        on.wait(lambda: on.commands > 50, 60.0)
        sent_s = time.monotonic()
        process.send_signal(number)
        process.wait(20.0)
        time.sleep(0.3)
        after = [a for a in on.arm.arm.accepted if a.arrival_s > sent_s]
        still = on.arm.sim.velocity()[:7]
        np.testing.assert_allclose(still, 0.0, atol=1e-6)
        if number == signal.SIGKILL:  # nothing can be sent: the last trajectory ends at rest by itself
            assert len(after) <= 10
            assert on.arm.arm.accepted[-1].points == 2
            return
        rests = [a for a in after if a.points == 1 and a.velocities is not None and not a.velocities.any()]
        assert rests[0].arrival_s - sent_s < 0.1
        assert [a for a in after if a.arrival_s > rests[0].arrival_s and a not in rests] == []
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.sim
@pytest.mark.parametrize(("executor", "planner"), [("rti", "fresh"), ("rti", "rti"), ("async", "fresh")])
def test_the_published_policy_solves_its_task_in_made_up_time(
    monkeypatch: pytest.MonkeyPatch, executor: str, planner: str
) -> None:
    """Policy, session and filter as they are, 20 ms of inference, 20 ms to the arm, 5 ms back; evaluation: 96 %."""
    from hydra import compose, initialize_config_module

    from robopolicy.app.build import build_planner, build_policy
    from robopolicy.deploy import loop, runner, session
    from robopolicy.envs import make
    from robopolicy.envs.stepping import SteppedRobot
    from robopolicy.training import checkpoint

    clock = Clock()
    for module in (loop, runner, session):
        monkeypatch.setattr(module, "time", clock)
    loaded = checkpoint.load(ZOO, build_policy, device=torch.device("cpu"))
    with initialize_config_module("robopolicy.configs", version_base=None):
        cfg = compose("deploy", overrides=["checkpoint=x", f"planner={planner}"])
    file = panda(watchdogs__loop_overrun_s=1.0)
    sim = SteppedRobot(make("pick_cube", backend="single", control_mode="pd_joint_pos"))
    robot = DelayedRobot(sim, clock, command_s=0.02, state_s=0.005)
    plan = build_planner(cfg.planner, loaded.policy.eval(), 1, loaded.path)
    on = Session(robot, file, plan, executor=executor)  # type: ignore[arg-type]
    solved = [play(on, robot, seed, inference_s=0.02) for seed in range(10000, 10004)]
    sim.env.close()
    assert sum(solved) >= 3
    assert on.loop.stats.following_turns() in range(3, 8)
    assert on.loop.safety.counts.rejections == dict.fromkeys(on.loop.safety.counts.rejections, 0)


@pytest.mark.sim
@pytest.mark.slow
def test_the_published_policy_solves_its_task_on_the_simulated_robot(
    command: Callable[..., Finished], tmp_path: Path
) -> None:
    """Real time, over the bridge, with the safety filter; evaluation solves 98 %."""
    words = ("mode=live", "arm=now", "episodes=3", "live=false", "robot.watchdogs.loop_overrun_s=1")
    done = command("deploy", f"checkpoint={ZOO}", *words, "rearm=true", "--json", cwd=tmp_path, timeout_s=120)
    said = json.loads(done.out)
    assert said["n_success"] >= 2, done.err
    again = command("deploy", f"checkpoint={ZOO}", f"replay={said['recording']}", "--json", cwd=tmp_path)
    assert json.loads(again.out)["num_equal"] == said["plans"]
