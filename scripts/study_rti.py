"""Real-time iteration against its controls, on the same episodes: success, smoothness and network calls per action.

    python scripts/study_rti.py --group main --tasks stack_cube   # one group of arms on some tasks, one process
    python scripts/study_rti.py --list                            # the groups and their arms
    python scripts/study_rti.py --theory                          # surviving share of an error against its closed form
    python scripts/study_rti.py --table                           # the rows as Markdown, with paired differences

Rows go to docs/rti.json; finished ones are not run again. `--train` trains the policies, or goes on with them;
PickCube's first is the published one. Episodes are those of `robopolicy eval`, seeds 10000 and on; presets were chosen
on seeds from 20000.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robopolicy import envs
from robopolicy.app import composing
from robopolicy.app.build import build_planner, build_policy
from robopolicy.atomic import write_file
from robopolicy.envs.shifts import apply_strength
from robopolicy.evaluation.comparison import compare_outcomes
from robopolicy.evaluation.rollout import EvalResult, evaluate
from robopolicy.evaluation.statistics import wilson_interval
from robopolicy.policies.actors import ChunkActor
from robopolicy.policies.planners import FreshPlanner, Planner
from robopolicy.rng import Rng
from robopolicy.sampling.samplers import DDIMSampler, DDPMSampler
from robopolicy.sampling.warm_start import WarmStart
from robopolicy.training import checkpoint
from robopolicy.training.checkpoint import LoadedPolicy
from robopolicy.types import Observation

ROWS = Path(__file__).parents[1] / "docs" / "rti.json"
RUNS = Path("checkpoints") / "rti"
FIRST_SEED = 10_000
NUM_ENVS = 50
UNCALIBRATED = (20, 10, 3, 0)
"""The list of `planner=rti` where nothing was calibrated: the rows must not depend on a file beside a checkpoint."""
SOON = 40
"""Control steps, 2 s: success within them is a second outcome."""

TRAIN = {  # run: settings of `robopolicy train`
    "push_cube-s1": "task=push_cube data.num_episodes=100",
    "stack_cube-s1": "task=stack_cube train.num_steps=3000",
    "stack_cube-s2": "task=stack_cube train.num_steps=3000 seed=2",
    "stack_cube-s3": "task=stack_cube train.num_steps=3000 seed=3",
    "two_goal-s1": "task=two_goal train.num_steps=2500",
    "pick_cube-joint-s1": "task=pick_cube task.control_mode=pd_joint_pos",
    "pick_cube-scale-s1": "task=pick_cube data.num_episodes=100 policy.discrete_scale=0.1",
    "stack_cube-scale-s1": "task=stack_cube train.num_steps=3000 policy.discrete_scale=0.1",
    "pick_cube-epsilon-s1": "task=pick_cube data.num_episodes=100 policy.prediction=epsilon",
    "push_cube-epsilon-s1": "task=push_cube data.num_episodes=100 policy.prediction=epsilon",
    "stack_cube-epsilon-s1": "task=stack_cube policy.prediction=epsilon",
    "two_goal-epsilon-s1": "task=two_goal train.num_steps=2500 policy.prediction=epsilon",
}


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to act with a checkpoint: a fresh plan every `steps`, or a warm-start preset with changes."""

    steps: int = 1
    ddpm: int | None = None
    ddim: int | None = None
    planner: str | None = None
    changes: tuple[str, ...] = ()
    zero_steps: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """Arms on one checkpoint under one condition."""

    group: str
    run: str
    arms: Mapping[str, Arm]
    n: int = 200
    long: Mapping[str, int] = field(default_factory=dict)
    """Arms with more episodes than `n`."""
    disturbance: tuple[str, float] | None = None
    tasks: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", "pick_cube" if self.run == "pick_cube-diffusion" else self.run.split("-")[0])


def rti(*timesteps: int, **changes: Any) -> Arm:
    """The preset `rti` with another list and other settings of its warm start."""
    words = [f"planner.warm_start.timesteps={list(timesteps or UNCALIBRATED)}".replace(" ", "")]
    words += [f"planner.{key.replace('__', '.')}={value}" for key, value in changes.items()]
    return Arm(planner="rti", changes=tuple(words))


MAIN = {
    "DDPM-100, chunk 8": Arm(ddpm=100, steps=8),
    "rti": rti(),
    "DDIM-4, chunk 1": Arm(ddim=4),
    "DDIM-4, chunk 8": Arm(ddim=4, steps=8),
    "rti_paper": Arm(planner="rti_paper"),
    "pure noise at K', rti's list": rti(warm_start__start="noise"),
    "rti [0], 1 call": rti(0),
    "DDIM-1, chunk 1": Arm(ddim=1),
    "DDIM-3, chunk 1": Arm(ddim=3),
    "rti [28,20,12,4,0], 5 calls": rti(28, 20, 12, 4, 0),
    "DDPM-100, chunk 1": Arm(ddpm=100),
}
MORE = {
    "rti [7,3,0], 3 calls": rti(7, 3, 0),
    "shifted guess, 0 steps": Arm(planner="rti", zero_steps=True),
    "rti_paper, released betas": Arm(planner="rti_paper", changes=("planner.warm_start.betas=released_default",)),
    "DDIM-3, chunk 8": Arm(ddim=3, steps=8),
    "DDIM-5, chunk 8": Arm(ddim=5, steps=8),
    "DDIM-5, chunk 1": Arm(ddim=5),
}
LONG = ("DDPM-100, chunk 8", "rti", "DDIM-4, chunk 1", "rti_paper")
"""Arms with 450 episodes, not 200, on StackCube, the first two on PushCube: comparisons with a margin of 5 points."""
FEW = (
    "DDPM-100, chunk 8",
    "rti",
    "DDIM-4, chunk 1",
    "rti_paper",
    "rti [0], 1 call",
    "DDIM-1, chunk 1",
)
LISTS = {"K'=3": (3, 2, 1, 0), "K'=20": (20, 10, 3, 0), "K'=60": (60, 30, 10, 0)}
ABLATION = {
    f"{start}, {stepper}, {name}": rti(*levels, warm_start__start=start, warm_start__stepper=stepper)
    for start in ("raw", "scaled", "renoise", "renoise_tail")
    for stepper in ("ddpm_relabel", "ddpm_posterior", "ddim")
    for name, levels in LISTS.items()
}
GRIPPER = {
    "DDPM-100, chunk 8": Arm(ddpm=100, steps=8),
    "rti": rti(),
    "rti, clip 10": rti(gripper="clip"),
    "rti, no hysteresis": rti(hysteresis=0.0),
    "rti [3,1,0]": rti(3, 1, 0),
    "rti [3,1,0], clip 10": rti(3, 1, 0, gripper="clip"),
    "rti_paper": Arm(planner="rti_paper"),
    "rti_paper, clip 10": Arm(planner="rti_paper", changes=("planner.gripper_factor=10.0",)),
    "rti_paper [18 ... 0], 11 calls": Arm(
        planner="rti_paper", changes=("planner.warm_start.timesteps=[18,16,14,12,10,8,6,4,2,1,0]",)
    ),
}
TAILS = {
    **{
        f"tail {tail}": rti(tail_delta=tail, tail_absolute=tail)
        for tail in ("repeat", "zero", "extrapolate", "renoise")
    },
    "4 executed, shift by 4": rti(n_action_steps=4),
    "4 executed, shift by 1": rti(n_action_steps=4, shift="one"),
    "4 executed, DDIM-4": Arm(ddim=4, steps=4),
}
ADAPTIVE = {
    "rti": rti(),
    "one call if nearer than .05": rti(accept_below=0.05),
    "anew if further than .3": rti(resample_above=0.3),
    "both": rti(accept_below=0.05, resample_above=0.3),
    "anti-stall .02, 5 ticks": rti(stall_below=0.02, stall_ticks=5),
}


def groups() -> dict[str, list[Job]]:
    """Return the jobs by the question they answer."""
    zoo = "pick_cube-diffusion"
    some = {name: MAIN[name] for name in FEW}
    return {
        "main": [
            Job(group="main", run="stack_cube-s1", arms=MAIN, long=dict.fromkeys(LONG, 450)),
            Job(group="main", run="push_cube-s1", arms=MAIN, long=dict.fromkeys(LONG[:2], 450)),
            *(Job(group="main", run=run, arms=MAIN) for run in (zoo, "two_goal-s1")),
        ],
        "more": [Job(group="more", run="stack_cube-s1", arms=MORE)],
        "seeds": [Job(group="seeds", run=f"stack_cube-s{seed}", arms=some) for seed in (2, 3)],
        "epsilon": [
            Job(group="epsilon", run=f"{task}-epsilon-s1", arms=some)
            for task in ("pick_cube", "push_cube", "stack_cube", "two_goal")
        ],
        "reaction": [
            Job(group="reaction", run=run, arms=some, disturbance=(name, strength))
            for run, name, strength in (
                (zoo, "goal_moved", 0.2),
                (zoo, "impulse_arm", 6.0),
                (zoo, "impulse_object", 1.2),
                ("push_cube-s1", "impulse_object", 1.2),
                ("stack_cube-s1", "impulse_arm", 6.0),
                ("stack_cube-s1", "impulse_object", 1.2),
            )
        ],
        "ablation": [Job(group="ablation", run="stack_cube-s1", arms=ABLATION, n=100)],
        "gripper": [
            Job(group="gripper", run=run, arms=GRIPPER)
            for run in (zoo, "pick_cube-scale-s1", "stack_cube-s1", "stack_cube-scale-s1")
        ],
        "tails": [Job(group="tails", run=run, arms=TAILS, n=100) for run in ("stack_cube-s1", "pick_cube-joint-s1")],
        "adaptive": [
            Job(group="adaptive", run="stack_cube-s1", arms=ADAPTIVE, n=100),
            Job(group="adaptive", run="stack_cube-s1", arms=ADAPTIVE, n=100, disturbance=("impulse_object", 1.2)),
        ],
        "absolute": [Job(group="absolute", run="pick_cube-joint-s1", arms=some)],
    }


class _Unrefined:
    """A policy whose refinement does nothing: the shifted guess is executed as it is."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def refine(
        self, obs: Observation, guess: Tensor, *, warm_start: Any = None, generator: Rng = None
    ) -> tuple[Tensor, Tensor]:
        return guess, guess


def load(run: str) -> LoadedPolicy:
    return checkpoint.load(run if run == "pick_cube-diffusion" else RUNS / run, build_policy)


def planner(arm: Arm, loaded: LoadedPolicy) -> tuple[Planner, dict[str, Any]]:
    """Return the planner of `arm`, and what it is in plain values."""
    policy: Any = loaded.policy
    if arm.planner is None:
        policy.sampler = DDPMSampler() if arm.ddpm else DDIMSampler(num_inference_steps=arm.ddim or 10)
        return FreshPlanner(policy), {"sampler": "ddpm" if arm.ddpm else "ddim", "num_steps": arm.ddpm or arm.ddim}
    policy.sampler = DDIMSampler(num_inference_steps=10)
    cfg = composing.compose("eval", [f"planner={arm.planner}", *arm.changes])
    if arm.zero_steps:
        policy = _Unrefined(policy)
    found: Any = build_planner(cfg.planner, policy, NUM_ENVS, loaded.path)
    settings = {"planner": arm.planner, "changes": list(arm.changes), "timesteps": list(found.warm_start.timesteps)}
    return found, settings


def environment(loaded: LoadedPolicy, max_episode_steps: int | None = None) -> Any:
    """Return the simulations that the policy was trained for, with its episodes' length unless another is given."""
    spec = loaded.spec
    steps = spec.max_episode_steps if max_episode_steps is None else max_episode_steps
    return envs.make(
        spec.name,
        num_envs=NUM_ENVS,
        backend="cpu",
        control_mode=spec.action.control_mode,
        max_episode_steps=steps,
    )


def run(job: Job, name: str, loaded: LoadedPolicy) -> dict[str, Any]:
    """Evaluate one arm; return its row."""
    env = environment(loaded)
    if job.disturbance is not None:
        env = apply_strength(env, job.disturbance[0], job.disturbance[1])
    arm = job.arms[name]
    plans, settings = planner(arm, loaded)
    # a preset says itself how often it wants to be asked
    steps = arm.steps if arm.planner is None else plans.timing.n_action_steps
    begin = time.process_time()
    n = job.long.get(name, job.n)
    result = evaluate(ChunkActor(plans, NUM_ENVS, n_action_steps=steps), env, seeds=range(FIRST_SEED, FIRST_SEED + n))
    env.close()
    totals = getattr(plans, "totals", None)
    calls = settings.get("num_steps") or totals["network_calls"] / totals["plans"]
    if arm.zero_steps:
        calls = 0.0
    plans_per_action = -(-result.max_episode_steps // steps) / result.max_episode_steps
    return {
        "group": job.group,
        "run": job.run,
        "disturbance": None if job.disturbance is None else list(job.disturbance),
        "arm": name,
        **settings,
        "n_action_steps": steps,
        "n": n,
        "success": _bits([e.success_once for e in result.episodes]),
        "success_at_end": _bits([bool(e.success_at_end) for e in result.episodes]),
        "success_soon": _bits([(e.first_success_step or 10**6) <= SOON for e in result.episodes]),
        "median_steps": _median_steps(result),
        "jerk": _jerk(result),
        "calls_per_action": round(calls * plans_per_action, 3),
        "calls_per_tick": settings.get("num_steps") or len(settings["timesteps"]) * (not arm.zero_steps),
        "resampled": None if totals is None else totals["resampled"] / totals["plans"],
        "cpu_s": round(time.process_time() - begin, 1),
    }


def _bits(outcomes: Sequence[bool]) -> str:
    return "".join("01"[bool(one)] for one in outcomes)


def _outcomes(bits: str) -> list[bool]:
    return [one == "1" for one in bits]


def _median_steps(result: EvalResult) -> int | None:
    steps = sorted(e.first_success_step for e in result.episodes if e.first_success_step)
    return steps[len(steps) // 2] if steps else None


def _jerk(result: EvalResult) -> float:
    """Return the RMS second difference of the arm's actions until success, in action units, over all episodes."""
    squares = []
    for episode in result.episodes:
        arm = episode.actions[: episode.first_success_step or episode.num_steps, :-1]
        squares.append((arm[2:] - 2 * arm[1:-1] + arm[:-2]).square().mean())
    return round(float(torch.stack(squares).nanmean().sqrt()), 4)


def theory(run: str, *, num_obs: int = 16, num_samples: int = 64) -> dict[str, Any]:
    """Compare the share of a guess's error that survives with the closed form for a Gaussian of the sampled spread.

    At states along an episode, `num_samples` full DDPM chunks give spread and principal directions. A guess (their
    mean) and one displaced by twice the spread along a direction are refined with the same noise; the share is what is
    left of the displacement, along it. Law, for start=renoise: a s^2 / (a s^2 + 1 - a).
    """
    loaded = load(run)
    policy: Any = loaded.policy
    policy.sampler = DDPMSampler()
    rows = []
    for obs in _visited(loaded, num_obs):
        many = Observation(modalities={n: v.expand(num_samples, *v.shape[1:]) for n, v in obs.modalities.items()})
        chunks = policy.act(many, generator=torch.Generator().manual_seed(0))
        flat = policy.norm.encode("action", chunks).flatten(1).double()
        mean = flat.mean(dim=0)
        _, spread, directions = torch.linalg.svd(flat - mean, full_matrices=False)
        spread = spread / (num_samples - 1) ** 0.5
        for levels in ((3, 1, 0), (7, 3, 0), (20, 10, 3, 0), (40, 20, 7, 0)):
            a = policy.schedule.alpha_bar[levels[0]]
            for kind, axis, std in (
                *(("axis", one, flat[:, i].std()) for i, one in enumerate(torch.eye(flat.shape[1]).double())),
                *(("principal", directions[i], spread[i]) for i in range(8)),
            ):
                s = float(std)
                if s < 0.01:
                    continue
                guess = torch.stack([mean, mean + 2 * s * axis]).view(2, *chunks.shape[1:]).float()
                noise = [torch.Generator().manual_seed(1) for _ in range(2)]
                warm = WarmStart(timesteps=levels)
                two = Observation(modalities={n: v[:2] for n, v in many.modalities.items()})
                out = policy.refine(two, policy.norm.decode("action", guess), warm_start=warm, generator=noise)[0]
                out = policy.norm.encode("action", out).flatten(1).double()
                share = float(((out[1] - out[0]) @ axis) / (2 * s))
                rows.append((kind, levels[0], s, share, a * s**2 / (a * s**2 + 1 - a)))
    found: dict[str, Any] = {"run": run, "num_obs": num_obs, "num_samples": num_samples}
    for kind in ("axis", "principal"):
        for level in (3, 7, 20, 40):
            some = [row for row in rows if row[:2] == (kind, level)]
            near = [abs(measured - law) <= 0.25 * law for _, _, _, measured, law in some]
            found[f"{kind} K'={level}"] = {
                "directions": len(some),
                "within_25_percent": sum(near) / max(1, len(near)),
                "median_measured": _median([row[3] for row in some]),
                "median_law": _median([row[4] for row in some]),
                "median_spread": _median([row[2] for row in some]),
            }
    return found


def _median(values: Sequence[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _visited(loaded: LoadedPolicy, num_obs: int) -> list[Observation]:
    """Return windows [1, O, S] from the first 30 steps of held-out episodes."""
    from robopolicy.policies.actors import ObservationWindow

    env = envs.make(loaded.spec.name, num_envs=4, backend="cpu", control_mode=loaded.spec.action.control_mode)
    actor = ChunkActor(FreshPlanner(loaded.policy), 4, n_action_steps=8)
    window = ObservationWindow(loaded.spec, loaded.policy.timing.n_obs_steps, 4)
    frame, _ = env.reset(seed=[20_000 + i for i in range(4)])
    found = []
    for step in range(30):
        window.push(frame)
        if step % (30 * 4 // num_obs) == 2:
            found += [window.observation.take(torch.tensor([row])) for row in range(4)]
        frame, *_ = env.step(actor(frame))
    env.close()
    return found[:num_obs]


def read() -> dict[str, Any]:
    return json.loads(ROWS.read_text()) if ROWS.exists() else {"rows": [], "theory": []}


def add(kind: str, row: Mapping[str, Any]) -> None:
    """Append a row; several processes may do so."""
    with open("/tmp/study_rti.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        data = read()
        data[kind].append(row)
        lines = ",\n".join(f"    {json.dumps(one)}" for one in data["rows"])
        more = ",\n".join(f"    {json.dumps(one)}" for one in data["theory"])
        write_file(ROWS, f'{{\n  "rows": [\n{lines}\n  ],\n  "theory": [\n{more}\n  ]\n}}\n'.encode())


def key(row: Mapping[str, Any]) -> str:
    return json.dumps([row["group"], row["run"], row["disturbance"], row["arm"], row["n"]])


def table(group: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `rows` of one group as Markdown, differences paired with the row of the same run named in the heading."""
    out = []
    for run, disturbance in dict.fromkeys((row["run"], str(row["disturbance"])) for row in rows):
        same = [row for row in rows if (row["run"], str(row["disturbance"])) == (run, disturbance)]
        what = "" if same[0]["disturbance"] is None else ", {} {}".format(*same[0]["disturbance"])
        base = same[0]
        out += [f"**{run}{what}**, differences to {base['arm']}", ""]
        out += [
            "| arm | n | success | 95 % | at the end | difference, points | at the end | within 2 s | steps | jerk | "
            "calls per tick | per action |",
            "|" + "---|" * 12,
        ]
        for row in same:
            n, hits = row["n"], row["success"].count("1")
            low, high = wilson_interval(hits, n)
            differences = []
            for outcome in ("success", "success_at_end"):
                shared = min(n, base["n"])
                pair = compare_outcomes(_outcomes(base[outcome])[:shared], _outcomes(row[outcome])[:shared])
                a, b = pair.interval
                differences.append(f"{100 * pair.difference:+.1f} ({100 * a:+.1f} to {100 * b:+.1f})")
            at_end, soon = (row[f"success_{when}"].count("1") / n for when in ("at_end", "soon"))
            out.append(
                f"| {row['arm']} | {n} | {hits / n:.1%} | {low:.0%}-{high:.0%} | {at_end:.1%} | "
                f"{' | '.join(differences)} | {soon:.0%} | {row['median_steps']} | {row['jerk']:.3f} | "
                f"{row['calls_per_tick']} | {row['calls_per_action']:.1f} |"
            )
        out.append("")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--group", nargs="*", choices=sorted(groups()), default=[])
    parser.add_argument("--tasks", nargs="*", default=None, help="only checkpoints of these tasks")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", nargs="*", default=None)
    parser.add_argument("--theory", nargs="*", default=[], help="runs")
    parser.add_argument("--train", nargs="*", default=[], help="runs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.list:
        for name, jobs in groups().items():
            print(f"{name}: {', '.join(job.run for job in jobs)}; {', '.join(jobs[0].arms)}")
    for name in args.train:
        words = [sys.executable, "-m", "robopolicy", "train", f"checkpoints_dir={RUNS}", f"run={name}"]
        subprocess.run([*words, *(["resume=true"] if (RUNS / name).exists() else TRAIN[name].split())], check=True)
    for name in args.theory:
        add("theory", theory(name))
    done = {key(row) for row in read()["rows"]}
    for job in (job for name in args.group for job in groups()[name]):
        if args.tasks is not None and job.tasks not in args.tasks:
            continue
        loaded = load(job.run)
        for name in job.arms:
            label = {"group": job.group, "run": job.run, "arm": name, "n": job.long.get(name, job.n)}
            label["disturbance"] = None if job.disturbance is None else list(job.disturbance)
            if key(label) not in done:
                row = run(job, name, loaded)
                add("rows", row)
                print(table(job.group, [row]).splitlines()[-1], row["cpu_s"], flush=True)
    if args.table is not None:
        for name in args.table or groups():
            print(table(name, [row for row in read()["rows"] if row["group"] == name]))


if __name__ == "__main__":
    main()
