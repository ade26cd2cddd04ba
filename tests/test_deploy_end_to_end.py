"""Deployment from the policy to the robot's side of the bridge: faults on the way, signals, a task that is solved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Finished
from deploy_peers import HOME, PATIENT_WORDS, StillArm, least, robot_data, until
from ideal_arm import Memory, panda
from made_up_time import Clock, DelayedRobot, play
from scripted_planner import ScriptedPlanner, joint_spec, stay

from robopolicy.app.deploy_play import signals
from robopolicy.deploy.commands import between
from robopolicy.deploy.faults import Faults
from robopolicy.deploy.kinematics import CHAINS
from robopolicy.deploy.remote import RemoteRobot
from robopolicy.deploy.robot import RobotFile
from robopolicy.deploy.session import Session
from robopolicy.deploy.sim_robot import SimRobot
from robopolicy.deploy.sim_server import Quirks, RosbridgeServer
from robopolicy.types import Observation

ZOO = Path(__file__).parents[1] / "checkpoints" / "zoo" / "pick_cube-diffusion"


class Deployed:
    """A session that plays increments on an arm without physics, over a bridge in this process."""

    def __init__(
        self,
        dialect: str = "ros2",
        port: int = 0,
        blocking: bool = False,
        state_age_s: float = 30.0,
        command: Mapping[str, Any] = MappingProxyType({}),
        **faults: Any,
    ) -> None:
        data = robot_data(**command)
        data["watchdogs"]["state_age_s"] = state_age_s
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
        self.robot.connect(30.0)
        self.session = Session(self.robot, self.file, self.planner, recorders=[self.memory])
        self.session.open()

    def serve(self, port: int, dialect: str = "ros2") -> tuple[RosbridgeServer, SimRobot]:
        server = RosbridgeServer(port=port, dialect=dialect, faults=self.faults, quirks=Quirks(blocking=self.blocking))  # type: ignore[arg-type]
        arm = SimRobot(StillArm(), self.file, server)
        server.start()
        arm.start()
        return server, arm

    def begin(self) -> None:
        """Arm, and again should a busy machine make the watchdogs stop it, until commands arrive."""
        assert self.session.begin_within(30.0) == ""
        count = self.commands
        until(lambda: self.commands > count + 20 or (self.session.stopped.is_set() and self.session.rearm()))

    def stopped_after_s(self, act: Callable[[], Any], undo: Callable[[], Any]) -> float:
        """Arm, do `act`, and return after what time the session had stopped; `undo` at the end."""
        self.begin()
        began_s = time.monotonic()
        act()
        until(self.session.stopped.is_set)
        took_s = time.monotonic() - began_s
        undo()
        return took_s

    def require_latched(self) -> None:
        """See that nothing moves though all is well again, until somebody arms."""
        until(lambda: self.robot.link().connected and self.robot.data_age_s() < 0.2)
        count, turns = self.moves, self.session.loop.stats.turns
        until(lambda: self.session.loop.stats.turns > turns + 20)
        assert self.moves == count
        until(lambda: self.session.rearm() == "" or not self.session.stopped.is_set())
        until(lambda: self.moves > count + 10 or (self.session.stopped.is_set() and self.session.rearm()))

    @property
    def moves(self) -> int:
        """How many commands arrived, but for stops, which come again."""
        return sum(a.points != 1 for a in list(self.arm.arm.accepted))

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


INTERFACES = {
    "trajectory": {},
    "action": {"interface": "follow_joint_trajectory", "topic": "/panda_arm_controller/follow_joint_trajectory"},
    "forward": {"interface": "forward_position", "topic": "/panda_arm_controller/commands"},
    "servo": {"interface": "servo_twist", "topic": "/servo_node/delta_twist_cmds", "frame": "panda_link0"},
}


@pytest.mark.parametrize("dialect", ["ros1", "ros2"])
@pytest.mark.parametrize("interface", INTERFACES)
def test_a_session_moves_and_stops_an_arm_over_every_interface(
    deployed: Callable[..., Deployed], interface: str, dialect: str
) -> None:
    on = deployed(dialect=dialect, command=INTERFACES[interface])
    goal = HOME + np.array([0.15, 0.05, 0.0, 0.05, 0.0, 0.0, 0.0])

    def towards(obs: Observation, call: int) -> torch.Tensor:
        left = torch.as_tensor(goal) - obs.modalities["proprio"][0, -1, :7]
        return (left.clamp(-0.02, 0.02) / 0.1).float().expand(16, 7).clone()  # of 0.1 rad per period

    on.planner.say = towards
    on.begin()
    wanted = CHAINS["panda"].forward(goal)
    tool = lambda: CHAINS["panda"].forward(on.arm.sim.position()[:7])  # noqa: E731
    there = lambda: abs(between(tool(), wanted)).max() < 0.02  # noqa: E731
    # an arm told velocities runs on while a busy machine holds up the next, until the filter stops it
    until(lambda: there() or (on.session.stopped.is_set() and on.session.rearm()), within_s=60.0)
    assert on.arm.arm.refused == 0, on.arm.arm.why_refused
    if interface != "servo":
        assert on.session.stop_reason == ""
    on.session.stop("enough")

    def rests() -> bool:
        position, steps = on.arm.sim.position(), on.arm.sim.physics_steps
        until(lambda: on.arm.sim.physics_steps > steps + 50)
        return bool(np.allclose(on.arm.sim.position(), position, rtol=0, atol=1e-9))

    until(rests)


@pytest.mark.parametrize(("fault", "value"), [("half_dead", True), ("silent", True), ("nan_joint", "panda_joint3")])
def test_data_that_stop_coming_stop_the_arm(deployed: Callable[..., Deployed], fault: str, value: Any) -> None:
    on = deployed(state_age_s=0.2)
    plant, mend = (lambda v=v: on.faults.set(fault, v) for v in (value, type(value)()))
    least(lambda: on.stopped_after_s(plant, mend), below=0.5)
    assert "joint state" in on.session.stop_reason
    on.require_latched()


def test_a_frozen_bridge_gets_no_stale_commands(deployed: Callable[..., Deployed]) -> None:
    on = deployed(state_age_s=0.2)
    frozen_s, stale = 0.0, []

    def freeze() -> None:
        nonlocal frozen_s
        frozen_s = time.monotonic()
        on.server.freeze(1.0)

    def thaw() -> None:
        until(lambda: on.robot.link().connected and on.robot.data_age_s() < 0.2)
        stale.append(sum(a.arrival_s > frozen_s + 0.9 for a in list(on.arm.arm.accepted) if a.points != 1))

    least(lambda: on.stopped_after_s(freeze, thaw), below=0.5)
    assert min(stale) <= 1  # a command that was under way; the stop itself is told again
    on.require_latched()


def test_a_killed_bridge_that_comes_back_moves_nothing_until_armed(deployed: Callable[..., Deployed]) -> None:
    on = deployed(state_age_s=0.2)

    def kill() -> None:
        on.arm.close()
        on.server.close()

    def restart() -> None:
        on.server, on.arm = on.serve(on.server.port)

    least(lambda: on.stopped_after_s(kill, restart), below=0.5)
    on.require_latched()


@pytest.mark.parametrize("way", ["topic", "service"])
def test_the_emergency_stop_from_ros_does_not_wait_for_a_slow_service(
    deployed: Callable[..., Deployed], way: str
) -> None:
    """A bridge with the old defaults serves nothing else on a connection while a service runs."""
    on, done = deployed(blocking=True), threading.Event()
    on.server.offer_service("/slow", "std_srvs/Trigger", lambda args: {"success": done.wait(60)})
    slow = threading.Thread(target=lambda: on.robot.call("/slow", {}, timeout_s=60.0))
    slow.start()

    def press() -> None:
        if way == "topic":
            on.server.publish(on.file.stop.topic, "std_msgs/Bool", {"data": True})
        else:
            on.server.call_client(on.file.stop.service, {}, timeout_s=30.0)

    def seen_after_s() -> float:
        on.begin()
        began_s = time.monotonic()
        press()
        until(lambda: any(a.points == 1 and a.arrival_s > began_s for a in list(on.arm.arm.accepted)))
        return time.monotonic() - began_s

    least(seen_after_s, below=0.3)
    until(lambda: "emergency stop" in on.session.stop_reason)
    assert slow.is_alive()
    done.set()
    slow.join()


def test_a_faulty_plan_stops_the_arm_at_the_robots_side(deployed: Callable[..., Deployed]) -> None:
    on = deployed()
    good = on.planner.say
    on.planner.say = lambda obs, call: good(obs, call) if call < 10 else good(obs, call) * float("nan")
    assert on.session.begin_within(30.0) == ""
    until(on.session.stopped.is_set)
    assert "not finite" in on.session.stop_reason
    until(lambda: ("stop", on.session.stop_reason) in on.memory.events)
    until(lambda: any(a.points == 1 for a in list(on.arm.arm.accepted)))
    for command in on.arm.arm.accepted:
        np.testing.assert_allclose(command.positions, HOME, atol=1e-3)


def live(url: str, cwd: Path, *words: str) -> subprocess.Popen[bytes]:
    """Start `robopolicy deploy` in live mode."""
    settings = ["live=false", "record=null", "bridge.timeout_s=60", *PATIENT_WORDS]
    command = [sys.executable, "-m", "robopolicy", "deploy", f"checkpoint={ZOO}", f"bridge.url={url}"]
    with (cwd / "said").open("w") as said:
        return subprocess.Popen(
            [*command, "mode=live", "arm=now", *settings, *words], cwd=cwd, stdin=subprocess.DEVNULL, stderr=said
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
        until(lambda: on.moves > 50 or process.poll() is not None, within_s=120.0)
        assert process.poll() is None, (tmp_path / "said").read_text()
        sent_s = time.monotonic()
        process.send_signal(number)
        process.wait(60.0)
        # whatever was under way has arrived
        steps = on.arm.sim.physics_steps
        until(lambda: on.arm.sim.physics_steps > steps + 30)
        np.testing.assert_allclose(on.arm.sim.velocity()[:7], 0.0, atol=1e-6)
        if number == signal.SIGKILL:  # nothing can be sent: the last trajectory ends at rest by itself
            assert on.arm.arm.accepted[-1].points == 2
            return
        after = [a for a in on.arm.arm.accepted if a.arrival_s > sent_s]
        rests = [a for a in after if a.points == 1 and a.velocities is not None and not a.velocities.any()]
        assert rests
        assert [a for a in after if a.arrival_s > rests[0].arrival_s and a not in rests] == []
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signals_stop_is_seen_within_100_ms(deployed: Callable[..., Deployed], number: signal.Signals) -> None:
    on = deployed()
    with signals(on.session) as left:

        def seen_after_s() -> float:
            on.begin()
            began_s = time.monotonic()
            os.kill(os.getpid(), number)
            until(lambda: any(a.points == 1 and a.arrival_s > began_s for a in list(on.arm.arm.accepted)))
            return time.monotonic() - began_s

        least(seen_after_s, below=0.1)
        assert left.wait(30.0)
    assert number.name in on.session.stop_reason


@pytest.mark.sim
@pytest.mark.parametrize(("executor", "planner"), [("rti", "fresh"), ("rti", "rti"), ("async", "fresh")])
def test_the_published_policy_solves_its_task_in_made_up_time(
    monkeypatch: pytest.MonkeyPatch, executor: str, planner: str
) -> None:
    """Policy, session and filter as they are, 20 ms of inference, 20 ms to the arm, 5 ms back; evaluation: 96 %."""
    from hydra import compose, initialize_config_module

    from robopolicy.app.build import build_planner, build_policy
    from robopolicy.envs import make
    from robopolicy.envs.stepping import SteppedRobot
    from robopolicy.training import checkpoint

    clock = Clock()
    clock.install(monkeypatch)
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
    words = ("mode=live", "arm=now", "episodes=3", "live=false", *PATIENT_WORDS)
    done = command("deploy", f"checkpoint={ZOO}", *words, "rearm=true", "--json", cwd=tmp_path, timeout_s=240)
    said = json.loads(done.out)
    assert said["n_success"] >= 2, done.err
    again = command("deploy", f"checkpoint={ZOO}", f"replay={said['recording']}", "--json", cwd=tmp_path)
    assert json.loads(again.out)["num_equal"] == said["plans"]
