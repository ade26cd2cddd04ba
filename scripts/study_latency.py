"""Success of a policy whose plans come late, by latency and by what the robot does meanwhile.

    python scripts/study_latency.py                          # all rows, about 20 s each on an idle core
    python scripts/study_latency.py --only async:400         # one row: <executor>:<milliseconds>
    python scripts/study_latency.py --shift goal_moved:2     # in a world that does not wait
    python scripts/study_latency.py --table                  # the finished rows as Markdown, and the plot
    python scripts/study_latency.py --memory 500             # memory of the process after each 25 episodes

Every row runs the same 100 episodes (seeds 10000 to 10099, the same sampling noise) of the published PickCube policy.
Executors: `async` and `sync` of `robopolicy eval`, and `lossy`, which is `async` without the correction of increments
(what has passed is simply gone), as a control. Rows are written to docs/latency.json; finished ones are not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "latency.json"
PLOT = ROOT / "docs" / "images" / "latency.png"
LATENCIES_MS = (0, 50, 100, 200, 400)
EXECUTORS = {"async": "async", "lossy": "async", "sync": "sync"}
NAMES = {
    "async": "plays on, increments corrected (async)",
    "lossy": "plays on, passed increments lost",
    "sync": "stops and thinks (sync)",
}
DEADLINE_STEPS = 40
"""A second view of the same episodes: success within 2 s."""


def run_row(executor: str, ms: float, *, checkpoint: str, shift: str | None, n_episodes: int) -> dict[str, Any]:
    """Run one cell of the table."""
    import torch

    from robopolicy.app.build import build_policy
    from robopolicy.envs import make
    from robopolicy.envs.holding import hold_action
    from robopolicy.evaluation.latency import FixedDelay, LatencyActor
    from robopolicy.evaluation.rollout import evaluate
    from robopolicy.policies.planners import FreshPlanner
    from robopolicy.training.checkpoint import load

    torch.set_num_threads(1)
    loaded = load(checkpoint, build_policy)
    loaded.policy.eval()
    env = make(loaded.spec.name, num_envs=25, backend="cpu", control_mode=loaded.spec.action.control_mode)
    if shift is not None:
        from robopolicy.envs.shifts import apply, parse_shift

        env = apply(env, parse_shift(shift))
    actor = LatencyActor(
        FreshPlanner(loaded.policy),
        env.num_envs,
        delays=FixedDelay(seconds=ms / 1e3),
        start=functools.partial(hold_action, env),
        executor=EXECUTORS[executor],
        convert=executor != "lossy",
    )
    result = evaluate(actor, env, seeds=range(10_000, 10_000 + n_episodes))
    episodes = result.episodes
    return {
        "checkpoint": Path(checkpoint).name,
        "shift": shift,
        "executor": executor,
        "latency_ms": ms,
        "n": len(episodes),
        "first_success_steps": [episode.first_success_step for episode in episodes],
        "action_jerk": sum(episode.action_jerk for episode in episodes) / len(episodes),
        "num_replans": sum(episode.num_replans for episode in episodes) / len(episodes),
        "num_hold_steps": sum(episode.num_hold_steps for episode in episodes) / len(episodes),
        "seconds": {
            "wall": result.wall_s,
            "simulation": result.simulation_s,
            "policy": result.policy_s,
            "reset": result.reset_s,
            "other": result.other_s,
        },
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def watch_memory(checkpoint: str, n_episodes: int) -> None:
    """Print what the process holds, wave by wave, through episodes of 20 control steps."""
    import torch

    from robopolicy.app.build import build_policy
    from robopolicy.envs import make
    from robopolicy.evaluation.rollout import Progress, evaluate
    from robopolicy.policies.actors import ChunkActor
    from robopolicy.policies.planners import FreshPlanner
    from robopolicy.training.checkpoint import load

    torch.set_num_threads(1)
    loaded = load(checkpoint, build_policy)
    env = make(loaded.spec.name, num_envs=25, backend="cpu", control_mode=loaded.spec.action.control_mode)

    def show(progress: Progress) -> None:
        if progress.steps_done % 20 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            print(f"{progress.episodes_started} episodes: {pages * resource.getpagesize() / 2**20:.1f} MiB", flush=True)

    actor = ChunkActor(FreshPlanner(loaded.policy.eval()), env.num_envs)
    evaluate(actor, env, seeds=range(10_000, 10_000 + n_episodes), max_episode_steps=20, on_step=show)


def finished() -> list[dict[str, Any]]:
    """Return the rows that are there."""
    rows: list[dict[str, Any]] = json.loads(ROWS.read_text())["rows"] if ROWS.is_file() else []
    return rows


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["checkpoint"], row["shift"], row["executor"], row["latency_ms"], row["n"]


def rates(row: dict[str, Any], within: int | None = None) -> tuple[int, tuple[float, float]]:
    """Return the number of successes (within so many steps) and the Wilson 95 % interval of their rate."""
    from robopolicy.evaluation.statistics import wilson_interval

    count = sum(step is not None and (within is None or step <= within) for step in row["first_success_steps"])
    return count, wilson_interval(count, row["n"])


def table(rows: list[dict[str, Any]]) -> str:
    """Return the finished rows as Markdown tables, one per world."""
    lines = []
    for shift in dict.fromkeys(row["shift"] for row in rows):
        lines += [
            "",
            f"World: {shift or 'as trained'}",
            "",
            "| during inference | latency | success (95 % interval) | within 2 s | steps | plans | holds | jerk |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for executor in EXECUTORS:
            for row in sorted((r for r in rows if (r["shift"], r["executor"]) == (shift, executor)), key=key):
                count, (low, high) = rates(row)
                quick, (quick_low, quick_high) = rates(row, DEADLINE_STEPS)
                steps = [step for step in row["first_success_steps"] if step is not None]
                lines.append(
                    f"| {NAMES[executor]} | {row['latency_ms']:g} ms | {100 * count / row['n']:.0f} % "
                    f"({100 * low:.0f} to {100 * high:.0f}) | {100 * quick / row['n']:.0f} % "
                    f"({100 * quick_low:.0f} to {100 * quick_high:.0f}) | "
                    f"{sum(steps) / len(steps) if steps else float('nan'):.0f} | {row['num_replans']:.1f} | "
                    f"{row['num_hold_steps']:.0f} | {row['action_jerk']:.3f} |"
                )
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]]) -> None:
    """Draw success over latency with its interval: all the time there is, and within 2 s."""
    from matplotlib.figure import Figure

    worlds = list(dict.fromkeys(row["shift"] for row in rows))
    figure = Figure(figsize=(8, 3.2 * len(worlds)), layout="constrained")
    axes = figure.subplots(len(worlds), 2, sharey=True, squeeze=False)
    for shift, line in zip(worlds, axes, strict=True):
        for axis, within in zip(line, (None, DEADLINE_STEPS), strict=True):
            for k, (executor, colour) in enumerate(zip(EXECUTORS, ("#3b82f6", "#8a8f98", "#f59e0b"), strict=True)):
                mine = [r for r in rows if r["shift"] == shift and (r["executor"] == executor or not r["latency_ms"])]
                mine = sorted(mine, key=lambda r: r["latency_ms"])  # without latency all executors are one
                found = [rates(row, within) for row in mine]
                centre = [100 * count / row["n"] for (count, _), row in zip(found, mine, strict=True)]
                sides = [
                    [max(0.0, c - 100 * low), max(0.0, 100 * high - c)]
                    for c, (_, (low, high)) in zip(centre, found, strict=True)
                ]
                at = [row["latency_ms"] + 4 * (k - 1) for row in mine]
                bars = list(zip(*sides, strict=True))
                axis.errorbar(at, centre, yerr=bars, color=colour, marker="o", capsize=3, label=NAMES[executor])
            span = "within the episode" if within is None else "within 2 s"
            axis.set_title(f"{shift or 'as trained'}: success {span}", fontsize=10)
            axis.set_xlabel("inference latency / ms")
            axis.set_ylim(0, 102)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("success / %")
    axes[0][0].legend(fontsize=8, loc="lower left")
    figure.savefig(PLOT, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/zoo/pick_cube-diffusion")
    parser.add_argument("--shift", help="perturb the environment: <name>:<level>")
    parser.add_argument("--only", help="<executor>:<milliseconds>")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--table", action="store_true", help="print the finished rows, draw the plot, and stop")
    parser.add_argument("--memory", type=int, metavar="EPISODES", help="watch the memory of the process, and stop")
    args = parser.parse_args()
    if args.memory:
        watch_memory(args.checkpoint, args.memory)
        return
    rows = finished()
    if not args.table:
        wanted = [(executor, ms) for ms in LATENCIES_MS for executor in EXECUTORS if ms or executor == "async"]
        if args.only:
            executor, ms = args.only.split(":")
            wanted = [(executor, float(ms))]
        for executor, ms in wanted:
            name = key(
                {
                    "checkpoint": Path(args.checkpoint).name,
                    "shift": args.shift,
                    "executor": executor,
                    "latency_ms": ms,
                    "n": args.episodes,
                }
            )
            if name in {key(row) for row in rows}:
                continue
            row = run_row(executor, ms, checkpoint=args.checkpoint, shift=args.shift, n_episodes=args.episodes)
            rows = [*finished(), row]  # another process may have added some
            ROWS.write_text(json.dumps({"format": "robopolicy-latency-study/1", "rows": rows}, separators=(",", ":")))
            print(f"{executor} {ms:g} ms: {rates(row)[0]} of {row['n']} in {row['seconds']['wall']:.0f} s", flush=True)
    print(table(rows))
    plot(rows)


if __name__ == "__main__":
    main()
