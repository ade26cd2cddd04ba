"""What `robopolicy deploy` does once the robot is connected: arms it, shows what goes on, asks, counts, says."""

from __future__ import annotations

import contextlib
import queue
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robopolicy.errors import RobopolicyError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from robopolicy.deploy.contract import Plan
    from robopolicy.deploy.remote import RemoteRobot
    from robopolicy.deploy.robot import RobotFile
    from robopolicy.deploy.session import Session
    from robopolicy.policies.planners import Planner
    from robopolicy.training.checkpoint import LoadedPolicy

READY_S = 10.0
POLL_S = 0.05
SETTLE_S = 0.25
"""Between the end of an episode, or a reset, and what comes next: repeated stops and old states pass by."""
RECORDINGS = Path("outputs/deploy")


def play(
    cfg: DictConfig, file: RobotFile, loaded: LoadedPolicy, planner: Planner, robot: RemoteRobot, console: Console
) -> dict[str, Any]:
    """Run mode shadow, step or live; `ok` in what is returned says whether nothing went wrong.

    Raises:
        RobopolicyError: a setting that cannot work, or the robot does not get ready.
    """
    from robopolicy.deploy.realtime import real_time
    from robopolicy.deploy.session import Session, quiet_collector
    from robopolicy.training.fit import threads

    def confirm(plan: Plan) -> bool:
        return console.input(f"chunk of {len(plan.chunk)} actions, {plan.inference_s:.3f} s: play it? [y/N] ") == "y"

    with threads(1):
        session = Session(
            robot,
            file,
            planner,
            mode=cfg.mode,
            executor=cfg.executor,
            n_action_steps=cfg.n_action_steps,
            speed=cfg.speed,
            seam_blend_s=cfg.seam_blend_s,
            ensemble_decay=cfg.ensemble_decay,
            optional=loaded.policy.optional,
            force=cfg.force,
            confirm=confirm,
        )
        with contextlib.ExitStack() as stack:
            about = _about(cfg, file, loaded)
            recorded = _watched(cfg, session, about, console, stack)
            _say_limits(file, session, console)
            if cfg.mode == "live" and cfg.arm == "ask":
                console.input("[bold]The arm will move.[/] Hand on the emergency stop? [Enter] arms, Ctrl-C leaves ")
            left = stack.enter_context(signals(session))
            stack.enter_context(quiet_collector())
            scheduling = stack.enter_context(real_time(cfg.real_time))
            console.print(f"loop at {file.command.rate_hz:g} Hz with {scheduling}")
            stack.callback(session.close)
            session.open()
            try:
                result = (_episodes if cfg.episodes else _until_stopped)(cfg, robot, session, left, console)
            except BaseException as error:
                session.stop(f"deploy fails: {type(error).__name__}: {error}")
                raise
        if recorded:
            console.print(f"wrote [bold]{recorded}[/]; `robopolicy deploy checkpoint=... replay={recorded}` repeats it")
        return {**result, "scheduling": scheduling, "recording": recorded, "effective": about}


def _about(cfg: DictConfig, file: RobotFile, loaded: LoadedPolicy) -> dict[str, Any]:
    """Return the effective values: what a recording is of."""
    from omegaconf import OmegaConf

    from robopolicy import __version__
    from robopolicy.evaluation.results import sha256

    settings = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(settings, dict)
    return {
        "robopolicy_version": __version__,
        "checkpoint": str(loaded.path),
        "weights_sha256": sha256(loaded.path / "model.safetensors"),
        "task_spec": loaded.spec.to_dict(),
        "robot": file.to_dict(),
        "settings": {key: value for key, value in settings.items() if key not in ("robot", "bridge")},
        "bridge_url": cfg.bridge.url,
    }


def _watched(
    cfg: DictConfig, session: Session, about: Mapping[str, Any], console: Console, stack: contextlib.ExitStack
) -> str | None:
    """Start the recording and the live page that `cfg` asks for; return the recording's path."""
    path = None
    if cfg.record:
        from robopolicy.deploy.recording import McapRecorder

        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{Path(str(about['checkpoint'])).name}.mcap"
        path = RECORDINGS / name if cfg.record == "auto" else Path(cfg.record)
        recorder = stack.enter_context(McapRecorder(path, joints=session.file.joints, about=about))
        session.add_recorder(recorder)
    if cfg.live:
        from robopolicy.deploy.live import LivePage

        page = LivePage(session, joints=session.file.joints, port=cfg.live_port)
        session.add_recorder(page)
        stack.callback(page.close)
        console.print(f"live page with STOP: {page.start()}")
    return None if path is None else str(path)


@contextlib.contextmanager
def signals(session: Session) -> Iterator[threading.Event]:
    """Stop the robot at once on Ctrl-C, SIGTERM and SIGHUP; the event says that it is time to leave.

    A thread of its own does it: a handler runs in the midst of whatever the main thread does, locks held and all.
    """
    left = threading.Event()
    arrived: queue.SimpleQueue[str] = queue.SimpleQueue()

    def stop() -> None:
        while name := arrived.get():
            session.stop(name)
            left.set()

    stopper = threading.Thread(target=stop, name="signals", daemon=True)
    stopper.start()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {n: signal.signal(n, lambda number, _: arrived.put(signal.Signals(number).name)) for n in numbers}
    try:
        yield left
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        arrived.put("")
        stopper.join(1.0)


def _say_limits(file: RobotFile, session: Session, console: Console) -> None:
    safety, command = file.safety, file.command
    console.print(
        f"{file.name}: {command.interface} on {command.topic} at {command.rate_hz:g} Hz; speed {session.speed:g}, "
        f"tool at most {safety.tcp_speed_m_s * session.speed:g} m/s within {list(safety.workspace_low_m)} to "
        f"{list(safety.workspace_high_m)} m; states at most {file.watchdogs.state_age_s:g} s old"
    )


def _until_stopped(
    cfg: DictConfig, robot: RemoteRobot, session: Session, left: threading.Event, console: Console
) -> dict[str, Any]:
    """Play until Ctrl-C or for `duration_s`; after a latched stop the operator may arm again."""
    if why := session.begin_within(READY_S, cfg.seed):
        raise RobopolicyError(f"The robot is not ready after {READY_S:g} s: {why}.")
    begun_s = time.monotonic()
    with console.status("") as status:
        while not left.is_set() and (cfg.duration_s is None or time.monotonic() - begun_s < cfg.duration_s):
            status.update(_line(session))
            if session.stopped.wait(POLL_S) and not left.is_set():
                status.stop()
                console.print(f"[red]stopped[/]: {session.stop_reason}")
                if not _arms_again(session, left, console):
                    break
                status.start()
    why = session.stop_reason
    session.end()
    summary = session.summary()
    _say_summary(summary, console)
    return {"ok": not why or left.is_set(), "stop_reason": why, **summary}


def _arms_again(session: Session, left: threading.Event, console: Console) -> bool:
    """Wait after a stop until the operator arms again, here or on the page, or leaves; say whether it goes on."""
    if not sys.stdin.isatty():
        return False
    console.print("[Enter] arms again, q leaves")
    while not left.is_set():
        if not session.stopped.is_set():  # armed on the page
            return True
        if not select.select([sys.stdin], [], [], POLL_S)[0]:
            continue
        if sys.stdin.readline().strip() == "q":
            return False
        if why := session.rearm():
            console.print(f"not yet: {why}")
    return False


def _episodes(
    cfg: DictConfig, robot: RemoteRobot, session: Session, left: threading.Event, console: Console
) -> dict[str, Any]:
    """Play episodes on the simulated robot, in real time, and count the successes."""
    from rich.progress import Progress

    from robopolicy.evaluation.statistics import wilson_interval

    rows: list[dict[str, Any]] = []
    successes = 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("0 succeeded", total=cfg.episodes)
        for seed in range(cfg.seed, cfg.seed + cfg.episodes):
            session.episode = f"{len(rows) + 1} of {cfg.episodes}, seed {seed}"
            time.sleep(SETTLE_S)
            robot.call("/simrobot/reset", {"seed": seed}, timeout_s=20.0)
            _await_scene(robot, session, time.monotonic())
            if left.is_set():
                break
            if why := session.begin_within(READY_S, seed):
                raise RobopolicyError(f"The robot is not ready after {READY_S:g} s: {why}.")
            row = _episode(robot, session, cfg.max_episode_s / cfg.speed)
            session.end()
            rows.append({"seed": seed, **row})
            successes += row["success"]
            bar.update(task, advance=1, description=f"{successes} succeeded")
            if left.is_set() or (row["stop_reason"] and not cfg.rearm):
                break
    summary, n = session.summary(), len(rows)
    stops = [row["stop_reason"] for row in rows if row["stop_reason"]]
    if n:
        low, high = wilson_interval(successes, n)
        console.print(
            f"[bold]{100 * successes / n:.0f} % success[/] ({successes} of {n}), 95 % interval {100 * low:.0f} to "
            f"{100 * high:.0f} %, in real time with executor {session.executor}"
        )
        summary |= {"pc_success": 100 * successes / n, "pc_success_ci95": [100 * low, 100 * high]}
    _say_summary(summary, console)
    for reason in stops:
        console.print(f"[red]stopped[/]: {reason}")
    return {
        "ok": not stops and n == cfg.episodes,
        "n_episodes": n,
        "n_success": successes,
        "n_stopped": len(stops),
        "episodes": rows,
        **summary,
    }


def _await_scene(robot: RemoteRobot, session: Session, since_s: float) -> None:
    """Wait until every stream, also a goal that is told seldom, has said something of the scene since `since_s`."""
    until_s = since_s + READY_S
    time.sleep(SETTLE_S)
    for name in session.builder.required:
        while not any(sample.arrival_s > since_s for sample in robot.samples(name)):
            if time.monotonic() > until_s:
                raise RobopolicyError(f"Nothing on stream {name!r} within {READY_S:g} s of the reset.")
            time.sleep(0.01)


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
    lacking = f", without {now['missing']}" if now["missing"] else ""
    waiting = f" waiting for {now['waiting_for']}" if now["waiting_for"] else ""
    return f"{now['phase']}{waiting}; state {age}, plan {inference}, {now['plans']} plans{lacking}, {clamps} clamps"


def _say_summary(summary: Mapping[str, Any], console: Console) -> None:
    late, plan = summary["jitter_ms"], summary["inference_ms"]
    console.print(
        f"loop: {summary['turns']} turns, late by {late['median']:.2f} ms (p99 {late['p99']:.2f}, "
        f"max {late['max']:.1f}), {summary['missed_deadlines']} deadlines missed ({summary['missed_without_cpu']} "
        "for want of a processor)"
    )
    if plan:
        age = summary["observation_age_ms"]
        console.print(
            f"policy: {summary['plans']} plans in {plan['median']:.1f} ms (p95 {plan['p95']:.1f}), from observations "
            f"{age['median']:.1f} ms old; {summary['underruns']} under-runs, {summary['missed_plans']} periods missed"
        )
    for name, count in summary["plans_without"].items():
        console.print(f"policy: {count} of {summary['plans']} plans without {name}, whose stream was silent")
    counts = {**summary["filter_clamps"], **{f"rejected: {k}": v for k, v in summary["filter_rejections"].items()}}
    shown = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    console.print(f"filter: {summary['filter_passed']} commands; {shown or 'nothing clamped'}")
    if summary["arm_lag_s"] is not None:
        lag_ms = 1e3 * summary["arm_lag_s"]
        console.print(f"the arm follows what is sent after {lag_ms:.0f} ms; arm_lag_s of the robot file should say so")
    if summary["shadow_rad"]:
        far = summary["shadow_rad"]
        console.print(f"shadow: proposed and executed differ by {far['median']:.3f} rad (p95 {far['p95']:.3f})")
