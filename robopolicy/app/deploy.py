"""Play a checkpoint on a robot controller over the ROS bridge, with limits, watchdogs and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.deploy.contract import Plan
    from robopolicy.deploy.remote import RemoteRobot
    from robopolicy.deploy.robot import RobotFile
    from robopolicy.deploy.session import Session
    from robopolicy.policies.planners import Planner
    from robopolicy.training.checkpoint import LoadedPolicy

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
)

MODES = ("check", "shadow", "step", "live")
SIMROBOT = "simrobot"
CHECK_S = 2.0
READY_S = 10.0
POLL_S = 0.05


def run(cfg: DictConfig) -> dict[str, Any]:
    """Deploy as `cfg` says; `ok` in what is returned says whether all went well."""
    from rich.console import Console

    from robopolicy.errors import RobopolicyError, UnknownNameError

    if cfg.mode not in MODES:
        raise UnknownNameError("mode", cfg.mode, MODES)
    if cfg.episodes and cfg.mode != "live":
        raise RobopolicyError(f"episodes={cfg.episodes} needs mode=live; got mode={cfg.mode}.")
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    file, loaded = _robot_file(cfg), _load(cfg)
    _require_fit(cfg, file, loaded)
    _require_consent(cfg)
    with _bridge(cfg, file, loaded, console) as robot:
        if cfg.mode == "check":
            return _check(cfg, file, robot, console)
        return _deploy(cfg, file, loaded, robot, console)


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
    from robopolicy.types import TaskSpec

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
            url = stack.enter_context(_simulated(loaded.spec.name, console))
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
        stack.callback(robot.close)
        robot.connect(cfg.bridge.timeout_s)
        yield robot


@contextlib.contextmanager
def _simulated(task: str, console: Console) -> Iterator[str]:
    """Run `robopolicy simrobot` in a process of its own, so that it does not share the loop's interpreter."""
    from robopolicy.app.simrobot import spawn

    with contextlib.ExitStack() as stack:
        with console.status(f"starting the simulated robot of task {task}"):
            url = stack.enter_context(spawn([f"task={task}"]))
        yield url


def _planner(cfg: DictConfig, loaded: LoadedPolicy) -> Planner:
    from robopolicy.app.build import build_planner

    policy: Any = loaded.policy.eval()
    if cfg.engine != "eager":
        from robopolicy.policies.engines import build_engine

        policy = build_engine(policy, cfg.engine)
    return build_planner(cfg.planner, policy, 1, loaded.path)


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
        table.add_row(report.name, report.topic, report.seen_type or report.expected_type, rate, age, report.problem)
        if report.problem:
            problems.append(f"{report.name}: {report.problem}")
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


# ---- shadow, step, live ----------------------------------------------------------------------------------------------
def _deploy(
    cfg: DictConfig, file: RobotFile, loaded: LoadedPolicy, robot: RemoteRobot, console: Console
) -> dict[str, Any]:
    from robopolicy.deploy.session import Session, quiet_collector
    from robopolicy.training.fit import threads

    def confirm(plan: Plan) -> bool:
        return console.input(f"chunk of {len(plan.chunk)} actions, {plan.inference_s:.3f} s: play it? [y/N] ") == "y"

    with threads(1):
        session = Session(
            robot,
            file,
            _planner(cfg, loaded),
            mode=cfg.mode,
            executor=cfg.executor,
            n_action_steps=cfg.n_action_steps,
            speed=cfg.speed,
            seam_blend_s=cfg.seam_blend_s,
            ensemble_decay=cfg.ensemble_decay,
            force=cfg.force,
            confirm=confirm,
        )
        _say_limits(file, session, console)
        if cfg.mode == "live" and cfg.arm == "ask":
            console.input("[bold]The arm will move.[/] Hand on the emergency stop? [Enter] arms, Ctrl-C leaves ")
        with _signals(session) as left, quiet_collector(), contextlib.ExitStack() as stack:
            stack.callback(session.close)
            session.open()
            try:
                if cfg.episodes:
                    return _episodes(cfg, loaded, robot, session, left, console)
                return _play(cfg, session, left, console)
            except BaseException as error:
                session.stop(f"deploy fails: {type(error).__name__}: {error}")
                raise


@contextlib.contextmanager
def _signals(session: Session) -> Iterator[threading.Event]:
    """Stop the robot at once on Ctrl-C, SIGTERM and SIGHUP; the event says that it is time to leave."""
    left = threading.Event()

    def stop(number: int, frame: object) -> None:
        session.stop(signal.Signals(number).name)
        left.set()

    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {name: signal.signal(name, stop) for name in names}
    try:
        yield left
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _say_limits(file: RobotFile, session: Session, console: Console) -> None:
    safety, command = file.safety, file.command
    console.print(
        f"{file.name}: {command.interface} on {command.topic} at {command.rate_hz:g} Hz; speed {session.speed:g}, "
        f"tool at most {safety.tcp_speed_m_s * session.speed:g} m/s within {list(safety.workspace_low_m)} to "
        f"{list(safety.workspace_high_m)} m; states at most {file.watchdogs.state_age_s:g} s old"
    )


def _play(cfg: DictConfig, session: Session, left: threading.Event, console: Console) -> dict[str, Any]:
    """Play until Ctrl-C or for `duration_s`; after a latched stop the operator may arm again."""
    from robopolicy.errors import RobopolicyError

    if why := session.begin_within(READY_S, cfg.seed):
        raise RobopolicyError(f"The robot is not ready after {READY_S:g} s: {why}.")
    begun_s = time.monotonic()
    with console.status("") as status:
        while not left.is_set() and (cfg.duration_s is None or time.monotonic() - begun_s < cfg.duration_s):
            status.update(_line(session))
            if session.stopped.wait(POLL_S) and not left.is_set():
                status.stop()
                console.print(f"[red]stopped[/]: {session.stop_reason}")
                if not _arms_again(session, console):
                    break
                status.start()
    why = session.stop_reason
    session.end()
    summary = session.summary()
    _say_summary(summary, console)
    return {"ok": not why or left.is_set(), "stop_reason": why, **summary}


def _arms_again(session: Session, console: Console) -> bool:
    """Ask the operator whether to go on after a stop."""
    if not sys.stdin.isatty():
        return False
    while console.input("[Enter] arms again, q leaves: ").strip() != "q":
        if not (why := session.rearm()):
            return True
        console.print(f"not yet: {why}")
    return False


def _episodes(
    cfg: DictConfig, loaded: LoadedPolicy, robot: RemoteRobot, session: Session, left: threading.Event, console: Console
) -> dict[str, Any]:
    """Play episodes on the simulated robot, in real time, and count the successes."""
    from rich.progress import Progress

    from robopolicy.errors import RobopolicyError
    from robopolicy.evaluation.statistics import wilson_interval

    spec = loaded.spec
    limit_s = (cfg.max_episode_s or spec.max_episode_steps * spec.action.control_dt_s) / cfg.speed
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("0 succeeded", total=cfg.episodes)
        for seed in range(cfg.seed, cfg.seed + cfg.episodes):
            session.episode = f"{len(rows) + 1} of {cfg.episodes}, seed {seed}"
            robot.call("/simrobot/reset", {"seed": seed}, timeout_s=20.0)
            time.sleep(0.3)  # states of the old scene leave the window
            if why := session.begin_within(READY_S, seed):
                raise RobopolicyError(f"The robot is not ready after {READY_S:g} s: {why}.")
            row = _episode(robot, session, limit_s)
            session.end()
            rows.append({"seed": seed, **row})
            successes = sum(row["success"] for row in rows)
            bar.update(task, advance=1, description=f"{successes} succeeded")
            if left.is_set() or (row["stop_reason"] and not cfg.rearm):
                break
    n = len(rows)
    low, high = wilson_interval(successes, n)
    summary = session.summary()
    stops = [row["stop_reason"] for row in rows if row["stop_reason"]]
    console.print(
        f"[bold]{100 * successes / n:.0f} % success[/] ({successes} of {n}), 95 % interval {100 * low:.0f} to "
        f"{100 * high:.0f} %, in real time with executor {session.executor}"
    )
    _say_summary(summary, console)
    for reason in stops:
        console.print(f"[red]stopped[/]: {reason}")
    return {
        "ok": not stops and not left.is_set(),
        "n_episodes": n,
        "n_success": successes,
        "pc_success": 100 * successes / n,
        "pc_success_ci95": [100 * low, 100 * high],
        "episodes": rows,
        **summary,
    }


def _episode(robot: RemoteRobot, session: Session, limit_s: float) -> dict[str, Any]:
    """Play one episode until its first success or its end."""
    begun_s = time.monotonic()
    while True:
        seen = robot.call("/simrobot/episode", {}, timeout_s=5.0)
        elapsed_s = time.monotonic() - begun_s
        over = seen["success_once"] or elapsed_s > limit_s or session.stopped.is_set()
        if over:
            return {
                "success": bool(seen["success_once"]),
                "steps": int(seen["steps"]),
                "elapsed_s": elapsed_s,
                "stop_reason": session.stop_reason,
            }
        session.stopped.wait(0.1)


def _line(session: Session) -> str:
    now = session.snapshot()
    clamps = sum(now["clamps"].values())
    inference = "-" if now["inference_s"] is None else f"{1e3 * now['inference_s']:.0f} ms"
    age = "-" if now["state_age_s"] is None else f"{1e3 * now['state_age_s']:.0f} ms"
    waiting = f" waiting for {now['waiting_for']}" if now["waiting_for"] else ""
    return f"{now['phase']}{waiting}; state {age}, plan {inference}, {now['plans']} plans, {clamps} clamps"


def _say_summary(summary: Mapping[str, Any], console: Console) -> None:
    late, plan = summary["jitter_ms"], summary["inference_ms"]
    console.print(
        f"loop: {summary['turns']} turns, late by {late['median']:.2f} ms (p99 {late['p99']:.2f}, "
        f"max {late['max']:.1f}), {summary['missed_deadlines']} deadlines missed"
    )
    if plan:
        age = summary["observation_age_ms"]
        console.print(
            f"policy: {summary['plans']} plans in {plan['median']:.1f} ms (p95 {plan['p95']:.1f}), from observations "
            f"{age['median']:.1f} ms old; {summary['underruns']} under-runs, {summary['missed_plans']} periods missed"
        )
    counts = {**summary["filter_clamps"], **{f"rejected: {k}": v for k, v in summary["filter_rejections"].items()}}
    shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    console.print(f"filter: {summary['filter_passed']} commands; {shown or 'nothing clamped'}")
    if summary["shadow_rad"]:
        far = summary["shadow_rad"]
        console.print(f"shadow: proposed and executed differ by {far['median']:.3f} rad (p95 {far['p95']:.3f})")
