"""Measure how fast parts of robopolicy run on this machine, against what they replace."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from robopolicy.envs.benchmark import Speed

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy bench", "steps per second of the simulation: one environment, processes, and our batch"),
    ("robopolicy bench tasks=[stack_cube] control_modes=[pd_ee_delta_pose] num_envs=[16]", "one task and one size"),
    ("ROBOPOLICY_SIM_THREADS=1 robopolicy bench --json", "on one core, as JSON"),
    (
        "robopolicy bench latency checkpoint=pick_cube success_episodes=100 out=latency",
        "milliseconds per tick by engine and sampler; latency.json and a plot of success against latency",
    ),
)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the benchmarks `cfg.what` and print their tables."""
    from robopolicy.errors import UnknownNameError

    wanted = [cfg.what] if isinstance(cfg.what, str) else list(cfg.what)
    for name in wanted:
        if name not in BENCHMARKS:
            raise UnknownNameError("benchmark", name, BENCHMARKS)
    results = {name: BENCHMARKS[name](cfg) for name in wanted}
    return results[wanted[0]] if len(wanted) == 1 else results


def _latency(cfg: DictConfig) -> dict[str, Any]:
    from rich.console import Console

    from robopolicy.app.bench_latency import measure

    return measure(cfg, Console(stderr=True, highlight=False))


def _sim(cfg: DictConfig) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from robopolicy.envs import find_task
    from robopolicy.envs.benchmark import measure
    from robopolicy.envs.physx_threads import thread_count

    console, rows = Console(stderr=True, highlight=False), []
    for name in cfg.tasks:
        task = find_task(name)
        for mode in cfg.control_modes:
            rounds = measure(task.env_id, mode, num_envs=cfg.num_envs, rounds=cfg.rounds, seconds=cfg.seconds)
            speeds: list[Speed] = []
            with console.status(f"{task.name}, {mode}") as status:
                for done, latest in enumerate(rounds, start=1):
                    speeds = latest
                    status.update(f"{task.name}, {mode}: round {done} of {cfg.rounds}")
            table = Table(title=f"{task.name}, {mode}, {thread_count()} threads", title_justify="left")
            for column in ("", "steps/s", "x one environment", "x processes", "time over PhysX alone"):
                table.add_column(column, justify="right" if column else "left")
            for speed in speeds:
                row = _row(speed, speeds)
                rows.append({"task": task.name, "control_mode": mode, **row})
                over = "" if row["over_physx"] is None else f"{row['over_physx']:.2f}"
                table.add_row(
                    speed.name, f"{speed.median:,.0f}", f"{row['x_single']:.2f}", f"{row['x_processes']:.2f}", over
                )
            console.print(table)
    return {"what": "sim", "threads": thread_count(), "rounds": cfg.rounds, "seconds": cfg.seconds, "rows": rows}


def _row(speed: Speed, speeds: list[Speed]) -> dict[str, Any]:
    single, processes = speeds[:2]
    return {
        "name": speed.name,
        "num_envs": speed.num_envs,
        "steps_per_s": speed.median,
        "x_single": speed.ratio(single),
        "x_processes": speed.ratio(processes),
        "over_physx": statistics.median(speed.over_physx) if speed.over_physx else None,
    }


BENCHMARKS = {"sim": _sim, "latency": _latency}
"""What can be measured."""
