"""Is a factorised policy better with few demonstrations, and when a sensor fails? Against controls that could say no.

    python scripts/study_fdp.py low_data                      # success by number of demonstrations, all arms
    python scripts/study_fdp.py shifts                        # success with disturbed object observations, 50 of them
    python scripts/study_fdp.py weights                       # success by residual weight at run time
    python scripts/study_fdp.py orders                        # each modality first: held-out loss and success
    python scripts/study_fdp.py cost                          # parameters and milliseconds per forward pass
    python scripts/study_fdp.py low_data --tasks push_cube --demos 10 --arms fdp diffusion --seeds 1
    python scripts/study_fdp.py table                         # the finished rows as Markdown
    python scripts/study_fdp.py plot                          # the clean rows: docs/fdp_low_data.png

Every arm is trained on the same demonstrations, of which it does not see the last tenth (the base of fdp ends early by
them), for the same number of updates, both stages of fdp counted: `diffusion` is so the step-matched control, and
`diffusion_half` has the updates of one stage. All networks are MLPs of width 256 in place of 384 (each stack of fdp;
`diffusion_wide` has fdp's parameters), which halves the cost. Every cell is the same episodes (seeds from 10000), each
of LIMITS' steps: demonstrations need half as many, and a robot that missed waits. Runs are kept in
checkpoints/study_fdp, rows in docs/fdp.json; what is there is not done again, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from robopolicy import atomic
from robopolicy.app import composing
from robopolicy.app.build import build_policy
from robopolicy.data import load_demonstrations
from robopolicy.evaluation.statistics import paired_difference_interval, wilson_interval
from robopolicy.training import checkpoint

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "fdp.json"
RUNS = Path("checkpoints") / "study_fdp"
TASKS = ("pick_cube", "push_cube", "stack_cube")
DEMOS = (10, 25, 50, 100)
SEEDS = (1, 2)
SHIFTS = tuple(f"{kind}_objects:{level}" for kind in ("freeze", "noise", "dropout") for level in (1, 2, 3))
LIMITS = {"pick_cube": 60, "push_cube": 60, "stack_cube": 100, "two_goal": 50}
DOUBT = "+policy.encoder.screen.doubt_above=4"
MLP = ("policy.network.width=256", "policy.network.cond_width=128")
STACKS = ("policy.network.network.width=256", "policy.network.network.cond_width=128")
NOISE = "policy.encoder.screen.noise.proprio=0.1"
NO_NOISE = "policy.encoder.screen.noise.proprio=0"
QUARTER = "train.stages=[0.25,0.75]"
BLOCK = ("policy.network.composition=block",)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A policy as it is trained, and how it is evaluated besides as trained."""

    policy: str
    overrides: tuple[str, ...] = ()
    share: float = 1.0
    """Of the updates of the others."""
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Name to what evaluation changes."""


FULL = ("policy.encoder.screen.dropout=0", NOISE)
"""Of diffusion_dropout: nothing is dropped, proprioception is as noisy in training as that of fdp."""
ARMS = {
    "diffusion": Arm(policy="diffusion", overrides=MLP),
    "diffusion_noise": Arm(policy="diffusion_dropout", overrides=(*MLP, *FULL)),
    "diffusion_half": Arm(policy="diffusion_dropout", overrides=(*MLP, *FULL), share=0.5),
    "diffusion_wide": Arm(
        policy="diffusion_dropout", overrides=("policy.network.width=390", "policy.network.cond_width=192", *FULL)
    ),
    "diffusion_dropout_10": Arm(
        policy="diffusion_dropout",
        overrides=(*MLP, NOISE, "policy.encoder.screen.dropout=0.1"),
        variants={"doubt": (DOUBT,)},
    ),
    "diffusion_dropout_30": Arm(policy="diffusion_dropout", overrides=(*MLP, NOISE), variants={"doubt": (DOUBT,)}),
    "diffusion_guided": Arm(policy="diffusion_guided", overrides=(*STACKS, NOISE), variants={"doubt": (DOUBT,)}),
    "diffusion_base": Arm(policy="diffusion_dropout", overrides=(*MLP, *FULL, "policy.encoder.use=[proprio]")),
    "fdp": Arm(policy="fdp", overrides=(*STACKS, NOISE), variants={"doubt": (DOUBT,)}),
    "fdp_output": Arm(policy="fdp_output", overrides=(*STACKS, NOISE), variants={"doubt": (DOUBT,)}),
    "fdp_block": Arm(policy="fdp", overrides=(*STACKS, NOISE, *BLOCK, QUARTER), variants={"doubt": (DOUBT,)}),
    "fdp_block_short": Arm(policy="fdp", overrides=(*STACKS, NOISE, *BLOCK)),
    "fdp_long": Arm(policy="fdp", overrides=(*STACKS, NOISE, QUARTER)),
    "fdp_quiet": Arm(policy="fdp", overrides=(*STACKS, NO_NOISE)),
    "fdp_objects_first": Arm(policy="fdp", overrides=(*STACKS, NOISE, "policy.encoder.order=[[objects]]")),
    "fdp_sum": Arm(policy="fdp_sum", overrides=(*STACKS, NOISE, "train.stages=[0.5,0.5]")),
}
CONTROLS = ("diffusion", "diffusion_noise", "diffusion_half", "diffusion_wide", "diffusion_dropout_10")
"""Differences to these are in the tables."""
SHOWN = ("fdp", "fdp_output", "fdp_block", "diffusion_noise", "diffusion_wide", "diffusion", "diffusion_base")
"""Arms in the plot."""


def train(task: str, name: str, demos: int, seed: int, steps: int, extra: Sequence[str] = ()) -> Path:
    """Return the run folder of an arm, trained if it was not."""
    from robopolicy.app import train as verb

    arm = ARMS[name]
    label = "".join(c if c.isalnum() else "_" for c in "-".join(extra))
    run = "-".join([task, name, str(demos), f"s{seed}", str(steps), *([label] if label else [])])
    folder, num_steps = RUNS / run, max(2, round(arm.share * steps))
    where = [f"run={run}", f"checkpoints_dir={RUNS}"]
    if (folder / "last").exists():
        last = checkpoint.resolve(folder)
        if checkpoint.read_config(last)["step"] >= num_steps:
            return folder
        words = ["resume=true", *where]
    else:
        words = [f"task={task}", f"policy={arm.policy}", *arm.overrides, *extra, *where, f"seed={seed}"]
        words += [f"data.num_episodes={demos}", "train.val_fraction=0.1", f"train.num_steps={num_steps}"]
        words += ["train.save_every=1000000", "train.validate_every=200", "train.keep=1"]
    if isinstance(verb.run(composing.compose("train", words)), int):
        raise SystemExit("stopped; the next call goes on")
    for state in folder.glob("step_*/training_state"):
        shutil.rmtree(state)  # three times the policy's size
    return folder


def cell(
    study: str, task: str, name: str, demos: int, seed: int, args: argparse.Namespace, shift: str, variant: str = "",
    changes: Sequence[str] = (), extra: Sequence[str] = (),
) -> None:  # fmt: skip
    """Train, evaluate and write one row, unless it is there."""
    from robopolicy.app import eval as verb

    key = {"study": study, "task": task, "arm": name, "variant": variant, "demos": demos, "seed": seed}
    key |= {"shift": shift, "steps": args.steps, "n_episodes": args.episodes}
    if any(all(row.get(k) == v for k, v in key.items()) for row in read()["rows"]):
        return
    folder = train(task, name, demos, seed, args.steps, extra)
    words = [f"checkpoint={folder}", f"n_episodes={args.episodes}", "stop_on_success=true", *changes]
    words += [f"max_episode_steps={LIMITS[task]}"]
    words += [] if shift == "clean" else [f"shift={shift}"]
    where = Path(verb.run_one(composing.compose("eval", words), quiet=True, keep=True)["folder"])
    episodes = [json.loads(line) for line in (where / "episodes.jsonl").read_text().splitlines()]
    failed = [e["seed"] for e in episodes if not e["success"]]
    said = [e["diagnostics"].get("missing_objects") for e in episodes if e.get("diagnostics")]
    row = {**key, "success": 1 - len(failed) / len(episodes), "failed_seeds": failed}
    if said := [value for value in said if value is not None]:
        row["missing_objects"] = round(statistics.fmean(said), 4)
    with locked():
        found = read()
        found["rows"].append(row)
        write(found)
    print(*key.values(), f"{row['success']:.1%}", flush=True)


def low_data(args: argparse.Namespace) -> None:
    """Success by number of demonstrations."""
    for demos, seed, task, name in _grid(args, args.demos):
        cell("low_data", task, name, demos, seed, args, "clean")


def shifts(args: argparse.Namespace) -> None:
    """Success with disturbed observations of the objects, which come second in the order."""
    for demos, seed, task, name in _grid(args, args.demos or (50,)):
        for shift in ("clean", *args.shifts):
            cell("shifts", task, name, demos, seed, args, shift)
            for variant, changes in ARMS[name].variants.items():
                cell("shifts", task, name, demos, seed, args, shift, variant, changes)


def weights(args: argparse.Namespace) -> None:
    """Success by residual weight."""
    for demos, seed, task, name in _grid(args, args.demos or (50,), ("fdp", "fdp_output")):
        for w in (0.0, 0.25, 0.5, 0.75, 1.0):
            changes = [f"+policy.encoder.residual_weight={w}"]
            cell("weights", task, name, demos, seed, args, "clean", f"w={w}", changes)


def orders(args: argparse.Namespace) -> None:
    """Every modality first: does the one with the lowest held-out loss of its base also succeed most?"""
    for demos, seed, task, name in _grid(args, args.demos or (50,), ("fdp",)):
        path = Path("demos") / task / "pd_ee_delta_pos.state.h5"
        for first in load_demonstrations(path, spec=None, num_episodes=1).spec.observation:
            extra = [f"policy.encoder.order=[[{first}]]", "train.early_stop=1000000"]
            cell("orders", task, name, demos, seed, args, "clean", f"{first} first", extra=extra)
            folder = train(task, name, demos, seed, args.steps, extra)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            losses = [row["val/loss"] for row in rows if "val/loss" in row and row["step"] <= args.steps // 2]
            found = read()
            found.setdefault("order_losses", {})[f"{task} {demos} s{seed} {args.steps} {first}"] = min(losses)
            write(found)


def cost(args: argparse.Namespace) -> None:
    """Parameters and forward passes, taking turns, against the same-width policy."""
    spec = load_demonstrations(Path("demos/pick_cube/pd_ee_delta_pos.state.h5"), spec=None, num_episodes=1).spec
    torch.set_num_threads(1)
    names = (
        "diffusion",
        "fdp",
        "fdp_output",
        "diffusion_wide",
        "diffusion_dit",
        "fdp_dit",
        "diffusion_unet",
        "fdp_unet",
    )
    calls: dict[str, Callable[[], object]] = {}
    sizes = {}
    for name in names:
        policy: Any = build_policy(composing.compose("train", [f"policy={name}"]).policy, spec)
        policy.set_stage(policy.num_stages - 1)
        policy.eval().requires_grad_(False)
        sizes[name] = sum(p.numel() for p in policy.parameters())
        for batch in (1, 64):
            x = torch.randn(batch, policy.timing.horizon, spec.action.dim)
            parts = policy.network.condition(torch.full((batch,), 50), torch.randn(batch, policy.encoder.out_dim))
            calls[f"{name} {batch}"] = lambda net=policy.network, x=x, parts=parts: net.denoise(x, *parts)
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for turn in range(args.rounds + 3):
            for name, call in calls.items():
                begin = time.process_time()
                for _ in range(5):
                    call()
                if turn >= 3:
                    times[name].append((time.process_time() - begin) / 5)
    ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    with locked():
        found = read()
        found["cost"] = {
            name: {
                "parameters": sizes[name],
                **{f"ms_batch_{batch}": round(ms[f"{name} {batch}"], 4) for batch in (1, 64)},
                **{
                    f"x_same_width_batch_{batch}": round(ms[f"{name} {batch}"] / ms[f"{_plain(name)} {batch}"], 2)
                    for batch in (1, 64)
                },
            }
            for name in names
        }
        write(found)
    print(json.dumps(found["cost"], indent=1))


def _plain(name: str) -> str:
    return {"dit": "diffusion_dit", "unet": "diffusion_unet"}.get(name.rpartition("_")[2], "diffusion")


def _grid(
    args: argparse.Namespace, demos: Sequence[int], arms: Sequence[str] = tuple(ARMS)
) -> Iterator[tuple[int, int, str, str]]:
    """Yield (demonstrations, seed, task, arm): first one seed of everything."""
    for seed in args.seeds:
        for count in demos or DEMOS:
            for task in args.tasks:
                for name in args.arms or arms:
                    yield count, seed, task, name


def table() -> str:
    """Return the rows as Markdown, a table for each study, task, number of demonstrations and shift."""
    rows, lines = read()["rows"], []
    groups = dict.fromkeys((r["study"], r["task"], r["demos"], r["shift"], r["steps"], r["n_episodes"]) for r in rows)
    for study, task, demos, shift, steps, n in groups:
        same = [r for r in rows if (r["study"], r["task"], r["demos"], r["shift"], r["steps"]) ==
                (study, task, demos, shift, steps) and r["n_episodes"] == n]  # fmt: skip
        lines += [f"**{study}: {task}, {demos} demonstrations, {shift}** ({steps} updates, {n} episodes per seed)", ""]
        lines += ["| arm | seeds | success | 95 % | " + " | ".join(f"less {name}" for name in CONTROLS) + " |"]
        lines += ["|---" * (4 + len(CONTROLS)) + "|"]
        for arm, variant in dict.fromkeys((r["arm"], r["variant"]) for r in same):
            mine = {r["seed"]: r for r in same if (r["arm"], r["variant"]) == (arm, variant)}
            hits = sum(n - len(r["failed_seeds"]) for r in mine.values())
            low, high = wilson_interval(hits, n * len(mine))
            against = [
                _less(mine, {r["seed"]: r for r in same if (r["arm"], r["variant"]) == (c, "")}) for c in CONTROLS
            ]
            lines.append(
                f"| {arm} {variant} | {len(mine)} | {hits / n / len(mine):.1%} | {low:.0%}-{high:.0%} | "
                f"{' | '.join(against)} |"
            )
        lines.append("")
    lines += [
        "**pooled, 10 and 25 demonstrations, clean**",
        "",
        "| | cells | episodes | points (95 %) |",
        "|---|---|---|---|",
    ]
    lines += [pooled(["low_data"], (10, 25), ("clean",), arm) for arm in ("fdp", "fdp_block")]
    for demos in ((10, 25, 50, 100), (50, 100)):
        lines += ["", f"**pooled, {demos} demonstrations, clean**", "", pooled(["low_data"], demos, ("clean",), "fdp")]
    return "\n".join(lines)


def pooled(studies: Sequence[str], demos: Sequence[int], shifts: Sequence[str], arm: str, variant: str = "") -> str:
    """Return Markdown: an arm less each control over all cells that both have, tasks and training seeds together."""
    lines = []
    for control in CONTROLS:
        counts, cells = [0, 0, 0, 0], 0
        rows = [r for r in read()["rows"] if r["demos"] in demos and r["shift"] in shifts and r["study"] in studies]
        theirs = {_place(r): r for r in rows if (r["arm"], r["variant"]) == (control, "")}
        for row in rows:
            if (row["arm"], row["variant"]) == (arm, variant) and _place(row) in theirs:
                counts = [c + f for c, f in zip(counts, _pairs(row, theirs[_place(row)]), strict=True)]
                cells += 1
        if cells:
            lines.append(f"| {arm} {variant} less {control} | {cells} | {sum(counts)} | {_said(counts)} |")
    return "\n".join(lines)


def _place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("study", "task", "demos", "seed", "shift", "steps", "n_episodes"))


def _less(mine: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> str:
    """Return the paired difference in points, with its 95 % interval, over the training seeds that both have."""
    counts = [0, 0, 0, 0]
    for seed in mine.keys() & theirs.keys():
        counts = [c + f for c, f in zip(counts, _pairs(mine[seed], theirs[seed]), strict=True)]
    return "-" if not sum(counts) or mine == theirs else _said(counts)


def _pairs(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Return of how many episodes both, only mine, only theirs and neither succeed."""
    a, b = set(mine["failed_seeds"]), set(theirs["failed_seeds"])
    return mine["n_episodes"] - len(a | b), len(b - a), len(a - b), len(a & b)


def _said(counts: Sequence[int]) -> str:
    low, high = paired_difference_interval(*counts)
    return f"{100 * (counts[1] - counts[2]) / sum(counts):+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def plot(path: Path) -> None:
    """Draw success by number of demonstrations, a panel per task, with Wilson intervals over all training seeds."""
    from matplotlib.figure import Figure

    rows = [r for r in read()["rows"] if r["study"] == "low_data" and not r["variant"]]
    figure = Figure(figsize=(4 * len(TASKS), 3.6), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(TASKS), sharey=True), TASKS, strict=True):
        arms = [name for name in SHOWN if any(r["task"] == task and r["arm"] == name for r in rows)]
        for place, name in enumerate(arms):
            mine = [r for r in rows if r["task"] == task and r["arm"] == name]
            spots, rates, errors = [], [], []
            for spot, demos in enumerate(DEMOS):
                same = [r for r in mine if r["demos"] == demos]
                if same:
                    n = sum(r["n_episodes"] for r in same)
                    rate = 1 - sum(len(r["failed_seeds"]) for r in same) / n
                    low, high = wilson_interval(round(rate * n), n)
                    spots.append(spot + 0.07 * (place - (len(arms) - 1) / 2))
                    rates.append(100 * rate)
                    errors.append((100 * (rate - low), 100 * (high - rate)))
            axes.errorbar(
                spots,
                rates,
                [list(e) for e in zip(*errors, strict=True)],
                fmt="o-",
                ms=4,
                lw=1,
                color=f"C{SHOWN.index(name)}",
                label=name,
            )
        axes.set_xticks(range(len(DEMOS)), [str(demos) for demos in DEMOS])
        axes.set(title=task, xlabel="demonstrations", xlim=(-0.5, len(DEMOS) - 0.5), ylim=(-3, 103))
    figure.axes[0].set_ylabel("success, %")
    pairs = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    found = {label: handle for handle, label in pairs}
    figure.legend(found.values(), found, loc="outside lower center", ncols=len(found), frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Keep other studies from writing rows meanwhile."""
    with (RUNS / "rows.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ROWS.read_text()) if ROWS.exists() else {"rows": []}
    return found


def write(rows: Mapping[str, Any]) -> None:
    head = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in rows.items() if key != "rows"]
    body = ",\n".join("  " + json.dumps(row) for row in rows["rows"])
    text = ",\n".join([*head, f' "rows": [\n{body}\n ]'])
    atomic.write_file(ROWS, f"{{\n{text}\n}}\n".encode())


STUDIES = {"low_data": low_data, "shifts": shifts, "weights": weights, "orders": orders, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES, "table", "plot"])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--demos", nargs="+", type=int, default=[])
    parser.add_argument("--arms", nargs="+", default=[], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--shifts", nargs="+", default=SHIFTS)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000, help="updates, of both stages together")
    parser.add_argument("--rounds", type=int, default=30, help="of cost")
    args = parser.parse_args()
    if args.study == "table":
        print(table())
    elif args.study == "plot":
        plot(ROWS.with_name("fdp_low_data.png"))
    else:
        STUDIES[args.study](args)


if __name__ == "__main__":
    main()
