"""The measurements behind the default settings: success in simulation after equal CPU time, one factor at a time.

    python scripts/study_defaults.py --group network --jobs 2     # one group of arms, two at a time, one thread each
    python scripts/study_defaults.py --list                       # the groups and what they vary
    python scripts/study_defaults.py --table                      # the finished rows as a Markdown table

Every arm trains from the default configuration with the overrides it names, for the same CPU time, and is evaluated on
the same fresh episodes (last checkpoint, averaged weights). Rows are appended to docs/study_defaults.jsonl; finished
arms are not run again. Demonstrations: `robopolicy collect task=<task> num_demos=200` beforehand.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROWS = Path(__file__).parents[1] / "docs" / "study_defaults.jsonl"
DEMOS = Path("demos")
FULL = {"pad_after": 15}


def arm(
    task: str = "pick_cube",
    *,
    policy: str = "diffusion",
    overrides: tuple[str, ...] = (),
    num_demos: int = 100,
    cpu_s: float = 60,
    seed: int = 1,
    demos: str = "pd_ee_delta_pos.state",
    windows: dict[str, Any] | None = None,
    **train: Any,
) -> dict[str, Any]:
    """Describe one training run: what it trains on, for how long, and what differs from the defaults."""
    return {
        "task": task,
        "policy": policy,
        "overrides": list(overrides),
        "num_demos": num_demos,
        "cpu_s": cpu_s,
        "seed": seed,
        "demos": demos,
        "windows": windows or {},
        "train": train,
    }


def groups() -> dict[str, list[dict[str, Any]]]:
    """Return the arms by the question they answer."""
    steps = {"cpu_s": 0, "num_steps": 3000}
    return {
        "network": [
            arm(policy=policy, overrides=(f"policy.prediction={kind}",), windows=FULL, lr=lr)
            for policy, kind, lr in [
                *itertools.product(
                    ("diffusion", "diffusion_unet", "diffusion_dit"), ("sample", "epsilon", "v"), (1e-3,)
                ),
                ("diffusion_unet", "epsilon", 3e-4),
                ("diffusion_dit", "sample", 3e-4),
            ]
        ],
        "windows": [
            arm(
                windows={"pad_after": after, "action_padding": padding},
                overrides=(f"policy.timing.n_action_steps={k}",),
                **steps,
            )
            for k in (8, 4)
            for after, padding in itertools.product((k - 1, 15), ("hold", "repeat"))
        ],
        "time": [arm(cpu_s=0, num_steps=n, windows=FULL) for n in (500, 1000, 2000, 4000, 8000)],
        "demos": [arm(num_demos=n, windows=FULL, seed=seed, **steps) for n in (25, 50, 100, 200) for seed in (1, 2)],
        "length": [arm(windows=FULL, demos="slow/pick_cube/pd_ee_delta_pos.state", **steps)],
        "tasks": [
            arm(task, windows=FULL, cpu_s=0, num_steps=n)
            for task, n in itertools.product(("push_cube", "stack_cube"), (3000, 8000))
        ],
    }


def run(spec: dict[str, Any], n_episodes: int) -> dict[str, Any]:
    """Train and evaluate one arm in this process; return its row."""
    import torch

    torch.set_num_threads(1)
    from accelerate import Accelerator
    from hydra import compose, initialize_config_module

    from robopolicy import envs
    from robopolicy.app.build import build_policy
    from robopolicy.data import batches, load_demonstrations
    from robopolicy.evaluation.rollout import evaluate
    from robopolicy.policies.actors import ChunkActor
    from robopolicy.policies.planners import FreshPlanner
    from robopolicy.training.ema import EMA
    from robopolicy.training.loop import train
    from robopolicy.training.optim import make_optimizer, make_scheduler

    with initialize_config_module("robopolicy.configs", version_base="1.3"):
        cfg = compose("train", [f"task={spec['task']}", f"policy={spec['policy']}", *spec["overrides"]])
    settings = {**cfg.train, **spec["train"]}
    path = DEMOS / (f"{spec['demos']}.h5" if "/" in spec["demos"] else f"{spec['task']}/{spec['demos']}.h5")
    store = load_demonstrations(path, num_episodes=spec["num_demos"])
    torch.manual_seed(spec["seed"])
    policy = build_policy(cfg.policy, store.spec)
    policy.norm.fit(store.limits())
    ema = EMA(policy, power=settings["ema_power"], max_decay=settings["ema_max_decay"])
    optimizer = make_optimizer(policy, lr=settings["lr"], weight_decay=settings["weight_decay"])
    accelerator = Accelerator(cpu=True)

    def fit(num_steps: int, dry: bool) -> tuple[float, float]:
        target, average, opt = (policy, ema, optimizer)
        if dry:  # a copy, to learn how many steps fit into the time
            import copy

            target = copy.deepcopy(policy)
            average, opt = EMA(target, power=0.75), make_optimizer(target)
        rows: list[float] = []
        begin = time.process_time()
        train(
            target,
            batches(store, policy.timing, batch_size=settings["batch_size"], seed=spec["seed"], **spec["windows"]),
            accelerator=accelerator,
            optimizer=opt,
            scheduler=make_scheduler(opt, num_steps=num_steps, warmup_steps=settings["warmup_steps"]),
            ema=average,
            num_steps=num_steps,
            seed=spec["seed"],
            grad_clip=settings["grad_clip"] or float("inf"),
            log=lambda step, metrics: rows.append(metrics.get("train/loss", 0.0)),
            save=lambda step, window: None,
        )
        return time.process_time() - begin, rows[-1]

    fit(20, dry=True)
    spent, _ = fit(100, dry=True)
    num_steps = spec["train"].get("num_steps") or max(100, int(spec["cpu_s"] / spent * 100))
    train_s, loss = fit(num_steps, dry=False)
    env = envs.make(spec["task"], num_envs=25, backend="cpu", max_episode_steps=store.spec.max_episode_steps)
    acting = ema.policy.eval()
    begin = time.process_time()
    result = evaluate(ChunkActor(FreshPlanner(acting), 25), env, seeds=range(10_000, 10_000 + n_episodes))
    low, high = result.interval
    steps = [e.first_success_step for e in result.episodes if e.first_success_step]
    return {
        **spec,
        "n_episodes": n_episodes,
        "success_once": result.success_once,
        "ci95": [round(low, 4), round(high, 4)],
        "success_at_end": result.success_at_end,
        "median_steps": sorted(steps)[len(steps) // 2] if steps else None,
        "num_steps": num_steps,
        "train_cpu_s": round(train_s, 1),
        "eval_cpu_s": round(time.process_time() - begin, 1),
        "train_loss": loss,
        "parameters": sum(p.numel() for p in acting.parameters()),
        "failed_seeds": [e.seed for e in result.episodes if not e.success_once],
    }


def key(row: dict[str, Any]) -> str:
    names = ("task", "policy", "overrides", "num_demos", "cpu_s", "seed", "demos", "windows", "train")
    return json.dumps([row[name] for name in names])


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as Markdown, training seeds pooled."""
    from robopolicy.evaluation.statistics import wilson_interval

    pooled: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        pooled[key({**row, "seed": 0})].append(row)
    lines = [
        "| task | arm | demos | steps | success_once | 95 % | n | success_at_end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for same in pooled.values():
        n = sum(row["n_episodes"] for row in same)
        hits = round(sum(row["success_once"] * row["n_episodes"] for row in same))
        low, high = wilson_interval(hits, n)
        at_end = sum(row["success_at_end"] * row["n_episodes"] for row in same) / n
        first = same[0]
        settings = [f"train.{k}={v}" for k, v in first["train"].items()]
        settings += [f"data.{k}={v}" for k, v in first["windows"].items()]
        what = ", ".join([first["policy"], *first["overrides"], *settings])
        if first["demos"] != "pd_ee_delta_pos.state":
            what += f", {first['demos']}"
        lines.append(
            f"| {first['task']} | {what} | {first['num_demos']} | {first['num_steps']} | "
            f"{hits / n:.1%} | {low:.0%}-{high:.0%} | {n} | {at_end:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", choices=sorted(groups()), nargs="*", default=[])
    parser.add_argument("--arm", help="one arm as JSON, with the keys of `arm`", default=None)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.list:
        for name, arms in groups().items():
            print(f"{name}: {len(arms)} runs")
    if args.table:
        print(table(finished()))
    wanted = [spec for name in args.group for spec in groups()[name]]
    if args.arm:
        wanted.append(arm(**json.loads(args.arm)))
    done = {key(row) for row in finished()}
    todo = [spec for spec in wanted if key(spec) not in done]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run, spec, args.episodes) for spec in todo]):
            row = future.result()
            with ROWS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(table([row]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
