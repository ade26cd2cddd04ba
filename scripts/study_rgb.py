"""What cameras cost, and whether a factorised policy survives a bad picture. PushCube, 64 x 64, cube and goal seen.

    python scripts/study_rgb.py cost       # pictures per second, megabytes, ms per training step and per plan
    python scripts/study_rgb.py shifts     # success of every arm, clean and with disturbed pictures
    python scripts/study_rgb.py table      # the finished rows: docs/rgb_tables.md and docs/rgb_shifts.png

Needs `robopolicy collect task=push_cube_rgb`. Every arm is trained on the
same demonstrations for the same number of updates, both stages of fdp counted. Every cell is the same episodes (seeds
from 10000), which end at success or after 60 steps: demonstrations need half as many. Runs are kept in
checkpoints/study_rgb, rows in docs/rgb.json; what is there is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from study_fdp_tables import bars, clean_table, difference, grid, save

from robopolicy import atomic
from robopolicy.app import composing
from robopolicy.app.build import build_policy
from robopolicy.data import batches, load_demonstrations

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "rgb.json"
RUNS = Path("checkpoints") / "study_rgb"
TASK = "push_cube"
MOST_STEPS = 60
MLP = ("policy.network.width=256", "policy.network.cond_width=128")
STACKS = ("policy.network.network.width=256", "policy.network.network.cond_width=128")
AUGMENTED = ("policy.encoder.image.erase=0.5", "policy.encoder.image.jitter=0.3")
ARMS: dict[str, tuple[str, ...]] = {
    "diffusion_noise": ("policy=diffusion_dropout", "policy.encoder.screen.dropout=0", *MLP),
    "diffusion_dropout": ("policy=diffusion_dropout", *MLP),
    "fdp": ("policy=fdp", *STACKS),
    "fdp_block": ("policy=fdp", "policy.network.composition=block", "train.stages=[0.2,0.8]", *STACKS),
    "fdp_output": ("policy=fdp_output", *STACKS),
    "diffusion_wide": (
        "policy=diffusion_dropout",
        "policy.encoder.screen.dropout=0",
        "policy.network.width=390",
        "policy.network.cond_width=192",
    ),
    "diffusion_augmented": ("policy=diffusion_dropout", "policy.encoder.screen.dropout=0", *MLP, *AUGMENTED),
    "fdp_augmented": ("policy=fdp", *STACKS, *(word.replace("encoder.", "encoder.encoder.") for word in AUGMENTED)),
    "diffusion_base": (
        "policy=diffusion_dropout",
        "policy.encoder.screen.dropout=0",
        "policy.encoder.use=[proprio]",
        *MLP,
    ),
    "diffusion_guided": ("policy=diffusion_guided", *STACKS),
    "fdp_sum": ("policy=fdp_sum", "train.stages=[0.5,0.5]", *STACKS),
    "diffusion_rgb": ("policy=diffusion_rgb", *MLP),
    "diffusion": ("policy=diffusion", *MLP),
}
"""All but the last two have the same noise on `proprio`; `diffusion_noise` is joint conditioning."""
DRAWN = ("fdp", "diffusion_noise", "diffusion_wide", "diffusion_dropout", "diffusion_augmented", "fdp_augmented")
SHIFTS = (
    "",
    *(f"camera_occlusion:{level}" for level in (1, 2, 3)),
    *(f"camera_distractors:{level}" for level in (1, 2, 3)),
    "camera_brightness:2",
    "camera_colour:2",
    "dropout_camera:3",
)


def read() -> dict[str, list[dict[str, Any]]]:
    return json.loads(ROWS.read_text()) if ROWS.exists() else {"cost": [], "rows": []}


def write(kind: str, row: dict[str, Any]) -> None:
    found = read()
    found[kind].append(row)
    lines = [json.dumps(row) for row in found[kind]]
    parts = [
        f' "{k}": [\n  ' + ",\n  ".join(lines if k == kind else [json.dumps(r) for r in rows]) + "\n ]"
        for k, rows in found.items()
    ]
    atomic.write_file(ROWS, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


# ---- success ---------------------------------------------------------------------------------------------------------
def train(arm: str, seed: int, args: argparse.Namespace) -> Path:
    """Return the run folder of an arm, trained if it was not."""
    from robopolicy.app import train as verb

    run = f"{arm}-{args.demos}-s{seed}-{args.steps}x{args.batch}"
    folder = RUNS / run
    where = [f"run={run}", f"checkpoints_dir={RUNS}"]
    if (folder / "last").exists():
        if (folder / f"step_{args.steps:08d}").exists():
            return folder
        words = ["resume=true", *where]
    else:
        words = [f"task={TASK}_rgb", *ARMS[arm], *where, f"seed={seed}", f"data.num_episodes={args.demos}"]
        words += [f"train.num_steps={args.steps}", f"train.batch_size={args.batch}", "train.keep=1"]
        words += ["train.save_every=500", "train.warmup_steps=200"]
    if isinstance(verb.run(composing.compose("train", words)), int):
        raise SystemExit("stopped; the next call goes on")
    for state in folder.glob("step_*/training_state"):
        shutil.rmtree(state)
    return folder


def shifts(args: argparse.Namespace) -> None:
    from robopolicy.app import eval as verb
    from robopolicy.evaluation.results import read_evaluation

    for shift, seed, arm in itertools.product(args.shifts, args.seeds, args.arms):
        key = {"arm": arm, "shift": shift, "demos": args.demos, "seed": seed, "updates": args.steps}
        key |= {"batch": args.batch, "n_episodes": args.episodes}
        if any(all(row.get(k) == v for k, v in key.items()) for row in read()["rows"]):
            continue
        folder = train(arm, seed, args)
        name = f"study-{args.episodes}-{shift.replace(':', '_') or 'clean'}"
        began_s = time.process_time()
        if not (folder / "eval" / name / "eval_info.json").exists():
            words = [f"checkpoint={folder}", f"n_episodes={args.episodes}", "stop_on_success=true"]
            words += [f"max_episode_steps={MOST_STEPS}", f"name={name}", *([f"shift={shift}"] if shift else [])]
            verb.run(composing.compose("eval", words))
        rows = read_evaluation(folder / "eval" / name).rows
        won = "".join(str(int(row["success"])) for row in rows)
        took = {"successes": won.count("1"), "cpu_s": round(time.process_time() - began_s, 1)}
        write("rows", key | took | {"outcomes": won})
        print(arm, shift or "clean", took, flush=True)


def table(args: argparse.Namespace) -> None:
    """Write docs/rgb_tables.md: successes of each arm, a line per disturbance, and what the stacks differ by."""
    places = ("shift", "demos", "seed", "updates", "batch", "n_episodes")
    rows = [row | {"place": tuple(row[key] for key in places)} for row in read()["rows"]]
    lines = ["# Pictures: all rows", "", "Written by `scripts/study_rgb.py table` from `rgb.json`.", ""]
    lines += ["PushCube, 64 x 64, 100 demonstrations. Successes of 50 episodes, training seed 1 / 2; differences in"]
    lines += ["points (95 % over episodes; number of training seeds).", ""]
    for updates in sorted({row["updates"] for row in rows}):
        lines += [f"## {updates:,} updates", "", *tables([row for row in rows if row["updates"] == updates])]
    atomic.write_file(ROWS.with_name("rgb_tables.md"), ("\n".join(lines).rstrip() + "\n").encode())
    draw([row for row in rows if row["updates"] == args.steps], ROWS.with_name("rgb_shifts.png"))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    kinds = ("camera_occlusion", "camera_distractors")
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        shifts = ["", *(f"{kind}:{level}" for level in (1, 2, 3))]
        lines = {
            arm: [[r for r in rows if (r["arm"], r["shift"]) == (arm, shift)] for shift in shifts] for arm in DRAWN
        }
        bars(axes, lines, ["clean", "1", "2", "3"])
        axes.set(title=kind, xlabel="level")
    figure.axes[0].set_ylabel("success, %")
    save(figure, path)


def tables(rows: list[dict[str, Any]]) -> list[str]:
    lines, body = [], []
    shifts = [shift for shift in SHIFTS if any(row["shift"] == shift for row in rows)]
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    for shift in shifts:
        same = sorted((row for row in rows if row["shift"] == shift), key=lambda row: row["seed"])
        cells = [" / ".join(str(row["successes"]) for row in same if row["arm"] == arm) for arm in arms]
        body.append([f"`{shift}`" if shift else "clean", *cells])
    lines += grid(["pictures", *(f"`{arm}`" for arm in arms)], body)
    lines += clean_table(rows, shifts[1:], clean="", keys=("demos", "seed", "batch", "n_episodes"))
    for stack in (arm for arm in arms if arm.startswith("fdp")):
        others = [arm for arm in arms if arm != stack]
        body = []
        for shift in shifts:
            same = [row for row in rows if row["shift"] == shift]
            cells = [difference(*([r for r in same if r["arm"] == name] for name in (stack, arm))) for arm in others]
            body.append([f"`{shift}`" if shift else "clean", *cells])
        lines += grid([f"`{stack}` less", *(f"`{arm}`" for arm in others)], body)
    return lines


# ---- cost ------------------------------------------------------------------------------------------------------------
def cpu_ms(work: Callable[[], Any], times: int, rounds: int = 3) -> float:
    """Return the median CPU time of `work` in ms, all threads."""
    work()
    found = []
    for _ in range(rounds):
        began_s = time.process_time()
        for _ in range(times):
            work()
        found.append((time.process_time() - began_s) / times * 1e3)
    return round(statistics.median(found), 2)


def cost(args: argparse.Namespace) -> None:
    for task, mode in (
        ("pick_cube", "rgb64"),
        ("pick_cube", "rgb128"),
        ("push_cube", "rgb64"),
        ("stack_cube", "rgb64"),
    ):
        write("cost", {"what": "picture"} | picture_cost(task, mode))
    for name in ("diffusion", "fdp"):
        write("cost", {"what": "policy"} | policy_cost(name))
    for row in read()["cost"]:
        print(row)


def picture_cost(task: str, mode: str) -> dict[str, Any]:
    """Return CPU milliseconds per control step of one environment, with the original meshes and with coarse ones."""
    import robopolicy.envs.vector as vector
    from robopolicy.envs import make

    found: dict[str, Any] = {"task": task, "obs_mode": mode}
    coarse = vector.coarse_meshes
    pictures = {}
    for name, meshes in (("original", contextlib.nullcontext), ("coarse", coarse)):
        vector.coarse_meshes = meshes
        env = make(task, num_envs=2, backend="cpu", obs_mode=mode)
        env.reset(seed=0)
        still = torch.zeros(2, env.task_spec.action.dim)
        found[f"{name}_ms"] = round(cpu_ms(lambda env=env, still=still: env.step(still), 3) / 2, 1)
        frame, _ = env.reset(seed=1)
        pictures[name] = torch.cat([v.float() for n, v in frame.items() if n.startswith("rgb")])
        env.skip_pictures(True)
        found["without_ms"] = round(cpu_ms(lambda env=env, still=still: env.step(still), 3) / 2, 1)
        env.close()
    vector.coarse_meshes = coarse
    difference = (pictures["original"] - pictures["coarse"]).abs()
    found["mean_difference"] = round(float(difference.mean()), 2)
    found["share_above_16"] = round(float((difference > 16).float().mean()), 4)
    return found


def policy_cost(name: str) -> dict[str, Any]:
    """Return CPU milliseconds of a training step at batch 64, of its parts, and of a plan at batch 1."""
    torch.set_num_threads(1)
    store = load_demonstrations(Path("demos") / TASK / "pd_ee_delta_pos.rgb64.h5")
    words = [f"task={TASK}_rgb", f"policy={name}"]
    policy = build_policy(composing.compose("train", words).policy, store.spec)
    policy.norm.fit(store.limits())
    policy.set_stage(policy.num_stages - 1)
    stream = batches(store, policy.timing, batch_size=64, seed=0)
    batch = next(stream)
    policy.train()

    def step() -> None:
        policy.zero_grad()
        policy.loss(batch).backward()

    found = {"policy": name, "parameters": sum(p.numel() for p in policy.parameters())}
    found |= {"step_ms": cpu_ms(step, 3), "gather_ms": cpu_ms(lambda: next(stream), 5)}
    encoder: Any = policy.encoder
    seen = policy.normalized(batch.obs)
    found["normalize_ms"] = cpu_ms(lambda: policy.normalized(batch.obs), 5)
    found["encode_ms"] = cpu_ms(lambda: encoder(seen).square().mean().backward(), 3)
    policy.eval()
    one = batch.obs.take(torch.tensor([0]))
    found["act_ms"] = cpu_ms(lambda: policy.act(one), 20)
    with torch.inference_mode():
        first = policy.normalized(one)
        found["act_encode_ms"] = cpu_ms(lambda: encoder(first), 20)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "shifts", "table"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:4])
    parser.add_argument("--shifts", nargs="+", type=lambda word: "" if word == "clean" else word, default=list(SHIFTS))
    parser.add_argument("--demos", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=50)
    args = parser.parse_args()
    {"cost": cost, "shifts": shifts, "table": table}[args.what](args)


if __name__ == "__main__":
    main()
