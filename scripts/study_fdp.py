"""Is a factorised policy better with few demonstrations, and when a sensor fails? Against controls that could say no.

    python scripts/study_fdp.py low_data                      # success by number of demonstrations, all arms
    python scripts/study_fdp.py shifts                        # success with failing sensors, 50 demonstrations
    python scripts/study_fdp.py weights                       # success by residual weight at run time
    python scripts/study_fdp.py orders                        # each modality first, and the loss that order=auto sees
    python scripts/study_fdp.py backbones                     # joint, block, output, both with the UNet and the DiT
    python scripts/study_fdp.py cost                          # parameters and milliseconds per forward pass
    python scripts/study_fdp.py low_data --tasks push_cube --demos 10 --arms fdp diffusion --seeds 1
    python scripts/study_fdp_tables.py                        # the rows as tables and pictures

Every arm is trained on the same demonstrations, of which it does not see the last tenth (the base of fdp ends early by
them), for the same number of updates, both stages of fdp counted: `diffusion` is so the step-matched control, and
`diffusion_half` has the updates of one stage. The networks are MLPs of width 256 in place of 384 (each stack of fdp;
`diffusion_wide` has fdp's parameters), which halves the cost; those of `backbones` have their own width. Every cell is
the same episodes (seeds from 10000), each of LIMITS' steps: demonstrations need half as many, and a robot that missed
waits. Runs are kept in checkpoints/study_fdp, rows in docs/fdp.json; what is there is not done again, and an
interrupted run goes on.
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
HALF = "train.stages=[0.5,0.5]"
DOUBTED = {"doubt": (DOUBT,)}
PROPRIO_FIRST = "policy.encoder.order=[[proprio]]"
PROPRIO_STAYS = "policy.encoder.prioritised=[proprio]"
GOAL_STAYS = "policy.encoder.prioritised=[proprio,goal]"
OBJECTS_STAY = "policy.encoder.prioritised=[objects,goal]"
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


FULL = ("policy.encoder.screen.dropout=0", NOISE, PROPRIO_STAYS)
"""Of diffusion_dropout: nothing is dropped, proprioception is as noisy in training as that of fdp."""


def joint(*overrides: str, share: float = 1.0) -> Arm:
    """Return joint conditioning with the noise of fdp."""
    return Arm(policy="diffusion_dropout", overrides=(*FULL, *overrides), share=share)


def dropped(percent: int, *overrides: str) -> Arm:
    """Return joint conditioning that does without what is not prioritised in so many training rows."""
    share = f"policy.encoder.screen.dropout={percent / 100}"
    return Arm(policy="diffusion_dropout", overrides=(*MLP, NOISE, PROPRIO_STAYS, share, *overrides), variants=DOUBTED)


def stacks(*overrides: str, policy: str = "fdp") -> Arm:
    """Return two stacks, proprioception first unless the overrides say otherwise."""
    return Arm(policy=policy, overrides=(*STACKS, NOISE, PROPRIO_FIRST, *overrides), variants=DOUBTED)


def backbone(network: str, *overrides: str) -> Arm:
    """Return stacks of the network at its default width."""
    return Arm(policy=f"fdp_{network}", overrides=(NOISE, PROPRIO_FIRST, "train.lr=3e-4", *overrides))


def backbones(network: str) -> dict[str, Arm]:
    """Return joint conditioning and every composition of the network."""
    return {
        network: backbone(network, "policy.encoder.order=[]"),
        f"fdp_{network}": backbone(network),
        f"fdp_{network}_output": backbone(network, "policy.network.composition=output"),
        f"fdp_{network}_block": backbone(network, *BLOCK, QUARTER),
    }


ARMS = {
    "diffusion": Arm(policy="diffusion", overrides=MLP),
    "diffusion_noise": joint(*MLP),
    "diffusion_half": joint(*MLP, share=0.5),
    "diffusion_wide": joint("policy.network.width=390", "policy.network.cond_width=192"),
    "diffusion_dropout_10": dropped(10),
    "diffusion_dropout_30": dropped(30),
    "diffusion_guided": Arm(policy="diffusion_guided", overrides=(*STACKS, NOISE, PROPRIO_STAYS), variants=DOUBTED),
    "diffusion_base": joint(*MLP, "policy.encoder.use=[proprio]"),
    "fdp": stacks(),
    "fdp_output": stacks(policy="fdp_output"),
    "fdp_block": stacks(*BLOCK, QUARTER),
    "fdp_block_short": stacks(*BLOCK),
    "fdp_long": stacks(QUARTER),
    "fdp_quiet": stacks(NO_NOISE),
    "fdp_objects_first": stacks("policy.encoder.order=[[objects]]"),
    "fdp_sum": stacks(HALF, policy="fdp_sum"),
    "alone": joint(*MLP, share=0.25),
    # for a failing proprioception: the objects come first, which on PickCube and StackCube tell all that is needed
    "fdp_objects": stacks("policy.encoder.order=[[objects]]", HALF),
    "dropout_objects_10": dropped(10, OBJECTS_STAY),
    "dropout_objects_30": dropped(30, OBJECTS_STAY),
    "diffusion_objects": joint(*MLP, "policy.encoder.use=[objects]", OBJECTS_STAY),
    # for failing objects on PushCube, whose goal lies at a fixed distance from the cube's start
    "fdp_goal": stacks("policy.encoder.order=[[proprio,goal]]", HALF),
    "dropout_goal_10": dropped(10, GOAL_STAYS),
    "dropout_goal_30": dropped(30, GOAL_STAYS),
    "diffusion_goal": joint(*MLP, "policy.encoder.use=[proprio,goal]"),
    "fdp_goal_short": stacks("policy.encoder.order=[[proprio,goal]]"),
    "fdp_goal_output": stacks("policy.encoder.order=[[proprio,goal]]", policy="fdp_output"),
    "fdp_no_base": stacks("train.stages=[0.001,0.999]"),
    **backbones("unet"),
    **backbones("dit"),
}
MAIN = (
    "diffusion_noise",
    "fdp",
    "diffusion_wide",
    "diffusion_half",
    "fdp_block",
    "diffusion_dropout_10",
    "diffusion_dropout_30",
    "fdp_output",
    "diffusion",
    "diffusion_guided",
    "fdp_sum",
    "diffusion_base",
)
"""Arms of the grid; the others answer a question each."""


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
    row = {**key, "success": 1 - len(failed) / len(episodes), "failed_seeds": failed}
    if episodes[0]["min_distance_m"] is not None:
        row["failed_min_distance_m"] = [round(e["min_distance_m"], 4) for e in episodes if not e["success"]]
    for name in ("missing_objects", "missing_proprio"):
        said = [e["diagnostics"][name] for e in episodes if name in (e.get("diagnostics") or {})]
        if said:
            row[name] = round(statistics.fmean(said), 4)
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


def compositions(args: argparse.Namespace) -> None:
    """Success of joint conditioning and of every composition, with other networks than the MLP."""
    for demos, seed, task, name in _grid(args, args.demos or (25,), (*backbones("unet"), *backbones("dit"))):
        cell("backbones", task, name, demos, seed, args, "clean")


def weights(args: argparse.Namespace) -> None:
    """Success by residual weight."""
    for demos, seed, task, name in _grid(args, args.demos or (50,), ("fdp", "fdp_output")):
        for w in (0.0, 0.25, 0.5, 0.75, 1.0):
            changes = [f"+policy.encoder.residual_weight={w}"]
            cell("weights", task, name, demos, seed, args, "clean", f"w={w}", changes)


def orders(args: argparse.Namespace) -> None:
    """Every modality first: does the one that alone has the lowest held-out loss, `order=auto`, also succeed most?"""
    for demos, seed, task, name in _grid(args, args.demos or (50,), ("fdp",)):
        path = Path("demos") / task / "pd_ee_delta_pos.state.h5"
        for first in load_demonstrations(path, spec=None, num_episodes=1).spec.observation:
            extra = [f"policy.encoder.order=[[{first}]]"]
            cell("orders", task, name, demos, seed, args, "clean", f"{first} first", extra=extra)
            only = [f"policy.encoder.use=[{first}]", f"policy.encoder.prioritised=[{first}]"]
            metrics = train(task, "alone", demos, seed, args.steps, only) / "metrics.jsonl"
            losses = [row["val/loss"] for row in map(json.loads, metrics.read_text().splitlines()) if "val/loss" in row]
            with locked():
                found = read()
                found.setdefault("order_losses", {})[f"{task} {demos} s{seed} {first}"] = losses[-1]
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
    args: argparse.Namespace, demos: Sequence[int], arms: Sequence[str] = MAIN
) -> Iterator[tuple[int, int, str, str]]:
    """Yield (demonstrations, seed, task, arm): first one seed of everything."""
    for seed in args.seeds:
        for count in demos or DEMOS:
            for task in args.tasks:
                for name in args.arms or arms:
                    yield count, seed, task, name


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


STUDIES = {
    "low_data": low_data,
    "shifts": shifts,
    "backbones": compositions,
    "weights": weights,
    "orders": orders,
    "cost": cost,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*STUDIES])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--demos", nargs="+", type=int, default=[])
    parser.add_argument("--arms", nargs="+", default=[], choices=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--shifts", nargs="+", default=SHIFTS)
    parser.add_argument("--episodes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=2000, help="updates, of both stages together")
    parser.add_argument("--rounds", type=int, default=30, help="of cost")
    args = parser.parse_args()
    STUDIES[args.study](args)


if __name__ == "__main__":
    main()
