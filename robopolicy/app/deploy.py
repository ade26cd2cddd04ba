"""Play a checkpoint on a robot controller over the ROS bridge, with limits, watchdogs and stops."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.deploy.contract import StreamReport
    from robopolicy.deploy.remote import RemoteRobot
    from robopolicy.deploy.robot import RobotFile
    from robopolicy.policies.planners import Planner
    from robopolicy.training.checkpoint import LoadedPolicy
    from robopolicy.types import TaskSpec

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy deploy checkpoint=pick_cube", "check a checkpoint against a simulated robot: no motion"),
    (
        "robopolicy deploy checkpoint=pick_cube mode=live episodes=20 arm=now planner=rti",
        "play 20 episodes on the simulated robot in real time, success with its 95 % interval",
    ),
    (
        "robopolicy deploy checkpoint=pick_cube bridge.url=ws://192.168.1.5:9090 mode=check",
        "compare topics, types and rates of a real bridge with the robot file",
    ),
    ("robopolicy deploy checkpoint=pick_cube bridge.url=ws://192.168.1.5:9090 mode=shadow", "infer, send nothing"),
    (
        "robopolicy deploy checkpoint=pick_cube bridge.url=ws://192.168.1.5:9090 mode=live speed=0.2",
        "move the arm, at a fifth of the speed; Ctrl-C stops it",
    ),
    ("robopolicy deploy checkpoint=pick_cube replay=outputs/deploy/x.mcap", "plan a recording again and compare"),
)

MODES = ("check", "shadow", "step", "live")
SIMROBOT = "simrobot"
CHECK_S = 2.0


def run(cfg: DictConfig) -> dict[str, Any]:
    """Deploy as `cfg` says; `ok` in what is returned says whether all went well."""
    from rich.console import Console

    from robopolicy.app.deploy_play import play
    from robopolicy.errors import RobopolicyError, UnknownNameError

    if cfg.mode not in MODES:
        raise UnknownNameError("mode", cfg.mode, MODES)
    if cfg.episodes and cfg.mode != "live":
        raise RobopolicyError(f"episodes={cfg.episodes} needs mode=live; got mode={cfg.mode}.")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    loaded = _load(cfg)
    if cfg.replay:
        return _replay(cfg, loaded, console)
    file = _robot_file(cfg)
    _require_fit(cfg, file, loaded)
    _require_consent(cfg)
    if cfg.max_episode_s is None:
        cfg.max_episode_s = loaded.spec.max_episode_steps * loaded.spec.action.control_dt_s
    with _bridge(cfg, file, loaded, console) as robot:
        if cfg.mode == "check":
            return _check(cfg, file, robot, console)
        return play(cfg, file, loaded, _planner(cfg, loaded), robot, console)


def _robot_file(cfg: DictConfig) -> RobotFile:
    from omegaconf import OmegaConf

    from robopolicy.deploy.robot import RobotFile

    data = OmegaConf.to_container(cfg.robot, resolve=True)
    assert isinstance(data, dict)
    return RobotFile.from_dict({str(key): value for key, value in data.items()})


def _load(cfg: DictConfig) -> LoadedPolicy:
    """Return the checkpoint's policy on the CPU or GPU that is there, changed as `cfg.policy` says."""
    import torch
    from omegaconf import OmegaConf

    from robopolicy.app.build import build_policy
    from robopolicy.policies.base import Policy
    from robopolicy.training import checkpoint

    def build(config: Mapping[str, Any], spec: TaskSpec) -> Policy:
        merged = OmegaConf.create(dict(config))
        for key, value in _changes(cfg.policy):
            OmegaConf.update(merged, key, value, force_add=True)
        return build_policy(merged, spec)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checkpoint.load(cfg.checkpoint, build, device=device)


def _changes(policy: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in policy.items():
        if hasattr(value, "items"):
            yield from _changes(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value


def _require_fit(cfg: DictConfig, file: RobotFile, loaded: LoadedPolicy) -> None:
    from robopolicy.deploy.semantics import require_fit
    from robopolicy.deploy.session import require_timeout

    require_fit(loaded.spec, file)
    if cfg.mode in ("live", "step"):
        require_timeout(file, force=cfg.force)


def _require_consent(cfg: DictConfig) -> None:
    """Refuse to move an arm when nobody can be asked."""
    from robopolicy.errors import RobopolicyError, UnknownNameError

    if cfg.arm not in ("ask", "now"):
        raise UnknownNameError("arm", cfg.arm, ("ask", "now"))
    asks = cfg.mode == "step" or (cfg.mode == "live" and cfg.arm == "ask")
    if asks and not sys.stdin.isatty():
        raise RobopolicyError(
            f"mode={cfg.mode} asks on the terminal before the arm moves, and there is no terminal. "
            "arm=now with mode=live moves it without asking."
        )


@contextlib.contextmanager
def _bridge(cfg: DictConfig, file: RobotFile, loaded: LoadedPolicy, console: Console) -> Iterator[RemoteRobot]:
    """Connect to the bridge, starting the simulated robot first if that is meant."""
    from robopolicy.deploy.observations import needed_streams
    from robopolicy.deploy.remote import RemoteRobot
    from robopolicy.errors import RobopolicyError, UnknownNameError

    dialects = ("auto", "ros1", "ros2")
    if cfg.bridge.dialect not in dialects:
        raise UnknownNameError("dialect", cfg.bridge.dialect, dialects)
    if cfg.episodes and cfg.bridge.url != SIMROBOT and "127.0.0.1" not in cfg.bridge.url:
        raise RobopolicyError("episodes= resets the scene, which only a simulated robot on this computer can do.")
    with contextlib.ExitStack() as stack:
        url = cfg.bridge.url
        if url == SIMROBOT:
            url = stack.enter_context(_simulated(loaded.spec, [f"real_time={cfg.real_time}"], console))
        robot = RemoteRobot(
            file,
            url=url,
            streams=needed_streams(loaded.spec, file),
            token=os.environ.get(cfg.bridge.token_env or "") or None,
            headers=dict(cfg.bridge.headers),
            ca_file=cfg.bridge.ca_file,
            verify=cfg.bridge.verify,
            dialect=None if cfg.bridge.dialect == "auto" else cfg.bridge.dialect,
            commands=cfg.mode in ("step", "live"),
        )
        robot.connect(cfg.bridge.timeout_s)  # closes by itself what it opened if it fails
        stack.callback(robot.close)
        yield robot


@contextlib.contextmanager
def _simulated(spec: TaskSpec, more: list[str], console: Console) -> Iterator[str]:
    """Run `robopolicy simrobot <more>` in a process of its own, so that it does not share the loop's interpreter.

    It has the cameras that a policy for `spec` observes.
    """
    from robopolicy.app.simrobot import spawn
    from robopolicy.envs.specs import ObsMode

    words = [f"task={spec.name}", f"task.obs_mode={ObsMode.of(spec)}", *more]
    with contextlib.ExitStack() as stack:
        with console.status(f"starting the simulated robot of task {spec.name}"):
            url = stack.enter_context(spawn(words))
        yield url


def _planner(cfg: DictConfig, loaded: LoadedPolicy) -> Planner:
    from robopolicy.app.build import build_planner

    policy: Any = loaded.policy.eval()
    if cfg.engine != "eager":
        from robopolicy.policies.engines import build_engine

        policy = build_engine(policy, cfg.engine)
    return build_planner(cfg.planner, policy, 1, loaded.path)


def _too_slow(report: StreamReport, file: RobotFile) -> str:
    """Say in words that a topic comes at less than half the rate that the robot file expects; empty if it does not."""
    stream = file.streams.get(report.name)
    expected = file.joint_states.rate_hz if report.name == "joints" else 0.0 if stream is None else stream.rate_hz
    if report.rate_hz is None or report.rate_hz >= 0.5 * expected:
        return ""
    return (
        f"{report.topic} comes at {report.rate_hz:.1f} Hz, the robot file expects {expected:g}: raise the publisher's "
        "rate, or lower rate_hz if the policy can live with it"
    )


def _replay(cfg: DictConfig, loaded: LoadedPolicy, console: Console) -> dict[str, Any]:
    """Plan once more from every observation of a recording, without a robot, and compare the actions."""
    from rich.progress import Progress

    from robopolicy.deploy.recording import read_recording
    from robopolicy.deploy.replay import replay
    from robopolicy.training.fit import threads

    recording = read_recording(Path(cfg.replay))
    with threads(1), Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("planning again", total=len(recording.plans))
        result = replay(recording, _planner(cfg, loaded), on_plan=lambda done, total: bar.update(task, completed=done))
    console.print(
        f"{result.num_equal} of {result.num_plans} plans are equal to the last bit; the largest difference of an "
        f"action is {result.max_difference:g}"
    )
    return {"ok": result.num_equal == result.num_plans, **dataclasses.asdict(result)}


# ---- check -----------------------------------------------------------------------------------------------------------
def _check(cfg: DictConfig, file: RobotFile, robot: RemoteRobot, console: Console) -> dict[str, Any]:
    """Compare what the bridge shows with the robot file; nothing moves."""
    from rich.table import Table

    with console.status("listening"):
        time.sleep(CHECK_S)
    reports, problems = list(robot.reports()), []
    table = Table("what", "topic", "type", "Hz", "age", "problem", title_justify="left")
    for report in reports:
        rate = "" if report.rate_hz is None else f"{report.rate_hz:.0f}"
        age = "" if report.age_s is None else f"{1e3 * report.age_s:.0f} ms"
        problem = report.problem or _too_slow(report, file)
        table.add_row(report.name, report.topic, report.seen_type or report.expected_type, rate, age, problem)
        if problem:
            problems.append(f"{report.name}: {problem}")
    console.print(table)
    state = robot.state()
    if state is not None:
        outside = [
            f"{name} is at {at:.3f} rad, outside its limits {low:.3f} to {high:.3f}"
            for name, at, low, high in zip(
                file.joints, state.position, file.limits.position_low, file.limits.position_high, strict=True
            )
            if not low <= at <= high
        ]
        problems += outside
    for problem in problems:
        console.print(f"[red]problem[/] {problem}")
    if not problems:
        console.print(f"[green]fits[/]: {cfg.checkpoint} on {file.name}. Next: mode=shadow, then mode=live speed=0.2")
    return {
        "ok": not problems,
        "problems": problems,
        "robot": file.to_dict(),
        "streams": [{name: getattr(report, name) for name in report.__slots__} for report in reports],
    }
