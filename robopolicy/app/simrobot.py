"""Run a simulated robot in real time behind a rosbridge server."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from robopolicy.deploy.sim_robot import SimRobot

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy simrobot task=pick_cube", "a Panda with a cube, in real time at ws://127.0.0.1:9090"),
    ("robopolicy simrobot task=push_cube port=9091 dialect=ros1", "another task, as a ROS 1 bridge would show it"),
    (
        "robopolicy simrobot faults.drop=0.05 faults.delay_s=0.03 quirks.blocking=true",
        "over a bad network, behind an older bridge",
    ),
)

READY = "listening on "
"""What the line that names the address begins with; `spawn` waits for it."""

PARENT = "ROBOPOLICY_SIMROBOT_PARENT"
"""Environment variable with the process that `spawn` was called in; the robot does not outlive it."""


def run(cfg: DictConfig) -> Mapping[str, Any]:
    """Run until Ctrl-C, SIGTERM or the end of `duration_s`; return what happened."""
    from robopolicy.deploy.realtime import real_time

    stop = threading.Event()
    before = {name: signal.signal(name, lambda *_: stop.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        with serving(cfg) as robot, real_time(cfg.real_time):
            host = robot.server.host
            print(f"{READY}{robot.server.url}", file=sys.stderr, flush=True)
            if host not in ("127.0.0.1", "localhost", "::1"):
                print(f"Anyone who reaches {host} can move this robot.", file=sys.stderr)
            _say(cfg, robot)
            until_s = None if cfg.duration_s is None else time.monotonic() + cfg.duration_s
            parent = os.environ.get(PARENT)
            while not stop.wait(0.2) and (until_s is None or time.monotonic() < until_s):
                if parent is not None and parent != str(os.getppid()):
                    break  # whoever spawned this was killed
            return _summary(robot)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextlib.contextmanager
def serving(cfg: DictConfig) -> Iterator[SimRobot]:
    """Run the robot that `cfg` describes, in this process, while the context lasts.

    Raises:
        RobopolicyError: the robot file, a fault or the port is wrong.
    """
    import torch
    from omegaconf import OmegaConf

    from robopolicy import envs
    from robopolicy.deploy.faults import Faults
    from robopolicy.deploy.robot import RobotFile
    from robopolicy.deploy.sim_robot import SimRobot, SimSettings
    from robopolicy.deploy.sim_server import Quirks, RosbridgeServer
    from robopolicy.envs.stepping import SteppedRobot
    from robopolicy.errors import UnknownNameError

    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if plain["dialect"] not in ("ros1", "ros2"):
        raise UnknownNameError("dialect", str(plain["dialect"]), ("ros1", "ros2"))
    if plain["sim"]["start_from"] not in ("desired", "measured"):
        raise UnknownNameError("sim.start_from", str(plain["sim"]["start_from"]), ("desired", "measured"))
    robot = RobotFile.from_dict(plain["robot"])
    faults = Faults()
    for name, value in plain["faults"].items():
        faults.set(name, value)
    torch.set_num_threads(1)
    env = envs.make(
        plain["task"]["name"], backend="single", control_mode="pd_joint_pos", obs_mode=plain["task"]["obs_mode"]
    )
    server = RosbridgeServer(
        host=plain["host"],
        port=plain["port"],
        dialect=plain["dialect"],
        quirks=Quirks(**plain["quirks"]),
        faults=faults,
        token=os.environ.get(plain["token_env"] or "") or None,
    )
    try:
        simulated = SimRobot(
            SteppedRobot(env, drives=plain["drives"]), robot, server, SimSettings(seed=plain["seed"], **plain["sim"])
        )
        server.start()
        try:
            simulated.start()
            if faults.freeze_s:
                server.freeze(faults.freeze_s)
            yield simulated
        finally:
            simulated.close()
            server.close()
    finally:
        env.close()


@contextlib.contextmanager
def spawn(overrides: Sequence[str], *, timeout_s: float = 60.0) -> Iterator[str]:
    """Run `robopolicy simrobot port=0 <overrides>` in a process of its own while the context lasts; yield its URL.

    Raises:
        RobopolicyError: it did not start; says what it said.
    """
    from robopolicy.errors import RobopolicyError

    command = [sys.executable, "-m", "robopolicy", "simrobot", "port=0", *overrides]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, PARENT: str(os.getpid())},
    )
    assert child.stderr is not None
    timer = threading.Timer(timeout_s, child.kill)
    timer.start()
    said: list[str] = []
    try:
        for line in child.stderr:
            said.append(line)
            if line.startswith(READY):
                break
        else:
            raise RobopolicyError(f"The simulated robot did not start:\n{''.join(said[-20:])}")
        timer.cancel()
        threading.Thread(target=lambda pipe: [None for _ in pipe], args=(child.stderr,), daemon=True).start()
        yield said[-1].removeprefix(READY).strip()
    finally:
        timer.cancel()
        child.terminate()
        try:
            child.wait(5.0)
        except subprocess.TimeoutExpired:
            child.kill()


def _say(cfg: DictConfig, robot: SimRobot) -> None:
    """Print what there is and what to type next."""
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    known, there = robot.robot.streams, {*robot.sim.extras(), *robot.sim.cameras}
    streams = [stream.topic for name, stream in known.items() if name in there]
    derived = {source.partition("/")[2] for source in robot.robot.observations if source.startswith("extra/")}
    untold = sorted(there - set(known) - derived)
    lines = [
        ("robot", f"{robot.robot.name} in task {cfg.task.name}, spoken to as {cfg.dialect}"),
        ("takes", f"{robot.robot.command.topic} and other controllers' topics"),
        ("tells", ", ".join([*robot.robot.joint_states.topics, *streams])),
        ("services", "/simrobot/reset {seed}, /simrobot/episode, /simrobot/fault {name, value}"),
        ("next", f"robopolicy deploy checkpoint=<run> bridge.url={robot.server.url} mode=check"),
        ("stop", "Ctrl-C"),
    ]
    for name, text in lines:
        console.print(f"  [bold]{name:<9}[/] {text}", markup=True)
    if untold:
        lacking = f"the robot file {robot.robot.name!r} has no stream for {', '.join(untold)}"
        console.print(f"  [yellow]note[/]      {lacking}; a policy that needs them cannot be deployed with it")


def _summary(robot: SimRobot) -> dict[str, Any]:
    import numpy as np

    work_ms = 1e3 * np.array(robot.work_s) if robot.work_s else np.zeros(1)
    return {
        "seed": robot.seed,
        "success_once": robot.success_once,
        "commands": len(robot.arm.accepted),
        "refused": robot.arm.refused,
        "why_refused": robot.arm.why_refused,
        "slipped_s": robot.slipped_s,
        "step_ms": {"p50": float(np.median(work_ms)), "p99": float(np.percentile(work_ms, 99))},
    }
